"""Range asymmetric numeral systems over many lanes at once: symbols to bits at almost their entropy, in numpy.

Each lane is a coder of its own (Duda, arXiv 1311.2540); a row of symbols, one a lane, is coded by a dozen vectorised
operations, and all lanes share one stream of 16-bit words (Giesen, arXiv 1402.3392). Integers only, so that both
sides agree on every platform. Encoding runs backwards, decoding forwards, a batch of symbols at a time, since the
contexts of a batch may depend on the batches before. Called by codecs/context.py.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Buffer
from common.errors import CodecError

Array = NDArray[Any]

PRECISION = 12  # frequencies of a table add up to 2^12
TOTAL = 1 << PRECISION
# States are kept from 2^16 up to 2^32 and shed or take 16 bits at a time.
_LOW = np.uint32(1 << 16)
_HEADER = struct.Struct("<I")  # words


def lanes(count: int) -> int:
    """Lanes for `count` symbols: more are faster, and each costs about three bytes."""
    return 1 << max(4, (count // 1536).bit_length() - 1)


class Tables:
    """Frequencies [contexts, 256] that add up to TOTAL in each context, in the forms that the coders need."""

    def __init__(self, frequencies: Array) -> None:
        self.frequencies = frequencies.astype(np.uint32).reshape(-1)
        starts = np.cumsum(frequencies, axis=1, dtype=np.uint32) - frequencies
        self.starts = starts.astype(np.uint32).reshape(-1)

    def slots(self) -> Array:
        """For each context and slot (0 to TOTAL - 1) in one word: frequency - 1, place within the symbol, symbol."""
        symbols = np.repeat(np.arange(len(self.frequencies), dtype=np.uint32), self.frequencies)
        place = np.arange(len(symbols), dtype=np.uint32) % TOTAL - self.starts[symbols]
        slots: Array = (self.frequencies[symbols] - 1) << 20 | place << 8 | symbols & 255
        return slots.astype(np.uint32, copy=False)


def encode(batches: list[tuple[Array, Array]], tables: Tables) -> bytes:
    """Bytes of batches of (symbols, their contexts), in the order in which they are to be decoded."""
    count = sum(len(symbols) for symbols, _ in batches)
    width = lanes(count)
    state = np.full(width, _LOW)
    shed: list[Array] = []
    for symbols, contexts in reversed(batches):
        index = contexts.astype(np.uint32) << 8
        index |= symbols
        frequencies, starts = tables.frequencies.take(index), tables.starts.take(index)
        spread = TOTAL - frequencies
        for at in range((len(symbols) - 1) // width * width, -1, -width):
            frequency = frequencies[at : at + width]
            x = state[: len(frequency)]
            full = np.flatnonzero((x >> 20) >= frequency)
            if len(full):
                heavy = x.take(full)
                shed.append(heavy.astype(np.uint16))  # the low 16 bits
                x[full] = heavy >> 16
            # x -> (x // f) * TOTAL + x % f + start
            x += x // frequency * spread[at : at + width]
            x += starts[at : at + width]
    words = np.concatenate(shed[::-1]) if shed else np.empty(0, np.uint16)
    return b"".join((_HEADER.pack(len(words)), state.astype("<u4").data, words.astype("<u2").data))


class Decoder:
    """Decodes batch by batch; `end` checks that the bytes held these symbols and no others."""

    def __init__(self, data: Buffer, count: int, tables: Tables) -> None:
        """`count`: symbols of all batches together."""
        width, view = lanes(count), memoryview(data)
        start = _HEADER.size + 4 * width
        if len(view) < start or len(view) != start + 2 * _HEADER.unpack_from(view)[0]:
            raise CodecError(f"{len(view)} bytes of coded symbols came, not as many as they announce")
        self._state = np.frombuffer(view[_HEADER.size : start], "<u4").astype(np.uint32)
        self._words = np.frombuffer(view[start:], "<u2").astype(np.uint32)
        self._at = 0
        self._slots = tables.slots()

    def batch(self, contexts: Array) -> Array:
        """The next symbols, one for each of `contexts`."""
        state, words, slots = self._state, self._words, self._slots
        symbols = np.empty(len(contexts), np.uint8)
        base = contexts.astype(np.uint32) << PRECISION
        mask = np.uint32(TOTAL - 1)
        for at in range(0, len(contexts), len(state)):
            offset = base[at : at + len(state)]
            x = state[: len(offset)]
            found = slots.take((x & mask) | offset)
            symbols[at : at + len(state)] = found.astype(np.uint8)  # the low 8 bits
            x >>= PRECISION
            x *= (found >> 20) + np.uint32(1)
            x += found >> 8 & mask
            light = np.flatnonzero(x < _LOW)
            if len(light):
                taken = words[self._at : self._at + len(light)]
                if len(taken) < len(light):
                    raise CodecError("the coded symbols end too early")
                x[light] = x.take(light) << 16 | taken
                self._at += len(light)
        return symbols

    def end(self) -> None:
        if self._at != len(self._words) or np.any(self._state != _LOW):
            raise CodecError("the coded symbols do not end where they should: they are damaged")
