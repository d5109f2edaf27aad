"""Random numbers that both sides make for themselves, so that rounding can be unbiased and nothing more is sent.

Subtractive dither: round(x / step + u) - u with u uniform in [-1/2, 1/2) has an error that is uniform too and
independent of x, so that its mean is zero (Schuchman 1964). Nearest rounding loses gradients smaller than half a
step for good; this loses none of them on average.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def uniform(seed: tuple[int, int, int], count: int) -> NDArray[np.float32]:
    """`count` numbers in [0, 1), multiples of 2^-16: bit-identical on every platform.

    Philox4x64-10 (Salmon et al. 2011), counter-based, in numpy's promised-stable raw stream; 16 bits a number.
    """
    key = hashlib.blake2b(repr(seed).encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(-(-count // 4))
    halves = words.astype("<u8", copy=False).view("<u2")[:count]
    numbers = halves.astype(np.float32)
    numbers *= np.float32(2**-16)
    return numbers
