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

from common.codecs import loops

Numbers = NDArray[np.uint16]
Symbols = NDArray[np.uint8]

QUARTERS = 4
_ROW = 1024


def numbers(seed: tuple[int, int, int], count: int) -> Numbers:
    """`count` numbers in units of 2^-16, each uniform in [0, 1) over the seeds: bit-identical on every platform.

    SplitMix64 (Steele, Lea, Flood 2014), a counter and a hash of it, in integers alone; 16 bits a number. There are
    whole rows of them, so more than `count`.
    """
    start = int.from_bytes(hashlib.blake2b(repr(seed).encode(), digest_size=8).digest(), "little")
    words = np.empty(-(-count // _ROW) * _ROW // 4, np.uint64)
    loops.draw(np.uint64(start), words)
    return words.view(np.uint16)  # the first is a word's lowest: processors that torch is built for are little-endian


def apart(symbols: Symbols, drawn: Numbers, zero: int) -> list[Symbols]:
    """The flat `symbols`, filled up with `zero` to whole rows, quarter by quarter."""
    whole = np.full(len(drawn), zero, np.uint8)
    whole[: len(symbols)] = symbols
    parts = np.empty((QUARTERS, len(drawn) // QUARTERS), np.uint8)
    loops.apart(whole, drawn, parts)
    return list(parts)


def together(parts: Symbols, drawn: Numbers, count: int) -> Symbols:
    """The first `count` symbols of those that `apart` took apart, from its parts one behind another."""
    symbols = np.empty(len(drawn), np.uint8)
    loops.together(parts.reshape(QUARTERS, -1), drawn, symbols)
    return symbols[:count]
