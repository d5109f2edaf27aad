"""Symbols to bytes with what is around them as context: fewer bytes than zstd, at a fraction of its speed.

The magnitude of each symbol is predicted (codecs/predict.py). The prediction, how far off it may be and, where rounding
was dithered, whether the number drawn lies near the middle or near an end of its range choose one of up to 144 tables:
rANS codes the symbol with the frequencies that it had there in this tensor. Weights, borders and tables are sent along.
Integers only. Called by codecs/step.py.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.codecs import frame, predict, rans
from common.codecs.base import Buffer, Support
from common.codecs.predict import MOST, PARENTS, Predictor, Shape
from common.codecs.quantise import OUTLIER, Symbols
from common.errors import CodecError

Array = NDArray[Any]

# Levels of doubt, groups of predictions in each; parents of a channel; bytes of the frame with all but the symbols.
_HEADER = struct.Struct("<BBBI")
_DOUBTS = 1 << 12  # more than any doubt
_LEVELS, _GROUPS = 6, 12
# Magnitudes of signed symbols are predicted in eighths.
_FINER = 8
# From so many symbols on tables are worth what they cost; an entry takes about so many bits; what it is judged by.
_PLENTY, _TABLE_BITS, _SAMPLE = 1 << 19, 10, 1 << 15
_CHANNELS, _SMALLEST = 128, 16
# Elements of a channel that pay for weights of its own: of activations, and of gradients, which are less alike.
_WORTHWHILE = {False: 1 << 12, True: 1 << 14}


def _planes(shape: Shape, signed: bool) -> Shape:
    """Maps [C, B, H, W] as they are predicted: tiny ones side by side, and channels one from the other where there are
    not too many for bounded time and each is large enough to pay for weights of its own; else all as one."""
    channels, pictures, height, width = shape
    if height * width < _SMALLEST:
        return 1, 1, channels, pictures * height * width
    if channels <= _CHANNELS and pictures * height * width >= _WORTHWHILE[signed]:
        return shape
    return 1, channels * pictures, height, width


def _most(count: int, signed: bool) -> tuple[int, int]:
    """Levels of doubt and of predictions for so many symbols: each table costs some 20 to 40 bytes."""
    if signed:
        return 1, max(1, min(2 * _GROUPS, count >> 12))
    return max(1, min(_LEVELS, count >> 13)), max(1, min(_GROUPS, count >> 14))


def _magnitudes(symbols: Symbols, zero: int) -> Symbols:
    if not zero:
        return symbols
    steps = np.abs(symbols.astype(np.int16) - np.int16(zero))
    return np.minimum(steps * np.int16(_FINER), 255).astype(np.uint8)


def _borders(histogram: Array, number: int) -> Array:
    """Borders (uint16) between `number` groups of about as many values each, of which `histogram` counts them."""
    before = np.cumsum(histogram)
    return np.searchsorted(before, np.arange(1, number) * int(before[-1]) // number, "right").astype(np.uint16)


def _starts(between: Array) -> Array:
    """For each doubt where its level starts in a table of (level, prediction)."""
    return np.searchsorted(between, np.arange(_DOUBTS), "right").astype(np.int32) * (MOST + 1)


class _Contexts:
    """Which table a symbol is coded with, by borders of doubt [levels - 1] and of predictions [levels, groups - 1]."""

    def __init__(self, between: Array, within: Array) -> None:
        levels, groups = within.shape[0], within.shape[1] + 1
        self.number = 2 * levels * groups
        self._starts = _starts(between)
        rows = [np.searchsorted(borders, np.arange(MOST + 1), "right") for borders in within]
        self._tables = np.concatenate([2 * (groups * level + row) for level, row in enumerate(rows)]).astype(np.uint8)

    def of(self, values: Array, doubts: Array, quarters: Array | None) -> Array:
        """Odd where the number drawn is in the middle half of its range, so that the symbol is zero more probably."""
        found: Array = self._tables.take(self._starts.take(doubts) + values)
        if quarters is not None:
            found += (quarters + np.uint8(1)) >> np.uint8(1) & np.uint8(1)
        return found


def _turned(symbols: Symbols, quarters: Array | None) -> Symbols:
    """Symbols as if all numbers drawn lay in the upper half: signs of the others are turned, but not of outliers."""
    return symbols if quarters is None else np.where(quarters < 2, np.uint8(OUTLIER - 1) - symbols, symbols)


def _taken(part: Array | None, chosen: Array | None) -> Any:
    """A pass's places flat, or the `chosen` ones of them."""
    return None if part is None else part.reshape(-1) if chosen is None else part.reshape(-1).take(chosen)


def _model(
    maps: Symbols, zero: int, support: Support | None, quarters: Array | None
) -> tuple[list[tuple[Array, Array]], int, tuple[int, int, int], tuple[Array, ...]]:
    """(symbols, contexts) of each pass in order; how many contexts; levels, groups, parents; what is sent of these."""
    signed = bool(zero)
    shape = _planes(maps.shape, signed)
    maps = maps.reshape(shape)
    support, quarters = (None if part is None else part.reshape(shape) for part in (support, quarters))
    magnitudes = _magnitudes(maps, zero)
    parents = predict.likest(magnitudes, PARENTS)
    predictor = Predictor(shape, parents)
    weights: list[Array] = []
    found: list[tuple[Symbols, Array, Array, Array | None]] = []
    for channel, step in predict.passes(shape):
        truth = step.places(magnitudes[channel])
        mask, drawn = (None if plane is None else step.places(plane[channel]) for plane in (support, quarters))
        weights.append(predictor.fit(channel, step, truth, mask))
        values, doubts = predictor.predict(channel, step, weights[-1])
        chosen = None if mask is None else np.flatnonzero(mask)
        predictor.learn(channel, step, truth.reshape(-1), values, doubts, chosen)
        parts = (step.places(maps[channel]), values, doubts, drawn)
        found.append(tuple(_taken(part, chosen) for part in parts))
    most = _most(maps.size, signed)
    sent, all_values, all_doubts = (np.concatenate([parts[at] for parts in found]) for at in (0, 1, 2))
    sizes = most if len(sent) >= _PLENTY else _cheapest(most, sent, all_values, all_doubts)
    between, within = _grouped(all_values, all_doubts, sizes)
    contexts = _Contexts(between, within)
    batches = [
        (_turned(symbols, drawn), contexts.of(values, doubts, drawn)) for symbols, values, doubts, drawn in found
    ]
    return (
        batches,
        contexts.number,
        (*sizes, parents.shape[1]),
        (parents, between, within, np.concatenate(weights)),
    )


def _grouped(values: Array, doubts: Array, sizes: tuple[int, int]) -> tuple[Array, Array]:
    """Borders of doubt and of predictions that make so many levels of so many groups."""
    levels, groups = sizes
    between = _borders(np.bincount(doubts, minlength=_DOUBTS), levels)
    histograms = np.bincount(_starts(between).take(doubts) + values, minlength=levels * (MOST + 1))
    return between, np.stack([_borders(row, groups) for row in histograms.reshape(levels, MOST + 1)])


def _cheapest(most: tuple[int, int], symbols: Symbols, values: Array, doubts: Array) -> tuple[int, int]:
    """How many levels and groups come to the fewest bytes, by a sample: tables may cost more than they save."""
    thin = max(1, len(symbols) // _SAMPLE)
    some = symbols[::thin], values[::thin], doubts[::thin]
    fewer = dict.fromkeys((max(1, most[0] >> at), max(1, most[1] >> at)) for at in range(6))
    return min(fewer, key=lambda sizes: _cost(*some, sizes, thin))


def _cost(symbols: Symbols, values: Array, doubts: Array, sizes: tuple[int, int], thin: int) -> float:
    """About how many bits symbols, of which one in `thin` is given, and tables take; the numbers drawn are left out."""
    contexts = _Contexts(*_grouped(values, doubts, sizes))
    counts = _counts([(symbols, contexts.of(values, doubts, None))], contexts.number)
    return thin * _entropy(counts) + _TABLE_BITS * 2 * np.count_nonzero(counts)


def _counts(batches: list[tuple[Array, Array]], tables: int) -> Array:
    """How often each symbol comes in each context [tables, 256]."""
    counts = np.zeros(tables * 256, np.int64)
    for symbols, contexts in batches:
        counts += np.bincount(contexts.astype(np.uint16) << 8 | symbols, minlength=len(counts))
    return counts.reshape(tables, 256)


def _entropy(counts: Array) -> float:
    """Bits of symbols that come so often in each context [contexts, 256]."""
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return float(-np.sum(counts * np.log2(np.maximum(counts, 1) / totals)))


def _frequencies(counts: Array) -> Array:
    """Counts [contexts, 256] as frequencies that add up to rans.TOTAL, at least 1 where a symbol occurs."""
    counts[counts.sum(axis=1) == 0, 0] = 1  # a context that never occurs still needs a table that is one
    present = counts > 0
    spare = rans.TOTAL - present.sum(axis=1, keepdims=True)
    result = counts * spare // counts.sum(axis=1, keepdims=True) + present
    rows = np.arange(len(counts))
    result[rows, counts.argmax(axis=1)] += rans.TOTAL - result.sum(axis=1)
    return result.astype(np.uint32)


def ideal_bits(maps: Symbols, zero: int, support: Support | None = None, quarters: Array | None = None) -> float:
    """Bits that an ideal coder would take with these contexts, if what is sent to make them cost nothing."""
    batches, number, _, _ = _model(maps, zero, support, quarters)
    return _entropy(_counts(batches, number))


def encode(maps: Symbols, zero: int, support: Support | None = None, quarters: Array | None = None) -> bytes:
    """Bytes of symbols [C, B, H, W], most of which are near `zero`; of those alone where `support` is true, if given.

    `quarters`: in which quarter of its range the number that dithered each symbol lies.
    """
    batches, number, sizes, (parents, between, within, weights) = _model(maps, zero, support, quarters)
    frequencies = _frequencies(_counts(batches, number))
    borders = np.concatenate((between, within.reshape(-1))).astype("<u2").tobytes()
    # The low bytes of all frequencies, then the high ones: those are nearly all zero.
    low, high = frequencies.astype("<u2").reshape(-1, 1).view(np.uint8).T
    table = frame.compress(parents.tobytes() + borders, weights.tobytes(), low.tobytes(), high.tobytes())
    return b"".join((_HEADER.pack(*sizes, len(table)), table, rans.encode(batches, rans.Tables(frequencies))))


def decode(
    data: Buffer, shape: Shape, zero: int, support: Support | None = None, quarters: Array | None = None
) -> Symbols:
    """Symbols [C, B, H, W]; `zero` outside `support`. CodecError where `data` holds anything else."""
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise CodecError("the tables' header is cut short")
    levels, groups, ancestors, size = _HEADER.unpack_from(view)
    wanted = shape[0] * shape[1] * shape[2] * shape[3] if support is None else int(np.count_nonzero(support))
    most = _most(shape[0] * shape[1] * shape[2] * shape[3], bool(zero))
    if not (1 <= levels <= most[0] and 1 <= groups <= most[1] and ancestors <= PARENTS):
        raise CodecError(f"{levels} levels of {groups} contexts with {ancestors} parents came for {wanted} symbols")
    planes = _planes(shape, bool(zero))
    packed = view[_HEADER.size : _HEADER.size + size]
    parents, contexts, weights, frequencies = _tables(packed, planes, levels, groups, ancestors)
    decoder = rans.Decoder(view[_HEADER.size + size :], wanted, rans.Tables(frequencies))
    maps = np.full(planes, zero, np.uint8)
    support, quarters = (None if part is None else part.reshape(planes) for part in (support, quarters))
    predictor = Predictor(planes, parents)
    for (channel, step), factors in zip(predict.passes(planes), weights, strict=True):
        values, doubts = predictor.predict(channel, step, factors)
        places = step.places(maps[channel])
        mask, drawn = (None if plane is None else step.places(plane[channel]) for plane in (support, quarters))
        chosen = None if mask is None else np.flatnonzero(mask)
        drawn = _taken(drawn, chosen)
        coded = decoder.batch(contexts.of(_taken(values, chosen), _taken(doubts, chosen), drawn))
        symbols = np.full(len(values), zero, np.uint8)
        symbols[slice(None) if chosen is None else chosen] = _turned(coded, drawn)
        places[...] = symbols.reshape(places.shape)
        predictor.learn(channel, step, _magnitudes(symbols, zero), values, doubts, chosen)
    decoder.end()
    return maps.reshape(shape)


def _tables(
    packed: memoryview, planes: Shape, levels: int, groups: int, ancestors: int
) -> tuple[Array, _Contexts, list[Array], Array]:
    """Parents, contexts, the weights of each pass and frequencies [contexts, 256] that `encode` made."""
    between, within, lengths = levels - 1, levels * (groups - 1), predict.weights_of(planes, ancestors)
    number = 2 * levels * groups
    sizes = (ancestors * planes[0], 2 * (between + within), sum(lengths), 256 * number, 256 * number)
    body = np.frombuffer(frame.decompress(packed, sum(sizes)), np.uint8)
    lineage, borders, weights, low, high = np.split(body, np.cumsum(sizes)[:-1])
    parents, border = lineage.reshape(planes[0], ancestors), borders.view("<u2").astype(np.uint16)
    frequencies: Array = (low.astype(np.uint32) | high.astype(np.uint32) << 8).reshape(number, 256)
    late = np.maximum(np.arange(len(parents)), 1)[:, None]
    if np.any(parents >= late) or np.any(frequencies.sum(axis=1) != rans.TOTAL):
        raise CodecError("the tables of frequencies are damaged")
    contexts = _Contexts(border[:between], border[between:].reshape(levels, groups - 1))
    return parents, contexts, np.split(weights.view(np.int8), np.cumsum(lengths)[:-1]), frequencies
