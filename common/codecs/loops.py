"""The compiled loops of codec `step`: each goes once over a tensor where numpy would go three to eight times.

Tensors are [B, C, rest] in the order of memory, symbols [C, B, rest] in the order of sending. Nothing is checked here:
the callers in codecs/quantise.py, codecs/pack.py and codecs/dither.py hand over arrays that fit.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from common.codecs.compiled import kept

Array = NDArray[Any]
UNIT = np.float32(2**-16)  # of the numbers that dither
_BLOCK = 4096  # elements that are gathered before they are quantised, so that they never leave the cache
# For each first quarter, what the upper two bits of four 16-bit numbers in one 64-bit word are.
_TURNS = np.array([sum((first + at) % 4 << 14 + 16 * at for at in range(4)) for first in range(4)], np.uint64)


@numba.njit(nogil=True)
def _round(values: Array, inverse: float, noise: Array, symbols: Array) -> None:
    """Symbols of as many values as there is room for, by `noise`, or to nearest where that is empty."""
    # floor(x + 1/2) is nearest; floor(x + noise) goes up with the probability that makes the mean right. One step too
    # high at first, so that truncating is the floor; what is then below zero is a very large uint32.
    if len(noise):
        for at in range(len(symbols)):
            whole = np.int32(values[at] * inverse + np.float32(noise[at]) * UNIT + np.float32(128))
            symbols[at] = np.uint8(min(np.uint32(whole - np.int32(1)), np.uint32(255)))
    else:
        for at in range(len(symbols)):
            whole = np.int32(values[at] * inverse + np.float32(0.5) + np.float32(128))
            symbols[at] = np.uint8(min(np.uint32(whole - np.int32(1)), np.uint32(255)))


@numba.njit(nogil=True)
def _restore(symbols: Array, step: float, noise: Array, values: Array) -> None:
    """The values of symbols, with the `noise` that was added taken off again."""
    if len(noise):
        for at in range(len(symbols)):
            steps = np.float32(symbols[at]) - np.float32(127) + np.float32(0.5) - np.float32(noise[at]) * UNIT
            values[at] = steps * step
    else:
        for at in range(len(symbols)):
            values[at] = (np.float32(symbols[at]) - np.float32(127)) * step


@kept("f8(f4[:, :, ::1], f4, u1[:, :, ::1])", fastmath={"reassoc"})  # sums may be in any order
def unsigned(tensor: Array, inverse: float, symbols: Array) -> float:
    """Symbols of elements that are rounded up to whole steps, 255 for outliers; the sum of how far elements lie into
    their steps."""
    batch, channels, rest = tensor.shape
    within = 0.0
    for channel in range(channels):
        for picture in range(batch):
            source, target = tensor[picture, channel], symbols[channel, picture]
            parts = np.float32(0)
            for at in range(rest):
                steps = source[at] * inverse
                whole = np.int32(steps)
                parts += steps - np.float32(whole)
                target[at] = np.uint8(min(whole + np.int32(source[at] > 0), np.int32(255)))
            within += parts
    return within


@kept("void(f4[:, :, ::1], f4, u2[::1], u1[:, :, ::1])")
def signed(tensor: Array, inverse: float, noise: Array, symbols: Array) -> None:
    """Symbols of elements rounded by `noise`, in the order of sending, or to nearest where that is empty; 255 for
    outliers."""
    batch, channels, rest = tensor.shape
    for channel in range(channels):
        for picture in range(batch):
            source, target = tensor[picture, channel], symbols[channel, picture]
            first = (channel * batch + picture) * rest
            _round(source, inverse, noise[first : first + rest], target)


@kept("f8(f4[::1], u1[::1])", fastmath={"reassoc"})
def power(tensor: Array, mask: Array) -> float:
    """The sum of squares where `mask` is 1; Inf where one is too large for float32."""
    total = 0.0
    for first in range(0, len(tensor), _BLOCK):
        part = np.float32(0)
        for at in range(first, min(first + _BLOCK, len(tensor))):
            value = tensor[at] * np.float32(mask[at])
            part += value * value
        total += part
    return total


@kept("void(f4[::1], u1[::1], f4, u2[::1], u1[::1])")
def signed_within(tensor: Array, mask: Array, inverse: float, noise: Array, symbols: Array) -> None:
    """As `signed`, of the elements where `mask` is 1, in the order of memory."""
    values, done = np.empty(_BLOCK, np.float32), 0
    for first in range(0, len(tensor), _BLOCK):
        count = np.uint64(0)
        for at in range(first, min(first + _BLOCK, len(tensor))):
            values[count] = tensor[at]
            count += np.uint64(mask[at])
        target = symbols[done : done + np.int64(count)]
        _round(values, inverse, noise[done : done + np.int64(count)], target)
        done += len(target)


@kept("void(u1[::1], f4, u2[::1], u1[::1], f4[::1])")
def restore_within(symbols: Array, step: float, noise: Array, mask: Array, tensor: Array) -> None:
    """As `restore_signed`, of symbols of the elements where `mask` is 1; zeros where it is 0."""
    values, done = np.empty(_BLOCK, np.float32), 0
    bits, into = values.view(np.uint32), tensor.view(np.uint32)
    for first in range(0, len(tensor), _BLOCK):
        end, count = min(first + _BLOCK, len(tensor)), 0
        for at in range(first, end):
            count += np.int64(mask[at])
        source = symbols[done : done + count]
        _restore(source, step, noise[done : done + count], values)
        done += len(source)
        place = np.uint64(0)
        for at in range(first, end):
            # A choice would become a branch, which no processor could foretell.
            into[at] = bits[place] * np.uint32(mask[at])
            place += np.uint64(mask[at])


@kept("void(u1[:, :, ::1], f4, f4, f4[:, :, ::1])")
def restore_unsigned(symbols: Array, step: float, below: float, tensor: Array) -> None:
    """`below` steps under the upper ends of the symbols' steps."""
    batch, channels, rest = tensor.shape
    under = below * step
    for channel in range(channels):
        for picture in range(batch):
            source, target = symbols[channel, picture], tensor[picture, channel]
            for at in range(rest):
                target[at] = max(np.float32(source[at]) * step - under, np.float32(0))


@kept("void(u1[:, :, ::1], f4, u2[::1], f4[:, :, ::1])")
def restore_signed(symbols: Array, step: float, noise: Array, tensor: Array) -> None:
    """The symbols' values, with the `noise` that was added taken off again."""
    batch, channels, rest = tensor.shape
    for channel in range(channels):
        for picture in range(batch):
            source, target = symbols[channel, picture], tensor[picture, channel]
            first = (channel * batch + picture) * rest
            _restore(source, step, noise[first : first + rest], target)


@kept("void(u8, u8[::1])")
def draw(start: int, words: Array) -> None:
    """SplitMix64 from `start`, four numbers of 16 bits a word; of four in a row one lies in each quarter of the range,
    and which begins is drawn for each row of 256 words."""
    for row in range(0, len(words), 256):
        turn = np.uint64(0)
        for at in range(row, min(row + 256, len(words))):
            word = start + np.uint64(at + 1) * np.uint64(0x9E3779B97F4A7C15)
            word = (word ^ word >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ word >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            word ^= word >> np.uint64(31)
            if at == row:
                turn = _TURNS[word >> np.uint64(14) & np.uint64(3)]
            words[at] = word & np.uint64(0x3FFF_3FFF_3FFF_3FFF) | turn


@kept("void(u1[::1], u1, u2[::1], u1[:, ::1])")
def apart(symbols: Array, zero: int, noise: Array, parts: Array) -> None:
    """Symbols whose numbers lie in each quarter of the range, filled up with `zero`, to the four rows of `parts`."""
    for row in range(len(noise) // 1024):
        start, first = 1024 * row, np.int64(noise[1024 * row] >> 14)
        for quarter in range(4):
            offset = start + (quarter - first & 3)
            for place in range(256):
                at = offset + 4 * place
                parts[quarter, 256 * row + place] = symbols[at] if at < len(symbols) else zero


@kept("void(u1[:, ::1], u2[::1], u1[::1])")
def together(parts: Array, noise: Array, symbols: Array) -> None:
    """The opposite, but for what was filled up."""
    for row in range(len(noise) // 1024):
        start, first = 1024 * row, np.int64(noise[1024 * row] >> 14)
        for quarter in range(4):
            offset = start + (quarter - first & 3)
            for place in range(min(256, (len(symbols) - offset + 3) // 4)):
                symbols[offset + 4 * place] = parts[quarter, 256 * row + place]


@kept("i8(u1[::1], i8, u1, u1[::1], u1[::1])")
def split(symbols: Array, digits: int, lowest: int, packed: Array, escapes: Array) -> int:
    """Bytes of two or four digits, the highest of which is an escape, and the symbols that are none to the front of
    `escapes`, which is one longer than there can be; how many those are."""
    count, escape = np.uint64(0), np.uint8(15 if digits == 2 else 3)
    whole = len(symbols) // digits
    if digits == 4:
        for at in range(whole):
            byte = np.uint8(0)
            for place in range(4):
                symbol = symbols[4 * at + place]
                digit = min(np.uint8(symbol - lowest), np.uint8(3))
                escapes[count] = symbol
                count += np.uint64(digit == 3)
                byte |= np.uint8(digit << np.uint8(2 * place))
            packed[at] = byte
    else:
        for at in range(whole):
            low, high = symbols[2 * at], symbols[2 * at + 1]
            lower, higher = min(np.uint8(low - lowest), np.uint8(15)), min(np.uint8(high - lowest), np.uint8(15))
            escapes[count] = low
            count += np.uint64(lower == 15)
            escapes[count] = high
            count += np.uint64(higher == 15)
            packed[at] = np.uint8(lower | higher << np.uint8(4))
    if whole < len(packed):
        byte = np.uint8(0)
        for place in range(len(symbols) - whole * digits):
            symbol = symbols[whole * digits + place]
            digit = min(np.uint8(symbol - lowest), escape)
            escapes[count] = symbol
            count += np.uint64(digit == escape)
            byte |= np.uint8(digit << np.uint8(8 // digits * place))
        packed[whole] = byte
    return np.int64(count)


@kept("void(u1[::1], u1, u1, u1[::1])")
def fill(symbols: Array, escape: int, lowest: int, escapes: Array) -> None:
    """Digits to symbols: those that are `escape` become the escapes in turn, which are one more than are needed."""
    count = np.uint64(0)
    for at in range(len(symbols)):
        digit = symbols[at]
        symbol = escapes[count]
        count += np.uint64(digit == escape)
        symbols[at] = symbol if digit == escape else np.uint8(digit + lowest)
