"""What every source of pictures gives: its train and test part, listed but not read. Called by all that read some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil
from numpy.typing import NDArray

from common.errors import DataError
from device_client.batches import Pictures

COLOURLESS = "colours are not seen: the model takes pictures with one channel (model.input)"


@dataclass(frozen=True)
class Listing:
    """The train or test part of a source, listed but not read; `read` and `name` take a picture's index."""

    labels: NDArray[np.int64]
    read: Callable[[int], tuple[Pictures, tuple[int, int]]]  # and width and height before they were the model's
    name: Callable[[int], str]
    threads: int = 1  # that may read at once
    dtype: type[np.uint8 | np.float32] = np.uint8  # of what is read: pixels, or numbers
    loses_colour: bool = False


@dataclass(frozen=True)
class Source:
    classes: tuple[str, ...]
    train: Listing | None
    test: Listing | None
    left_out: tuple[str, ...] = ()  # what of it is not used though it may have been meant to be, in words


def check_memory(needed: int, what: str, remedy: str) -> None:
    """DataError if `needed` bytes are over half of the free memory; the rest is for the model, and for one copy."""
    free = psutil.virtual_memory().available
    if needed > free / 2:
        raise DataError(
            f"{what} need {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free, of which half may be used;"
            f" {remedy}"
        )
