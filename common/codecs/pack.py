"""Symbols to bytes by zstd, several symbols a byte because most of them are near zero.

zstd's Huffman code spends at least one bit a symbol, too much where most are zero, and its matches are worth nothing in
noise. So the symbols near zero become digits of two or four bits and several of them one byte, which is coded as one;
the others are escapes, in a list behind. Called by codecs/payload.py.
"""

from __future__ import annotations

import struct

import numpy as np

from common.codecs import frame, loops
from common.codecs.base import Buffer
from common.codecs.quantise import Symbols
from common.errors import CodecError

# Digits a byte, and the word that so many symbols fill; the highest digit is the escape.
_WORDS = {2: "<u2", 4: "<u4"}
# Four digits a byte are smaller, by up to 10 %, where no more symbols than this are escapes; two, by up to 5 %, where
# more are. One was never best from 5 to 30 dB. (Of the tensors that `make bench-codec` measures.)
_FEW_ESCAPES = 0.4
_HEADER = struct.Struct("<BI")  # digits a byte, escapes


def _escape(digits: int) -> int:
    return (1 << 8 // digits) - 1


def _lowest(digits: int, zero: int) -> int:
    """The symbol of digit 0: the digits lie evenly around `zero`, or from it upwards where it is 0."""
    return max(0, zero - (_escape(digits) - 1) // 2)


def _split(parts: list[Symbols], digits: int, zero: int) -> tuple[list[Symbols], list[bytes]]:
    """Of each part the bytes of `digits` digits each, and the symbols that are none."""
    packed = [np.empty(-(-len(part) // digits), np.uint8) for part in parts]
    escapes = [np.empty(len(part), np.uint8) for part in parts]
    lowest = _lowest(digits, zero)
    counts = [loops.split(part, digits, lowest, *into) for part, *into in zip(parts, packed, escapes, strict=True)]
    return packed, [part[:count].tobytes() for part, count in zip(escapes, counts, strict=True)]


def encode(parts: list[Symbols], zero: int, listed: bytes = b"") -> bytes:
    """Bytes of flat symbols, most of which are near `zero`, and of `listed`, which is small.

    Each part is coded by itself; all are of one size, which four divides if there are several.
    """
    digits = 4
    packed, escapes = _split(parts, digits, zero)
    if sum(map(len, escapes)) > _FEW_ESCAPES * sum(map(len, parts)):
        digits = 2
        packed, escapes = _split(parts, digits, zero)
    rest = b"".join((*escapes, listed))
    return _HEADER.pack(digits, len(rest) - len(listed)) + frame.compress(*packed, *([rest] if rest else []))


def decode(data: Buffer, count: int, zero: int, listed: int) -> tuple[Symbols, bytes]:
    """`count` symbols of all parts and `listed` bytes; CodecError where `data` holds anything else."""
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise CodecError("the symbols' header is cut short")
    digits, escaped = _HEADER.unpack_from(view)
    if digits not in _WORDS or escaped > count:
        raise CodecError(f"{escaped} escapes at {digits} digits a byte do not fit {count} symbols")
    size, bits = -(-count // digits), 8 // digits
    body = np.frombuffer(frame.decompress(view[_HEADER.size :], size + escaped + listed), np.uint8)
    packed, escapes, rest = body[:size], body[size : size + escaped], body[size + escaped :].tobytes()
    # A byte's digits all at once, from a table of 256 words.
    table = (np.arange(256)[:, None] >> bits * np.arange(digits) & _escape(digits)).astype(np.uint8)
    symbols = table.view(_WORDS[digits]).reshape(-1).take(packed).view(np.uint8)[:count]
    if np.count_nonzero(symbols == _escape(digits)) != escaped:
        raise CodecError(f"{escaped} escapes were announced, and others came")
    loops.fill(symbols, _escape(digits), _lowest(digits, zero), np.append(escapes, np.uint8(0)))
    return symbols, rest
