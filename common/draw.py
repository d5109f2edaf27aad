"""Random numbers as pure functions of (seed, use, number), so that a step which is replayed draws the same again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# One number per use of randomness: the same seed and step must not give, say, the order and the flips the same bits.
ORDER, AUGMENT, SPLIT, RECALL, JITTER, NESTED = range(6)


def generator(seed: int, stream: int, number: int = 0) -> np.random.Generator:
    """Random numbers that depend on these three alone; `number` is an epoch or a step, `stream` says what for."""
    # `number` goes into the counter's top word: what is drawn advances the low words and never reaches it.
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    counter = np.array([0, 0, 0, number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def shifted(maps: NDArray[Any], random: np.random.Generator, shift: int, flip: bool) -> NDArray[Any]:
    """A copy of maps [B,C,H,W], each moved by up to `shift` places and, with `flip`, mirrored half of the time.

    What a move uncovers is the map reflected at its edge (edge places not repeated); `shift` is below H and W.
    """
    count, _, height, width = maps.shape
    down, right = random.integers(0, 2 * shift + 1, size=(2, count))
    mirrored = random.random(count) < 0.5
    result = maps.copy(order="C")
    if shift:
        padded = np.pad(maps, ((0, 0), (0, 0), (shift, shift), (shift, shift)), mode="reflect")
        # A view of every window there is; the index copies one a map, as whole rows.
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
        result[:] = windows[np.arange(count), :, down, right]
    if flip:
        result[mirrored] = result[mirrored][..., ::-1]
    return result
