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
OUTLIER = np.uint8(255)  # the symbol of what has none; codecs/quantise.py says what it means
UNIT = np.float32(2**-16)  # of the numbers that dither
_HALF = np.float32(0.5)  # the dither that rounds to nearest
_BLOCK = 4096  # elements that one loop takes from another, so that they never leave the cache; eight divide it
# Times this, eight bytes that are 0 or 1 become the sums of each and those below it.
_SUMS = np.uint64(0x0101010101010101)
_ONE, _EIGHT, _BYTE = np.uint64(1), np.uint64(8), np.uint64(255)  # numba adds nothing signed to what is unsigned
# For each first quarter, what the upper two bits of four 16-bit numbers in one 64-bit word are.
_TURNS = np.array([sum((first + at) % 4 << 14 + 16 * at for at in range(4)) for first in range(4)], np.uint64)


@numba.njit(nogil=True)
def _pick(source: Array, chosen: Array, into: Array) -> int:
    """Those of `source` where `chosen` is 1, which is 0 elsewhere, to the front of `into`, which is no shorter; how
    many they are."""
    # Element by element where each goes waits for the one before; so eight places come from one multiplication.
    count, whole = np.uint64(0), len(source) // 8 * 8
    words = chosen[:whole].view(np.uint64)
    for word in range(np.uint64(len(words))):
        sums, first = words[word], word * _EIGHT
        if sums == 0:
            continue
        sums *= _SUMS
        into[count] = source[first]
        for at in range(_ONE, _EIGHT):
            into[count + (sums & _BYTE)] = source[first + at]
            sums >>= _EIGHT
        count += sums
    for at in range(np.uint64(whole), np.uint64(len(source))):
        into[count] = source[at]
        count += np.uint64(chosen[at])
    return count


@numba.njit(nogil=True)
def _put(source: Array, chosen: Array, into: Array) -> int:
    """The opposite: `source`, which is one longer than is needed, to where `chosen` is 1 in `into`."""
    count, whole = np.uint64(0), len(into) // 8 * 8
    words = chosen[:whole].view(np.uint64)
    for word in range(np.uint64(len(words))):
        sums, first = words[word], word * _EIGHT
        if sums == 0:
            continue
        sums, before = sums * _SUMS, np.uint64(0)
        for at in range(first, first + _EIGHT):
            # A choice between two values that are there is no branch, which no processor could foretell.
            value, old = source[count + before], into[at]
            into[at] = value if chosen[at] else old
            before = sums & _BYTE
            sums >>= _EIGHT
        count += before
    for at in range(np.uint64(whole), np.uint64(len(into))):
        value, old = source[count], into[at]
        into[at] = value if chosen[at] else old
        count += np.uint64(chosen[at])
    return count


@numba.njit(nogil=True)
def _outlying(symbols: Array, places: Array) -> bool:
    """Whether there is an outlier; then `places` is 1 there and 0 elsewhere."""
    most = np.uint8(0)
    for at in range(len(symbols)):
        most = max(most, symbols[at])
    if most < OUTLIER:
        return False
    for at in range(len(symbols)):
        places[at] = symbols[at] == OUTLIER
    return True


@numba.njit(nogil=True)
def _symbol(steps: float, dither: float) -> int:
    """The symbol of so many steps: floor(x + 1/2) is nearest, floor(x + dither) up as often as makes the mean right."""
    # One step too high at first, so that truncating is the floor; what is then below zero is a very large uint32.
    whole = np.int32(steps + dither + np.float32(128))
    return np.uint8(min(np.uint32(whole - np.int32(1)), np.uint32(255)))


@numba.njit(nogil=True)
def _steps(symbol: int, dither: float) -> float:
    """Where a symbol lies, in steps, with the dither that was added taken off again."""
    return np.float32(symbol) - np.float32(127) + np.float32(0.5) - dither


@kept("Tuple((f8, i8, u4, u4))(f4[::1], u1[::1])", fastmath={"reassoc"})  # sums may be in any order
def survey(tensor: Array, mask: Array) -> tuple[float, int, int, int]:
    """The sum of squares where `mask`, unless it is empty, is 1 (Inf where one is too large for float32); how many
    elements are not zero; the largest of their bits without and with the sign, which comes first and so is large."""
    bits, total, some, most, signed = tensor.view(np.uint32), 0.0, 0, np.uint32(0), np.uint32(0)
    for first in range(0, len(tensor), _BLOCK):
        values, words, part = tensor[first : first + _BLOCK], bits[first : first + _BLOCK], np.float32(0)
        if len(mask):
            chosen = mask[first : first + _BLOCK]
            for at in range(len(values)):
                value = values[at] * np.float32(chosen[at])
                part += value * value
        else:
            for at in range(len(values)):
                part += values[at] * values[at]
        total += part
        block = np.uint32(0)
        for at in range(len(words)):
            size = np.uint32(words[at] & np.uint32(0x7FFF_FFFF))
            block = np.uint32(block + np.uint32(size != 0))
            most = np.uint32(max(most, size))
            signed = np.uint32(max(signed, words[at]))
        some += block
    return total, some, most, signed


# With a view of each row, which counts its references, small rows would take four times as long.
@kept("f8(f4[:, :, ::1], f4, u1[:, :, ::1])", fastmath={"reassoc"})
def unsigned(tensor: Array, inverse: float, symbols: Array) -> float:
    """Symbols of elements that are rounded up to whole steps, 255 for outliers; the sum of how far elements lie into
    their steps."""
    batch, channels, rest = tensor.shape
    within = 0.0
    for channel in range(channels):
        for picture in range(batch):
            parts = np.float32(0)
            for at in range(rest):
                value = tensor[picture, channel, at]
                steps = value * inverse
                whole = np.int32(steps)
                parts += steps - np.float32(whole)
                symbols[channel, picture, at] = np.uint8(min(whole + np.int32(value > 0), np.int32(255)))
            within += parts
    return within


@kept("void(f4[:, :, ::1], f4, u2[::1], u1[:, :, ::1])")
def signed(tensor: Array, inverse: float, drawn: Array, symbols: Array) -> None:
    """Symbols of elements rounded by `drawn`, in the order of sending, or to nearest where that is empty; 255 for
    outliers."""
    batch, channels, rest = tensor.shape
    for channel in range(channels):
        for picture in range(batch):
            first = (channel * batch + picture) * rest
            if len(drawn):
                for at in range(rest):
                    dither = np.float32(drawn[first + at]) * UNIT
                    symbols[channel, picture, at] = _symbol(tensor[picture, channel, at] * inverse, dither)
            else:
                for at in range(rest):
                    symbols[channel, picture, at] = _symbol(tensor[picture, channel, at] * inverse, _HALF)


@kept("i8(f4[:, :, ::1], u1[:, :, ::1], f4[::1])")
def outliers(tensor: Array, symbols: Array, far: Array) -> int:
    """The elements whose symbols say that they are outliers, to the front of `far`; how many they are."""
    batch, channels, rest = tensor.shape
    found, places = 0, np.empty(rest, np.uint8)
    for channel in range(channels):
        for picture in range(batch):
            if _outlying(symbols[channel, picture], places):
                found += np.int64(_pick(tensor[picture, channel], places, far[found:]))
    return found


@kept("i8(f4[::1], u1[::1], f4, u2[::1], u1[::1], f4[::1])")
def signed_within(tensor: Array, mask: Array, inverse: float, drawn: Array, symbols: Array, far: Array) -> int:
    """As `signed` and `outliers`, of the elements where `mask` is 1, in the order of memory."""
    values, places = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.uint8)
    done, outliers = 0, 0
    for first in range(0, len(tensor), _BLOCK):
        count = np.int64(_pick(tensor[first : first + _BLOCK], mask[first : first + _BLOCK], values))
        target = symbols[done : done + count]
        numbers = drawn[done : done + count]
        if len(drawn):
            for at in range(count):
                target[at] = _symbol(values[at] * inverse, np.float32(numbers[at]) * UNIT)
        else:
            for at in range(count):
                target[at] = _symbol(values[at] * inverse, _HALF)
        if _outlying(target, places):
            outliers += np.int64(_pick(values[:count], places, far[outliers:]))
        done += count
    return outliers


@kept("void(u1[:, :, ::1], f4, f4, f4[:, :, ::1])")
def restore_unsigned(symbols: Array, step: float, below: float, tensor: Array) -> None:
    """`below` steps under the upper ends of the symbols' steps."""
    batch, channels, rest = tensor.shape
    under = below * step
    for channel in range(channels):
        for picture in range(batch):
            for at in range(rest):
                upper = np.float32(symbols[channel, picture, at]) * step
                tensor[picture, channel, at] = max(upper - under, np.float32(0))


@kept("void(u1[:, :, ::1], f4, u2[::1], f4[:, :, ::1])")
def restore_signed(symbols: Array, step: float, drawn: Array, tensor: Array) -> None:
    """The symbols' values, with the `drawn` that was added taken off again."""
    batch, channels, rest = tensor.shape
    for channel in range(channels):
        for picture in range(batch):
            first = (channel * batch + picture) * rest
            if len(drawn):
                for at in range(rest):
                    dither = np.float32(drawn[first + at]) * UNIT
                    tensor[picture, channel, at] = _steps(symbols[channel, picture, at], dither) * step
            else:
                for at in range(rest):
                    tensor[picture, channel, at] = _steps(symbols[channel, picture, at], _HALF) * step


@kept("void(u1[:, :, ::1], f4[::1], f4[:, :, ::1])")
def restore_outliers(symbols: Array, far: Array, tensor: Array) -> None:
    """`far`, which is one longer than is needed, to where the symbols say that there are outliers."""
    batch, channels, rest = tensor.shape
    found, places = 0, np.empty(rest, np.uint8)
    for channel in range(channels):
        for picture in range(batch):
            if _outlying(symbols[channel, picture], places):
                found += np.int64(_put(far[found:], places, tensor[picture, channel]))


@kept("void(u1[::1], f4, u2[::1], u1[::1], f4[::1], f4[::1])")
def restore_within(symbols: Array, step: float, drawn: Array, mask: Array, far: Array, tensor: Array) -> None:
    """As `restore_signed` and `restore_outliers`, of symbols of the elements where `mask` is 1; zeros where it is 0."""
    values, places = np.empty(_BLOCK + 1, np.float32), np.empty(_BLOCK, np.uint8)
    done, outliers = 0, 0
    for first in range(0, len(tensor), _BLOCK):
        chosen, target, count = mask[first : first + _BLOCK], tensor[first : first + _BLOCK], 0
        for at in range(len(chosen)):
            count += np.int64(chosen[at])
        source = symbols[done : done + count]
        numbers = drawn[done : done + count]
        if len(drawn):
            for at in range(count):
                values[at] = _steps(source[at], np.float32(numbers[at]) * UNIT) * step
        else:
            for at in range(count):
                values[at] = _steps(source[at], _HALF) * step
        if _outlying(source, places):
            outliers += np.int64(_put(far[outliers:], places, values[:count]))
        target[:] = 0
        _put(values, chosen, target)
        done += count


@kept("void(u8, u8[::1])")
def draw(start: int, words: Array) -> None:
    """SplitMix64 from `start`, four numbers of 16 bits a word; of four in a row one lies in each quarter of the range,
    and which begins is drawn for each row of 256 words."""
    state = start
    for row in range(0, len(words), 256):
        part, turn = words[row : row + 256], np.uint64(0)
        for at in range(len(part)):
            state += np.uint64(0x9E3779B97F4A7C15)
            word = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ word >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            word ^= word >> np.uint64(31)
            if at == 0:
                turn = _TURNS[word >> np.uint64(14) & np.uint64(3)]
            part[at] = word & np.uint64(0x3FFF_3FFF_3FFF_3FFF) | turn


@kept("void(u1[::1], u2[::1], u1[:, ::1])")
def apart(symbols: Array, drawn: Array, parts: Array) -> None:
    """Symbols, of which there are whole rows of 1024, to the four rows of `parts` by the quarter of the range in which
    their numbers lie."""
    for row in range(len(symbols) // 1024):
        words, first = symbols[1024 * row : 1024 * (row + 1)].view(np.uint32), np.uint32(drawn[1024 * row] >> 14)
        for quarter in range(4):
            shift = np.uint32(8) * (np.uint32(quarter) - first & np.uint32(3))
            part = parts[quarter, 256 * row : 256 * (row + 1)]
            for place in range(256):
                part[place] = np.uint8(words[place] >> shift)


@kept("void(u1[:, ::1], u2[::1], u1[::1])")
def together(parts: Array, drawn: Array, symbols: Array) -> None:
    """The opposite."""
    for row in range(len(symbols) // 1024):
        words, first = symbols[1024 * row : 1024 * (row + 1)].view(np.uint32), np.uint32(drawn[1024 * row] >> 14)
        words[:] = 0
        for quarter in range(4):
            shift = np.uint32(8) * (np.uint32(quarter) - first & np.uint32(3))
            part = parts[quarter, 256 * row : 256 * (row + 1)]
            for place in range(256):
                words[place] |= np.uint32(part[place]) << shift


@kept("i8(u1[::1], i8, u1, u1[::1], u1[::1])")
def split(symbols: Array, digits: int, lowest: int, packed: Array, escapes: Array) -> int:
    """Bytes of two or four digits, the highest of which is an escape, and the symbols that are none to the front of
    `escapes`, which is no shorter than `symbols`; how many those are."""
    near, places = np.empty(_BLOCK, np.uint8), np.empty(_BLOCK, np.uint8)
    count, escape = 0, np.uint8(15 if digits == 2 else 3)
    for first in range(0, len(symbols), _BLOCK):
        source = symbols[first : first + _BLOCK]
        target = packed[first // digits : (first + len(source) + digits - 1) // digits]
        for at in range(len(source)):
            near[at] = min(np.uint8(source[at] - lowest), escape)
            places[at] = near[at] == escape
        near[len(source) :] = 0
        if digits == 4:
            fours = near.view(np.uint32)
            for at in range(len(target)):
                word = fours[at]
                target[at] = np.uint8(word | word >> np.uint32(6) | word >> np.uint32(12) | word >> np.uint32(18))
        else:
            twos = near.view(np.uint16)
            for at in range(len(target)):
                target[at] = np.uint8(twos[at] | twos[at] >> np.uint16(4))
        count += np.int64(_pick(source, places, escapes[count:]))
    return count


@kept("void(u1[::1], u1, u1, u1[::1])")
def fill(symbols: Array, escape: int, lowest: int, escapes: Array) -> None:
    """Digits to symbols: those that are `escape` become the escapes in turn, which are one more than are needed."""
    places, count = np.empty(_BLOCK, np.uint8), 0
    for first in range(0, len(symbols), _BLOCK):
        part = symbols[first : first + _BLOCK]
        for at in range(len(part)):
            places[at] = part[at] == escape
            part[at] += lowest
        count += np.int64(_put(escapes[count:], places, part))
