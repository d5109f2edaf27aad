"""The graph of a model's forward, or ModelError where a graph would not do what forward does; called by tracing.py,
which puts the model's name in front of it.

What forward does to anything but its input happens while it is traced, once, and never again: a graph knows nothing of
grad modes, of draws, of counters. Such a model would be trained as another one, without a word.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import ModelError

_IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "setitem"}
# What gives the same memory under another shape.
_VIEWS = {
    "getitem", "view", "view_as", "t", "transpose", "permute", "unsqueeze", "squeeze", "narrow", "select", "expand",
    "detach", "movedim", "unflatten", "diagonal", "getattr",
}  # fmt: skip
_SIMPLE = (bool, int, float, complex, str)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_DEEP = 4  # containers in containers that are looked into
_OF_TORCH = vars(nn.Module()).keys() - {"training"}


def traced(root: nn.Module) -> fx.Graph:
    """The graph of `root` in its mode; may raise anything, for forward is anybody's code."""
    values, drawn = _values(root), _drawn()
    with torch.enable_grad(), _Writes([*root.named_parameters(), *root.named_buffers()]) as writes:
        graph = _Tracer().trace(root)
    after = _values(root)
    # repr: a number that is none is not equal to itself.
    moved = [name for name, value in values.items() if repr(after.get(name)) != repr(value)]
    moved += writes.names + _changed(root, graph)
    if moved:
        raise ModelError(
            f"its forward changes {moved[0]} itself, which its halves would not do; leave such state to modules, such "
            f"as nn.BatchNorm2d"
        )
    if _drawn() != drawn:
        raise ModelError(
            "its forward draws random numbers that its halves would not draw again; use nn.Dropout and its like, or "
            "draw by a tensor that comes from the input, as in torch.rand_like(x)"
        )
    return graph


class _Writes(TorchDispatchMode):
    """Notes which of some tensors are overwritten while it is entered, through `.data` too, of which they know nothing
    themselves."""

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        made = [(name, tensor) for name, tensor in tensors if not nn.parameter.is_lazy(tensor) and tensor.numel()]
        self._known = {tensor.untyped_storage().data_ptr(): name for name, tensor in made}
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            if name := self._known.get(tensor.untyped_storage().data_ptr()):
                self.names.append(name)
        return func(*args, **kwargs)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors that an operator of torch is to overwrite, by its schema."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            values = value if isinstance(value, list | tuple) else (value,)
            yield from (tensor for tensor in values if isinstance(tensor, torch.Tensor))


class _Proxy(fx.Proxy):
    """Would take an attribute without a word, and the graph know nothing of it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad", "requires_grad"):
            raise ModelError(
                f"its forward sets the {name} of a tensor, which its halves would not; compute what is needed from the "
                f"weight, as in F.conv2d(x, torch.renorm(self.weight, 2, 0, 1.0))"
            )
        super().__setattr__(name, value)


class _Tracer(fx.Tracer):
    # Else what is computed of buffers alone would keep what they hold now, whatever is loaded into them.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._depth = _autocasts()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *arguments: Any, **options: Any) -> fx.Node:
        if not torch.is_grad_enabled():
            raise ModelError(
                "a part of its forward runs without gradients (torch.no_grad), which its halves would not; freeze "
                "weights by requires_grad_(False) where the model is made, or use detach()"
            )
        if _autocasts() != self._depth:
            raise ModelError(
                "a part of its forward sets torch.autocast, which its halves would not; convert tensors, as in "
                "x.float()"
            )
        return super().create_node(*arguments, **options)


def changes_in_place(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node overwrites its first argument, which the other half still owns."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return bool(node.kwargs.get("inplace")) or name in _IN_PLACE_OPERATORS or name.endswith("_")
    return False


def _changed(root: nn.Module, graph: fx.Graph) -> list[str]:
    """Parameters and buffers that nodes overwrite."""
    result = []
    for node in graph.nodes:
        source = node
        while source.all_input_nodes and (changes_in_place(root, source) or (source is not node and _is_view(source))):
            source = source.all_input_nodes[0]
        if source is not node and source.op == "get_attr" and changes_in_place(root, node):
            result.append(str(source.target))
    return result


def _is_view(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in _VIEWS


def _values(root: nn.Module) -> dict[str, object]:
    """What the modules hold."""
    return {
        f"{path}.{name}".removeprefix("."): _known(value)
        for path, module in root.named_modules()
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items()
        if name not in _OF_TORCH
    }


def _known(value: object, deep: int = _DEEP) -> object:
    """What changes where a value does: tensors by where they lie and how often they were overwritten, containers by
    what is in them. Objects of other kinds are not looked into."""
    if isinstance(value, torch.Tensor):
        return id(value), 0 if nn.parameter.is_lazy(value) else value.data_ptr(), value._version
    if isinstance(value, _CONTAINERS) and deep:
        items = value.items() if isinstance(value, dict) else value
        return type(value), [_known(item, deep - 1) for item in items]
    return value if isinstance(value, _SIMPLE) else type(value)


def _drawn() -> tuple[object, ...]:
    state: Any = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), state[1].tobytes(), state[2]


def _autocasts() -> int:
    """How many autocast contexts are open."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth
