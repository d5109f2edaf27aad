"""Random numbers that both sides make for themselves, so that rounding can be unbiased and nothing more is sent.

Subtractive dither: round(x / step + u) - u with u uniform in [-1/2, 1/2) has an error that is uniform too and
independent of x, so that its mean is zero (Schuchman 1964). Nearest rounding loses gradients smaller than half a
step for good; this loses none of them on average.

The numbers are stratified: of four in a row one lies in each quarter of [0, 1), and which begins is drawn for each row
of 1024. Both sides know where a number is near the middle of its range and the symbol therefore most probably zero,
and where it is near an end. So the symbols of each quarter are coded among themselves, which at 5 dB takes a sixth off.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint16]

QUARTERS = 4
_ROW = 1024
# For each first quarter, what the upper two bits of four 16-bit numbers in one 64-bit word are.
_TURNS = np.array([sum((first + at) % 4 << 14 + 16 * at for at in range(4)) for first in range(4)], np.uint64)
_LOWER = np.uint64(0x3FFF_3FFF_3FFF_3FFF)


def numbers(seed: tuple[int, int, int], count: int) -> Numbers:
    """`count` numbers in units of 2^-16, each uniform in [0, 1) over the seeds: bit-identical on every platform.

    Philox4x64-10 (Salmon et al. 2011), counter-based, in numpy's promised-stable raw stream; 16 bits a number. There
    are whole rows of them, so more than `count`.
    """
    key = hashlib.blake2b(repr(seed).encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(-(-count // _ROW) * _ROW // 4)
    rows = words.reshape(-1, _ROW // 4)
    turns = _TURNS.take(rows[:, :1] >> np.uint64(14) & np.uint64(3))
    rows &= _LOWER
    rows |= turns
    return rows.astype("<u8", copy=False).view("<u2").reshape(-1)


def _places(drawn: Numbers, quarter: int) -> tuple[NDArray[np.int64], slice, NDArray[np.int64]]:
    """Where in [rows, 256, 4] the numbers of a quarter stand."""
    firsts = (drawn[::_ROW] >> 14).astype(np.int64)
    return np.arange(len(firsts)), slice(None), (quarter - firsts) % QUARTERS


def apart(symbols: NDArray[np.uint8], drawn: Numbers, zero: int) -> list[NDArray[np.uint8]]:
    """The flat `symbols`, filled up with `zero` to whole rows, quarter by quarter."""
    filled = np.full(len(drawn), zero, np.uint8)
    filled[: len(symbols)] = symbols
    rows = filled.reshape(-1, _ROW // QUARTERS, QUARTERS)
    return [rows[_places(drawn, quarter)].reshape(-1) for quarter in range(QUARTERS)]


def together(parts: NDArray[np.uint8], drawn: Numbers) -> NDArray[np.uint8]:
    """What `apart` took apart, from its parts one behind another."""
    rows = np.empty((len(drawn) // _ROW, _ROW // QUARTERS, QUARTERS), np.uint8)
    for quarter, part in enumerate(parts.reshape(QUARTERS, -1, _ROW // QUARTERS)):
        rows[_places(drawn, quarter)] = part
    return rows.reshape(-1)
