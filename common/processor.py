"""Where a half computes: the processor, or a graphics card. `--device` of either side calls it once."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from common.errors import ModelError
from common.words import several


def choose(name: str) -> torch.device:
    """`name` is "auto" (a card where there is one), "cpu", "cuda" or "cuda:1"; ModelError where it is not to be had.

    On a card sums are made in a fixed order, so that a step that is made again is the same again.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    # By torch's own parser 256 is card 0: it keeps numbers in eight bits.
    asked = re.fullmatch(r"cuda(?::([0-9]{1,9}))?", name)
    if not asked:
        raise ModelError(f"--device {name!r} is not a device to compute on; give auto, cpu, cuda or cuda:NUMBER")
    number = int(asked[1] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= count:
        have = several(count, "CUDA device") if count else "no CUDA device"
        raise ModelError(
            f"--device {name}: torch {torch.__version__} finds {have} here; give --device cpu, or install a driver and "
            f"a build of torch for it"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the card is first used
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    # With the line above new memory is filled, for programs that read it before they write it: none here does.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    chosen = torch.device("cuda", number)
    try:
        _touch(chosen)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"--device {name} cannot be used ({reason}); free it, or give --device cpu") from error
    return chosen


def _touch(card: torch.device) -> None:
    """Use it for the first time: what is wrong with a driver, or with a card that is full, shows here."""
    torch.zeros(1, device=card)


@contextlib.contextmanager
def fits(what: str, processor: torch.device) -> Iterator[None]:
    """ModelError where a card has no room for it; the processor's own memory is the system's matter."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{what} does not fit into the memory of {processor}; lower data.batch and data.evaluation_batch in the "
            f"recipe, or give --device cpu"
        ) from error
