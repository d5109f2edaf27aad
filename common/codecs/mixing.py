"""The coder of codec `context`: a symbol is a few yes or no questions, each asked with a probability that was learned.

The magnitude at a place is predicted by a weighted sum of what is around it, in its channel and in those most like it;
the weights learn from each error (normalised least mean squares). Prediction, neighbours and how far off predictions
were of late choose a probability in each of six tables; a mixture of the six, with weights that learn too, codes the
answer (logistic mixing, as in lpaq; Mahoney 2005), and the answer moves them all. So no table is sent, small tensors
cost no more than large ones, and both sides stay alike as long as they compute alike: integers only.

All of it is in this one file (codecs/compiled.py says why). Called by codecs/context.py.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from common.codecs.compiled import kept

Array = NDArray[Any]

PARENTS = 16  # channels that each is predicted from
PAD = 2  # places around a plane that its neighbours may lie in
_NEAR, _IN_PARENT = 6, 9  # neighbours in the channel itself; the place and those around it in each parent
# Inputs: neighbours, averages, parents, of which the first channels have fewer.
_AVERAGES, _FIRST = _NEAR, _NEAR + 4
_INPUTS = _FIRST + _IN_PARENT * PARENTS
_BEST = 6  # parents whose sum is a context
_MODELS, _CONTEXTS, _QUESTIONS = 6, 4096, 32
_ZERO, _SIGN, _MORE, _AGAINST, _FIRST_BIT, _BITS = 0, 1, 1, 8, 15, 25  # numbers of the questions
_CLASSES = 9  # magnitudes 1, 2, 3-4, 5-8, ... 129-256
_MOST = 255 * 16  # predictions are in sixteenths
_SURE = 255  # answers after which a probability moves no slower
_WHOLE = 0xFFFFFFFF


def _squash(x: int) -> int:
    """4096 / (1 + exp(-x / 256)) for x from -2048 to 2047, between points that are given (Mahoney)."""
    points = (1, 2, 3, 6, 10, 16, 27, 45, 73, 120, 194, 310, 488, 747, 1101, 1546, 2047, 2549, 2994, 3348, 3607, 3785,
              3901, 3975, 4022, 4050, 4068, 4079, 4085, 4089, 4092, 4093, 4094)  # fmt: skip
    at, beyond = divmod(x + 2048, 128)
    return (points[at] * (128 - beyond) + points[at + 1] * beyond + 64) >> 7


_SQUASHED = np.array([_squash(x) for x in range(-2048, 2048)], np.int16)
_STRETCHED = (np.searchsorted(_SQUASHED, np.arange(4096)) - 2048).clip(-2047, 2047).astype(np.int16)  # its inverse
_RATES = np.array([655360 // (10 * answers + 16) for answers in range(_SURE + 1)], np.int32)
# A number's place on a logarithmic scale, three steps an octave, up to 31.
_LOG = np.array([min(31, (number**3).bit_length()) for number in range(4096)], np.uint8)


# An array that is handed to a function takes seven arguments, unless the function becomes part of its caller.
_inner = numba.njit(nogil=True, forceinline=True, error_model="numpy")


@_inner
def _log(number):
    return np.int64(_LOG[np.uint64(min(number, 4095))])


@_inner
def _probability(tables, weights, bases, question, stretched):
    """Of a yes, in 4096ths: what the models say, mixed."""
    total = np.int64(0)
    for model in range(_MODELS):
        entry = tables[np.uint64(bases[model] + question)]
        said = np.int32(_STRETCHED[np.uint64(entry >> np.uint32(20))])
        stretched[model] = said
        total += np.int64(weights[np.uint64(question * _MODELS + model)]) * np.int64(said)
    return np.int64(_SQUASHED[np.uint64(max(-2048, min(2047, total >> 16)) + 2048)])


@_inner
def _learn(tables, weights, bases, question, stretched, probability, yes):
    """Move the models and their weights towards the answer. A model's upper 22 bits are its probability, the others say
    how many answers it has seen."""
    error = np.int32(((yes << 12) - probability) * 6)
    goal = np.int64((1 << 22) - 1 if yes else 0)
    for model in range(_MODELS):
        own, place = np.uint64(question * _MODELS + model), np.uint64(bases[model] + question)
        weights[own] += np.int32(stretched[model] * error + np.int32(0x2000)) >> np.int32(14)
        entry = tables[place]
        answers = np.int64(entry & np.uint32(1023))
        value = np.int64(entry >> np.uint32(10))
        value += ((goal - value) * np.int64(_RATES[np.uint64(answers)])) >> 16
        tables[place] = np.uint32((value << 10) | min(answers + 1, _SURE))


@_inner
def _pass_through(low, high, read, passed, data, probability, yes, decoding):
    """Code an answer, or read it: a binary arithmetic coder (Witten, Neal, Cleary 1987). Its state: the interval's low
    end, its high end, the bits that are being read, and bytes passed, which may be more than `data` has room for."""
    middle = low + ((high - low) * probability >> 12)
    if decoding:
        yes = 1 if read <= middle else 0
    if yes:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> 24 == 0:
        if decoding:
            read = (read << 8 & _WHOLE) | (np.int64(data[passed]) if passed < len(data) else 0)
        elif passed < len(data):
            data[passed] = high >> 24
        passed += 1
        low = low << 8 & _WHOLE
        high = (high << 8 & _WHOLE) | 255
    return yes, low, high, read, passed


@_inner
def _class_of(magnitude):
    found, rest = 0, magnitude - 1
    if magnitude:
        found = 1
        while rest > 0:
            rest >>= 1
            found += 1
    return found


@_inner
def _code_symbol(tables, weights, bases, stretched, low, high, read, passed, data, symbol, signed, decoding):
    """Code `symbol`, steps away from zero, or read it: is it zero, its sign, how large a class its magnitude has, where
    in the class."""
    magnitude, negative = abs(symbol), 1 if symbol < 0 else 0
    wanted = _class_of(magnitude)
    klass, left, against, place = 0, -1, 0, 1
    question = _ZERO
    while True:
        if left >= 0:
            yes = (magnitude - 1) >> left & 1
        elif question == _SIGN:
            yes = negative
        else:
            yes = 1 if wanted > klass else 0
        probability = _probability(tables, weights, bases, question, stretched)
        yes, low, high, read, passed = _pass_through(low, high, read, passed, data, probability, yes, decoding)
        _learn(tables, weights, bases, question, stretched, probability, yes)
        if left >= 0:  # a bit of where in the class
            place = place << 1 | yes
            left -= 1
            if left < 0:
                magnitude = place + 1
                break
            question = _BITS + left
            continue
        if question == _ZERO:
            if not yes:
                magnitude = 0
                break
            klass = 1
            question = _SIGN if signed else _MORE + klass
            continue
        if question == _SIGN:
            negative = yes
            against = _AGAINST * yes
        else:
            klass += yes
            if not yes or klass == _CLASSES:
                if klass <= 2:
                    magnitude = klass
                    break
                left = klass - 3
                question = _FIRST_BIT + klass
                continue
        question = _MORE + klass + against
    return -magnitude if negative else magnitude, low, high, read, passed


@_inner
def _weigh(factors, inputs, count):
    """The weighted sum of the first `count` inputs, in 16384ths, and the sum of their squares."""
    total, energy = np.int32(0), np.int32(16)
    for i in range(count):
        total = np.int32(total + np.int32(factors[i] * inputs[i]))
        energy = np.int32(energy + np.int32(inputs[i] * inputs[i]))
    return total, energy


@_inner
def _adjust(factors, inputs, count, pull):
    """Move the weights by `pull` times the inputs."""
    for i in range(count):
        push = np.int32(np.int32(pull * inputs[i]) + np.int32(64)) >> np.int32(7)
        factors[i] = max(np.int32(-65000), min(np.int32(65000), np.int32(factors[i] + push)))


@_inner
def _around(inputs):
    """How large neighbours are, the best parent there, the two best parents there and about, and the best few there."""
    near = 2 * (abs(np.int64(inputs[0])) + abs(np.int64(inputs[1])))
    near += abs(np.int64(inputs[2])) + abs(np.int64(inputs[3]))
    best = abs(np.int64(inputs[_FIRST]))
    beside = 4 * best + 2 * abs(np.int64(inputs[_FIRST + _IN_PARENT]))
    for i in range(1, 5):
        beside += abs(np.int64(inputs[_FIRST + i]))
    some = np.int64(0)
    for i in range(_BEST):
        some += abs(np.int64(inputs[_FIRST + _IN_PARENT * i]))
    return near, best, beside, some


@_inner
def _bases(bases, inputs, size, doubt, signed):
    """Which entry of each model a symbol without dither is coded with: by the `size` that is expected, with the doubt
    of it and finer without, by what neighbours and the best parent are, and by the best parents."""
    near, best, beside, some = _around(inputs)
    bases[0] = _log(size) * 32 + doubt
    bases[1] = (min(abs(np.int64(inputs[0])), 15) * 16 + min(abs(np.int64(inputs[1])), 15)) * 16 + min(best, 15)
    bases[2] = min(255, (size + 4) >> 3) * 8 + (doubt >> 2)
    if signed:
        bases[3] = _log(beside) * 32 + _log(near)
    else:
        bases[3] = min(best, 31) * 32 + min(np.int64(inputs[_FIRST + _IN_PARENT]), 31)
    bases[4] = min(_CONTEXTS - 1, (size + 1) >> 1)
    bases[5] = min(some, 63) * 32 + _log(near)
    _stretch(bases)


@_inner
def _bases_of_noise(bases, inputs, size, channel, busy, usual, level):
    """The same with dither, each entry by the `level` of the number drawn too: how large neighbours, parents and what
    is expected are, how `busy` the picture is, how large symbols at this place and in this channel."""
    near, _, beside, some = _around(inputs)
    bases[0] = (_log(beside) >> 1) * 16 + (_log(near) >> 1)
    bases[1] = (usual >> 1) * 16 + (busy >> 1)
    bases[2] = _log(size) * 8 + (busy >> 2)
    bases[3] = (channel & 31) * 8 + (busy >> 2)
    bases[4] = min(511, size >> 1)
    bases[5] = _log(some) * 16 + (_log(near) >> 1)
    for model in range(_MODELS):
        bases[model] = bases[model] * 8 + level
    _stretch(bases)


@_inner
def _stretch(bases):
    """From numbers of contexts to where the models' entries for them begin."""
    for model in range(_MODELS):
        bases[model] = (model * _CONTEXTS + bases[model]) * _QUESTIONS


@_inner
def _replicate(values, first, height, width):
    """Fill the pads around a plane with what lies at its edges."""
    across = width + 2 * PAD
    for row in range(height + 2 * PAD):
        source = first + min(max(row, PAD), height + PAD - 1) * across
        line = first + row * across
        for column in range(PAD, width + PAD):
            values[line + column] = values[source + column]
        for column in range(PAD):
            values[line + column] = values[source + PAD]
            values[line + width + PAD + column] = values[source + width + PAD - 1]


@_inner
def _offsets(around, wrong, parents, channel, size, across):
    """How far the inputs lie from a place, and the errors of its parents there; a channel has `size` values. How many
    parents there are."""
    around[0], around[1], around[2], around[3], around[4], around[5] = (
        -1, -across, -across - 1, -across + 1, -2, -2 * across
    )  # fmt: skip
    known = min(channel, PARENTS)
    for at in range(known):
        there = (parents[channel, at] - channel) * size
        wrong[at] = there
        first = _FIRST + _IN_PARENT * at
        around[first], around[first + 1], around[first + 2] = there, there - 1, there + 1
        around[first + 3], around[first + 4] = there - across, there + across
        around[first + 5], around[first + 6] = there - across - 1, there - across + 1
        around[first + 7], around[first + 8] = there + across - 1, there + across + 1
    return known


@kept("i8(u1[::1], UniTuple(i8, 4), i8, u1[::1], u1[::1], u1[:, ::1], u1[::1], b1)", error_model="numpy")
def code(symbols, shape, zero, mask, drawn, parents, data, decoding):
    """Code `symbols` (uint8, flat) of maps [C, B, H, W] into `data`, or decode them from it, those alone where `mask`
    is not 0. Bytes passed; -1 where `data` is too small, or holds what cannot be.

    `drawn`: the numbers that dithered, in 16ths of their range; empty, as `mask` may be, where there are none.
    `parents` [C, PARENTS]: channels before each one that are like it, best first.
    """
    channels, pictures, height, width = shape
    across = width + 2 * PAD
    plane = (height + 2 * PAD) * across
    size = pictures * plane
    signed, dithered, masked = zero != 0, len(drawn) > 0, len(mask) > 0
    by_value = signed and not dithered  # else magnitudes are predicted: dither makes noise of the signs
    slow = 12 if dithered else 14  # the larger, the faster weights move
    values = np.zeros(channels * size, np.int16)
    wrong = np.zeros(channels * size, np.uint8)
    by_place, by_picture = np.zeros(height * width, np.int32), np.zeros(pictures, np.int32)
    tables = np.full(_CONTEXTS * _QUESTIONS * _MODELS, 1 << 31, np.uint32)
    weights = np.full(_QUESTIONS * _MODELS, 18000, np.int32)
    bases, stretched = np.zeros(_MODELS, np.int64), np.zeros(_MODELS, np.int32)
    factors, inputs = np.zeros(_INPUTS, np.int32), np.zeros(_INPUTS, np.int32)
    factors[0] = factors[1] = 6400
    around, behind = np.zeros(_INPUTS, np.int64), np.zeros(PARENTS, np.int64)
    low, high, read, passed = 0, _WHOLE, 0, 0
    if decoding:
        for at in range(4):
            read = read << 8 | (np.int64(data[at]) if at < len(data) else 0)
        passed = 4
    at = -1
    for channel in range(channels):
        of_channel = np.int32(0)
        known = _offsets(around, behind, parents, channel, size, across)
        count = _FIRST + _IN_PARENT * known
        for picture in range(pictures):
            first = channel * size + picture * plane
            if picture:  # above the first row stands that of the picture before
                for column in range(across):
                    values[first + across + column] = values[first - plane + PAD * across + column]
            for row in range(height):
                line = first + (row + PAD) * across
                values[line] = values[line + 1] = values[line - across + PAD]
                values[line - 2] = values[line - 1] = values[line - 3]
                for column in range(width):
                    at += 1
                    here = line + PAD + column
                    for i in range(_NEAR):
                        inputs[i] = values[np.uint64(here + around[i])]
                    for i in range(_FIRST, count):
                        inputs[i] = values[np.uint64(here + around[i])]
                    spot = np.uint64(row * width + column)
                    if not by_value:
                        inputs[_AVERAGES] = 4
                        inputs[_AVERAGES + 1] = by_place[spot] >> np.int32(14)
                        inputs[_AVERAGES + 2] = by_picture[picture] >> np.int32(14)
                        inputs[_AVERAGES + 3] = of_channel >> np.int32(14)
                    total, energy = _weigh(factors, inputs, count)
                    expected = max(-_MOST if by_value else 0, min(_MOST, np.int64(total) >> 10))
                    if masked and not mask[np.uint64(at)]:
                        values[np.uint64(here)] = (expected + 8) >> 4
                        continue
                    turned = by_value and expected < 0
                    if dithered:
                        # As if all numbers drawn lay in the upper half: the signs of the others are turned.
                        level = np.int64(drawn[np.uint64(at)])
                        turned = level < 8
                        busy = _log(np.int64(by_picture[picture]) >> 6)
                        usual = _log(np.int64(by_place[spot]) >> 6)
                        _bases_of_noise(
                            bases, inputs, expected, channel, busy, usual, 7 - level if turned else level - 8
                        )
                    else:
                        off = 4 * (np.int64(wrong[here - 1]) + np.int64(wrong[here - across]))
                        off += 2 * (np.int64(wrong[here - across - 1]) + np.int64(wrong[here - across + 1]))
                        for i in range(known):
                            off += np.int64(wrong[np.uint64(here + behind[i])])
                        _bases(bases, inputs, abs(expected), _log(off), signed)
                    found = np.int64(0)
                    if not decoding:
                        found = np.int64(symbols[np.uint64(at)]) - zero
                    if turned:
                        found = -found
                    found, low, high, read, passed = _code_symbol(
                        tables, weights, bases, stretched, low, high, read, passed, data, found, signed, decoding
                    )
                    if turned:
                        found = -found
                    if not 0 <= found + zero <= 255:
                        return -1
                    if decoding:
                        symbols[np.uint64(at)] = found + zero
                    magnitude = abs(found)
                    value = found if by_value else magnitude
                    values[np.uint64(here)] = value
                    error = 16 * value - expected
                    wrong[np.uint64(here)] = min(255, abs(error) >> 3)
                    _adjust(factors, inputs, count, np.int32((error << slow) // np.int64(energy)))
                    if not by_value:
                        large = np.int32(magnitude << 16)
                        by_place[spot] += np.int32(large - by_place[spot]) >> np.int32(4)
                        by_picture[picture] += np.int32(large - by_picture[picture]) >> np.int32(5)
                        of_channel += np.int32(large - of_channel) >> np.int32(8)
            _replicate(values, first, height, width)
            if not decoding and passed > len(data):
                return -1
    if not decoding:
        for _ in range(4):
            if passed >= len(data):
                return -1
            data[passed] = low >> 24
            low = low << 8 & _WHOLE
            passed += 1
    return passed
