"""The networks a recipe can name, and how a name becomes a network.

Both sides call `build`: the server with the recipe's model, the device with the same name after its handshake.
Code that is not part of this package only runs where this side's own user allowed it by name.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from torch import nn

from common.errors import ModelError
from common.models.mobilenetv2 import mobilenetv2
from common.models.resnet20 import resnet20
from common.models.tiny import tiny
from common.models.vgg11 import vgg11
from common.words import by, one_line

Factory = Callable[[tuple[int, int, int], int], nn.Module]

MODELS: dict[str, Factory] = {
    "resnet20": resnet20,
    "mobilenetv2": mobilenetv2,
    "vgg11": vgg11,
    "tiny": tiny,
}


def build(name: str, input_shape: tuple[int, int, int], classes: int, allowed: Collection[str] = ()) -> nn.Module:
    """The network `name` with fresh weights, in training mode, from torch's global random state.

    Args:
        name: a key of `MODELS`, or "package.module:factory"; that factory is called as factory(input_shape, classes)
            and must return an nn.Module. The current folder is importable while it is loaded and called.
        input_shape: one picture as (channels, height, width).
        classes: how many outputs the network has a picture.
        allowed: the "package.module:factory" names that this side's user allowed; no other is imported.

    Raises:
        ModelError: an unknown name, code that is not allowed or fails, or a shape the network cannot take.
    """
    if len(input_shape) != 3 or min(input_shape) < 1 or classes < 1:
        raise ModelError(
            f"a model needs an input of channels x height x width and at least one class, all of them positive, "
            f"not {by(input_shape)} and {classes}"
        )
    if name in MODELS:
        return MODELS[name](input_shape, classes)
    if not is_own(name):
        raise ModelError(
            f"there is no model {name!r}; use one of {', '.join(sorted(MODELS))}, or your own as package.module:factory"
        )
    require_allowed(name, allowed)
    return _call_custom(name, input_shape, classes)


def channels_last(model: nn.Module) -> nn.Module:
    """The model with its weights so laid out: its convolutions then work so throughout, which is faster."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def is_own(name: str) -> bool:
    """Whether it names code of the user's own, and no built-in model."""
    return ":" in name


def require_allowed(name: str, allowed: Collection[str]) -> None:
    """ModelError where `name` is code that this side's user has not allowed."""
    if is_own(name) and name not in allowed:
        raise ModelError(
            f"the recipe wants to run the code {name}, which is not part of deprune; "
            f"if you trust it, allow it with `--allow-model {name}` on the command line"
        )


def _call_custom(name: str, input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    module_name, _, factory_name = name.partition(":")
    if not factory_name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ModelError(f"{name!r} does not name a model; write it as package.module:factory")
    if module_name.endswith(".py"):
        raise ModelError(f"{name!r} names a file; leave .py out: {module_name.removesuffix('.py')}:{factory_name}")
    with _current_folder_importable():
        try:
            module = importlib.import_module(module_name)
        # SystemExit: a script without a main guard must not end the server in silence.
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"the module of model {name} cannot be imported from {Path.cwd()} ({one_line(error)})"
            ) from error
        factory = getattr(module, factory_name, None)
        if not callable(factory):
            raise ModelError(f"the module {module_name} has no function {factory_name} to build the model {name}")
        try:
            model = factory(input_shape, classes)
        except ModelError:
            raise
        except (Exception, SystemExit) as error:
            raise ModelError(
                f"the model {name} cannot be built for input {by(input_shape)} "
                f"and {classes} classes ({one_line(error)})"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} must return a torch.nn.Module but returned {type(model).__name__}")
    return model


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Console scripts, unlike `python -m`, do not search the folder they are started in."""
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
