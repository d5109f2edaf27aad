"""Which pictures a step trains on and how they are shifted and flipped, as pure functions of (seed, step).

Nothing is carried from one step to the next, so a step that is replayed after a crash sees the same bytes. inputs.py
calls `indices`, `augment` and `normalise`, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.draw import AUGMENT, ORDER, generator, shifted
from common.schedule import steps_per_epoch

Pictures = NDArray[np.uint8 | np.float32]  # pixels, or numbers as they are


@lru_cache(maxsize=4)  # every step of an epoch asks again, and permuting 50,000 costs more than augmenting a batch
def order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """The permutation of 0..samples-1 that `epoch` (from 0) goes through; read-only, because it is cached."""
    permutation = generator(seed, ORDER, epoch).permutation(samples)
    permutation.flags.writeable = False
    return permutation


def indices(seed: int, step: int, samples: int, batch: int) -> NDArray[np.int64]:
    """The `batch` distinct training pictures, of no fewer `samples`, of `step` (from 0 for the whole run)."""
    epoch, position = divmod(step, steps_per_epoch(samples, batch))
    return order(seed, epoch, samples)[position * batch : (position + 1) * batch].copy()


def augment(pictures: Pictures, seed: int, step: int, crop: int, flip: bool) -> Pictures:
    """Each picture moved by up to `crop` pixels each way and, with `flip`, mirrored left to right half of the time.

    Takes and returns [B,C,H,W]. What a shift uncovers is the picture reflected at its edge (edge pixels not
    repeated), which has no black bars for the network to learn. `crop` is below H and W; 0 means no shift.
    """
    return shifted(pictures, generator(seed, AUGMENT, step), crop, flip)


def together(pictures: Sequence[Pictures]) -> Pictures:
    """Pictures [C,H,W] as one batch; beside numbers, pixels are the numbers that `normalise` takes them for."""
    if len({picture.dtype for picture in pictures}) > 1:
        pictures = [picture / np.float32(255) if picture.dtype == np.uint8 else picture for picture in pictures]
    return np.stack(pictures)


def normalise(pictures: Pictures, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """(x - mean) / std as contiguous float32 [B,C,H,W]; x is pixels, uint8 [B,C,H,W], as 0..1, or float32 as it is.

    Both have one value for all channels or one for each; a recipe with others is refused.
    """
    scale = 1 / ((255 if pictures.dtype == np.uint8 else 1) * np.asarray(std, dtype=np.float64))
    offset = -np.asarray(mean, dtype=np.float64) / np.asarray(std, dtype=np.float64)
    # `out`, because numpy would otherwise keep the memory order of an input that is not contiguous.
    result = np.empty(pictures.shape, dtype=np.float32)
    np.multiply(pictures, scale.astype(np.float32)[:, None, None], out=result)
    result += offset.astype(np.float32)[:, None, None]
    return result
