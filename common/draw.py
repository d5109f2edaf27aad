"""Random numbers as pure functions of (seed, use, number), so that a step which is replayed draws the same again."""

from __future__ import annotations

import numpy as np

# One number per use of randomness: the same seed and step must not give, say, the order and the flips the same bits.
ORDER, AUGMENT, SPLIT, RECALL = range(4)


def generator(seed: int, stream: int, number: int = 0) -> np.random.Generator:
    """Random numbers that depend on these three alone; `number` is an epoch or a step, `stream` says what for."""
    # `number` goes into the counter's top word: what is drawn advances the low words and never reaches it.
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    counter = np.array([0, 0, 0, number], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
