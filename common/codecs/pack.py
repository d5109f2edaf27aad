"""Symbols to bytes by zstd, several symbols a byte where most of them are near zero.

zstd's Huffman code spends at least one bit a symbol, too much where most are zero. So the symbols near zero become
digits of two or four bits and several of them one byte, which is coded as one; the others are escapes, in a list
behind. How many digits are best is tried on a sample, for each tensor anew. Called by codecs/step.py.
"""

from __future__ import annotations

import struct

import numpy as np

from common.codecs import frame
from common.codecs.base import Buffer
from common.codecs.quantise import Symbols
from common.errors import CodecError

# Digits a byte, and the word that so many symbols fill; the highest digit is the escape. One a byte is the symbol.
_WORDS = {1: "u1", 2: "<u2", 4: "<u4"}
_TOGETHER = {2: 1 << 8 | 1 << 4, 4: 1 << 24 | 1 << 18 | 1 << 12 | 1 << 6}
# An eighth of the symbols is tried, from so many places, within these bounds.
_FEW, _MANY, _PIECES = 1 << 12, 1 << 15, 8
# More digits a byte must earn what they cost in time.
_WORTHWHILE = 0.98
# Symbols handled at once, so that they stay in the cache.
_BLOCK = 1 << 17
_HEADER = struct.Struct("<BI")  # digits a byte, escapes


def _escape(digits: int) -> int:
    return (1 << 8 // digits) - 1


def _lowest(digits: int, zero: int) -> int:
    """The symbol of digit 0: the digits lie evenly around `zero`, or from it upwards where it is 0."""
    return max(0, zero - (_escape(digits) - 1) // 2)


def _split(symbols: Symbols, digits: int, zero: int) -> tuple[Symbols, Symbols]:
    """Bytes of `digits` digits each, and the symbols that are none."""
    if digits == 1:
        return symbols, symbols[:0]
    escape, lowest = np.uint8(_escape(digits)), np.uint8(_lowest(digits, zero))
    packed = np.empty(-(-len(symbols) // digits), np.uint8)
    escapes = [symbols[:0]]
    for at in range(0, len(symbols), _BLOCK):
        part = symbols[at : at + _BLOCK]
        padded = np.zeros(-(-len(part) // digits) * digits, np.uint8)
        body = padded[: len(part)]
        # Symbols below the lowest wrap round to large ones, and become escapes like those above.
        np.minimum(np.subtract(part, lowest, out=body) if lowest else part, escape, out=body)
        escapes.append(part.take(np.flatnonzero(body == escape)))
        # The digits stand a byte apart in a word; multiplying draws them together in its highest byte.
        words = padded.view(_WORDS[digits])
        words *= words.dtype.type(_TOGETHER[digits])
        words >>= words.dtype.type(8 * digits - 8)
        packed[at // digits : at // digits + len(words)] = words
    return packed, np.concatenate(escapes)


def _sample(parts: list[Symbols]) -> Symbols:
    """Some symbols of each part, from all over it."""
    size = max(_FEW, min(_MANY, sum(map(len, parts)) // 8)) // len(parts)
    piece, pieces = size // _PIECES, []
    for part in parts:
        if len(part) <= size:
            pieces.append(part)
        else:
            last = len(part) - piece
            pieces += [part[start : start + piece] for start in range(0, last + 1, last // (_PIECES - 1))]
    return np.concatenate(pieces)


def _best(parts: list[Symbols], zero: int) -> int:
    """The number of digits a byte that makes a sample smallest."""
    sample = _sample(parts)
    sizes = {digits: len(_compressed([sample], digits, zero)[0]) for digits in _WORDS}
    best = min(sizes, key=sizes.__getitem__)
    return best if sizes[best] < sizes[1] * _WORTHWHILE else 1


def _compressed(parts: list[Symbols], digits: int, zero: int, tail: bytes = b"") -> tuple[bytes, int]:
    """The frame, and how many escapes are in it."""
    packed, escapes = zip(*(_split(part, digits, zero) for part in parts), strict=True)
    rest = b"".join((*escapes, tail))
    return frame.compress(*packed, *([rest] if rest else [])), len(rest) - len(tail)


def encode(parts: list[Symbols], zero: int, tail: bytes = b"") -> bytes:
    """Bytes of flat symbols, most of which are near `zero`, and of `tail`, which is small.

    Each part is coded by itself; all are of one size, which four divides if there are several.
    """
    digits = _best(parts, zero)
    data, escapes = _compressed(parts, digits, zero, tail)
    return _HEADER.pack(digits, escapes) + data


def decode(data: Buffer, count: int, zero: int, tail: int) -> tuple[Symbols, bytes]:
    """`count` symbols of all parts and `tail` bytes; CodecError where `data` holds anything else."""
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise CodecError("the symbols' header is cut short")
    digits, escaped = _HEADER.unpack_from(view)
    if digits not in _WORDS or escaped > (count if digits > 1 else 0):
        raise CodecError(f"{escaped} escapes at {digits} digits a byte do not fit {count} symbols")
    size = -(-count // digits)
    body = np.frombuffer(frame.decompress(view[_HEADER.size :], size + escaped + tail), np.uint8)
    packed, escapes, rest = body[:size], body[size : size + escaped], body[size + escaped :].tobytes()
    if digits == 1:
        return packed, rest
    bits = 8 // digits
    # A byte's digits all at once, from a table of 256 words.
    table = (np.arange(256)[:, None] >> bits * np.arange(digits) & _escape(digits)).astype(np.uint8)
    symbols = table.view(_WORDS[digits]).reshape(-1).take(packed).view(np.uint8)[:count]
    places = np.flatnonzero(symbols == _escape(digits))
    if len(places) != escaped:
        raise CodecError(f"{escaped} escapes were announced and {len(places)} came")
    symbols += np.uint8(_lowest(digits, zero))
    symbols[places] = escapes
    return symbols, rest
