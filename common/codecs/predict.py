"""What the decoder can know of a symbol's magnitude beforehand: from its neighbours, and from other channels there.

Channels come one after another, each interlaced like a PNG: every fourth place both ways, then those in the middle of
four, then those between, and the same again a level finer. So all but the first have neighbours on all sides, and a
whole pass is handled at once. Each channel also sees the four channels before it that are most like it.

The prediction is a weighted sum; the sender fits the weights by least squares and sends them as small integers. All
products and sums are integers below 2^24, which float32 holds exactly: whatever order a BLAS adds them in, both sides
get the same on every platform. Called by codecs/context.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, int, int, int]  # channels, pictures, height, width

UNIT = 32  # predictions and weights are in this part of a symbol
MOST = 255 * UNIT
PARENTS = 4
_PAD = 3
_STRAIGHT, _CORNERS = ((-1, 0), (1, 0), (0, -1), (0, 1)), ((-1, -1), (-1, 1), (1, -1), (1, 1))
_BY_COLUMN = tuple((row, column) for row in (-1, 1) for column in (-3, 3)) + tuple(
    (row, column) for row in (-3, 3) for column in (-1, 1)
)
_BY_ROW = tuple((row, column) for row in (-1, 1) for column in (-2, 2)) + tuple(
    (row, column) for row in (-2, 2) for column in (-1, 1)
)
# Elements of a channel's pass that are predicted at once, and samples that weights are fitted to.
_SLAB, _SAMPLES = 1 << 14, 4096


@dataclass(frozen=True)
class Pass:
    """Every `every`th place from (row, column) on, with the places around that came in earlier passes."""

    row: int
    column: int
    every: int
    near: tuple[tuple[int, int], ...] = ()
    far: tuple[tuple[int, int], ...] = ()

    @property
    def fine(self) -> bool:
        return self.every == 2

    def places(self, maps: Array, row: int = 0, column: int = 0) -> Array:
        """The pass's places in maps [..., H, W], moved by row and column within a pad."""
        return maps[..., self.row + row :: self.every, self.column + column :: self.every]

    def inputs(self, parents: int) -> int:
        """How many weights it has."""
        return 1 + len(self.near) + len(self.far) + parents * (5 if self.fine else 1)


def _scaled(offsets: tuple[tuple[int, int], ...], by: int) -> tuple[tuple[int, int], ...]:
    return tuple((row * by, column * by) for row, column in offsets)


_PASSES = (
    Pass(0, 0, 4),
    Pass(2, 2, 4, _scaled(_CORNERS, 2)),
    Pass(0, 2, 4, _scaled(_STRAIGHT, 2)),
    Pass(2, 0, 4, _scaled(_STRAIGHT, 2)),
    Pass(1, 1, 2, _CORNERS, _BY_COLUMN),
    Pass(0, 1, 2, _STRAIGHT, _BY_ROW),
    Pass(1, 0, 2, _STRAIGHT, _CORNERS),
)


def passes(shape: Shape) -> Iterator[tuple[int, Pass]]:
    """(channel, pass) in coding order, without those that have no place."""
    present = [step for step in _PASSES if step.row < shape[2] and step.column < shape[3]]
    return ((channel, step) for channel in range(shape[0]) for step in present)


def weights_of(shape: Shape, parents: int) -> list[int]:
    """How many weights each pass has, in coding order."""
    return [step.inputs(min(channel, parents)) for channel, step in passes(shape)]


def likest(magnitudes: Array, number: int) -> Array:
    """For each channel of magnitudes [C, ...] the channels before it that are most like it [C, number], best first."""
    channels = len(magnitudes)
    flat = magnitudes.reshape(channels, -1)
    some = flat[:, :: max(1, flat.shape[1] // (2 * _SAMPLES)) | 1].astype(np.float64)
    some -= some.mean(axis=1, keepdims=True)
    some /= np.maximum(np.sqrt(np.square(some).sum(axis=1, keepdims=True)), 1e-9)
    alike = np.abs(some @ some.T)
    parents = np.zeros((channels, number), np.uint8)
    for channel in range(1, channels):
        best = np.argsort(-alike[channel, :channel], kind="stable")[:number]
        parents[channel, : len(best)] = best
    return parents


def _mirrored(size: int, pad: int) -> Array:
    """Where in a padded line of `size` its pads are copied from."""
    outside = np.concatenate((np.arange(-pad, 0), np.arange(size, size + pad)))
    return np.clip(size - 1 - np.abs(size - 1 - np.abs(outside)), 0, size - 1) + pad


class Predictor:
    """Holds what is known of magnitudes [C, B, H, W]; passes must come in order, on both sides alike."""

    def __init__(self, shape: Shape, parents: Array) -> None:
        channels, pictures, height, width = shape
        self._parents = [row[:channel] for channel, row in enumerate(parents)]
        self._values = np.zeros(shape, np.uint8)
        self._errors = np.zeros(shape, np.uint8)
        padded = (pictures, height + 2 * _PAD, width + 2 * _PAD)
        # The current channel's, and its parents' values, with pads around that mirror them.
        self._own, self._own_errors = np.zeros(padded, np.uint8), np.zeros(padded, np.uint8)
        self._others = np.zeros((len(self._parents[-1]), *padded), np.uint8)
        self._lines = [(np.r_[:_PAD, size + _PAD : size + 2 * _PAD], _mirrored(size, _PAD)) for size in (height, width)]
        self._channel = -1

    def _mirror(self, padded: Array) -> None:
        (rows, row_sources), (columns, column_sources) = self._lines
        padded[:, rows] = padded[:, row_sources]
        padded[:, :, columns] = padded[:, :, column_sources]

    def _inner(self, padded: Array) -> Array:
        return padded[..., _PAD:-_PAD, _PAD:-_PAD]

    def _begin(self, channel: int) -> None:
        self._channel = channel
        self._own[...] = 0
        self._own_errors[...] = 0
        for other, parent in zip(self._others, self._parents[channel], strict=False):
            self._inner(other)[...] = self._values[parent]
            self._mirror(other)

    def _moved(self, padded: Array, step: Pass, row: int = 0, column: int = 0) -> Array:
        """What lies (row, column) from each place of a pass."""
        height, width = padded.shape[-2] - _PAD, padded.shape[-1] - _PAD
        return padded[
            ...,
            _PAD + step.row + row : height + row : step.every,
            _PAD + step.column + column : width + column : step.every,
        ]

    def inputs(self, channel: int, step: Pass, pictures: slice) -> Array:
        """What the weights are for [inputs, places], as float32 that are integers."""
        if channel != self._channel:
            self._begin(channel)
        own, others = self._own[pictures], self._others[: len(self._parents[channel]), pictures]
        parts = [self._moved(own, step, *offset) for offset in step.near + step.far]
        for other in others:
            parts += [self._moved(other, step, *offset) for offset in ((0, 0), *(_STRAIGHT if step.fine else ()))]
        shape = self._moved(own, step).shape
        rows = np.empty((1 + len(parts), *shape), np.float32)
        rows[0] = 1
        for row, part in zip(rows[1:], parts, strict=True):
            row[...] = part
        return rows.reshape(len(rows), -1)

    def fit(self, channel: int, step: Pass, truth: Array, support: Array | None) -> Array:
        """Weights (int8) for a pass whose magnitudes [B, h, w] the sender knows; only `support` [B, h, w] counts."""
        some = slice(None, None, max(1, truth.size // _SAMPLES))
        rows, wanted = self.inputs(channel, step, some), truth[some].reshape(-1)
        thin = slice(None, None, max(1, wanted.size // _SAMPLES) | 1)
        rows, wanted = rows[:, thin].astype(np.float64), wanted[thin].astype(np.float64)
        if support is not None:
            chosen = np.flatnonzero(support[some].reshape(-1)[thin])
            rows, wanted = rows[:, chosen], wanted[chosen]
        square = rows @ rows.T
        square[np.diag_indices(len(square))] += 1 + 0.002 * rows.shape[1]
        return np.clip(np.rint(np.linalg.solve(square, rows @ wanted) * UNIT), -127, 127).astype(np.int8)

    def predict(self, channel: int, step: Pass, weights: Array) -> tuple[Array, Array]:
        """For each place of a pass the prediction, up to MOST, and how far off it may be: both uint16."""
        factors = weights.astype(np.float32)
        size = max(1, _SLAB // max(1, self._moved(self._own[:1], step).size))
        slabs = [
            factors @ self.inputs(channel, step, slice(at, at + size)) for at in range(0, len(self._own), size)
        ]  # fmt: skip
        values = np.clip(np.concatenate(slabs), 0, MOST).astype(np.uint16)
        return values, self._doubt(channel, step, values)

    def _doubt(self, channel: int, step: Pass, values: Array) -> Array:
        parents = self._parents[channel]
        near, across = np.zeros((2, *self._moved(self._own, step).shape), np.uint16)
        for offset in step.near:
            near += self._moved(self._own_errors, step, *offset)
        for parent in parents:
            across += step.places(self._errors[parent])
        if 0 < len(parents) < PARENTS:
            across = across * np.uint16(PARENTS) // np.uint16(len(parents))
        if not len(parents):
            across = near
        elif not step.near:
            near = across
        return (near * np.uint16(2) + across).reshape(-1) + (values >> np.uint16(4))

    def learn(
        self, channel: int, step: Pass, magnitudes: Array, values: Array, doubt: Array, chosen: Array | None
    ) -> None:
        """Take in a pass's magnitudes [places]; of those not `chosen`, which nobody sends, the prediction is kept."""
        expected = (values + np.uint16(UNIT // 2)) // np.uint16(UNIT)
        known, errors = expected.astype(np.uint8), np.minimum(doubt >> 4, 255).astype(np.uint8)
        off = np.abs(magnitudes.astype(np.int16) - expected.astype(np.int16)).astype(np.uint8)
        if chosen is None:
            known, errors = magnitudes, off
        else:
            known[chosen] = magnitudes.take(chosen)
            errors[chosen] = off.take(chosen)
        for padded, plane, new in ((self._own, self._values, known), (self._own_errors, self._errors, errors)):
            places = step.places(self._inner(padded))
            places[...] = new.reshape(places.shape)
            step.places(plane[channel])[...] = places
            self._mirror(padded)
