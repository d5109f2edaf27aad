"""Uniform quantisation with one step a tensor: float32 to symbols of 8 bits and back, and the few that don't fit.

Two kinds. *Unsigned* (no element negative, as behind a ReLU): symbol 0 is exact zero and nothing else, symbol k lies
from k-1 to k steps and is decoded to where such elements lie on average, near the middle; so the receiver knows which
elements are zero. *Signed*: symbol 127 is zero, 127 + q stands for q steps, rounded to nearest or with dither. Symbol
255 is an outlier in both, whose number of steps stands in a list of its own. Called by codecs/payload.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.codecs import loops
from common.codecs.base import Mask, Tensor
from common.codecs.dither import Numbers, Symbols
from common.codecs.loops import UNIT

Steps = NDArray[np.int32]

OUTLIER = int(loops.OUTLIER)
SIGNED_ZERO = 127
_NONE = np.empty(0, np.float32)
_NOT_DRAWN, _NO_MASK = np.empty(0, np.uint16), np.empty(0, np.uint8)
_MINUS_ZERO = 0x8000_0000
_TOO_LARGE = 3e38  # for float32


class Survey(NamedTuple):
    """What one look at a tensor tells."""

    power: float  # the sum of squares of what is to be sent
    nonzero: int  # elements
    most: float  # the largest magnitude; Inf or NaN where there is one
    negative: bool  # whether an element is below zero


def survey(flat: Tensor, mask: Mask | None) -> Survey:
    power, nonzero, most, signed = loops.survey(flat, _NO_MASK if mask is None else mask.view(np.uint8))
    if flat.size and not 1e-30 < power / flat.size < 1e30:  # float32 squares vanish below 1e-23 and overflow past 1e19
        with np.errstate(over="ignore", invalid="ignore"):
            power = float(np.square(flat if mask is None else flat[mask], dtype=np.float64).sum())
    return Survey(power, nonzero, float(np.uint32(most).view(np.float32)), signed > _MINUS_ZERO)


def step_of(power: float, noisy: int, snr: float) -> np.float32:
    """The step whose rounding noise, step^2/12 on each of `noisy` elements, lies `snr` dB below `power`."""
    step = math.sqrt(12 * power / max(1, noisy)) * 10 ** (-snr / 20)
    return np.float32(step if step < _TOO_LARGE else math.inf)  # which is refused for what it is


def unsigned(tensor: Tensor, step: np.float32) -> tuple[Symbols, Steps, int]:
    """Symbols [C, B, rest] of `tensor` [B, C, rest], which has no element below zero; outliers in their order; where in
    its step an element lies on average, in 256ths, never so low as to be zero."""
    symbols, inverse = _symbols(tensor), np.float32(1) / step
    within = loops.unsigned(tensor, inverse, symbols)
    some = int(np.count_nonzero(symbols))
    level = max(16, min(255, int(256 * within / some))) if some else 128
    return symbols, (np.floor(_far(tensor, symbols) * inverse) + 1).astype(np.int32), level


def signed(tensor: Tensor, step: np.float32, drawn: Numbers | None) -> tuple[Symbols, Steps]:
    """Symbols [C, B, rest] of `tensor` [B, C, rest], rounded to nearest or by `drawn` (flat, in the symbols' order),
    and outliers."""
    symbols, inverse = _symbols(tensor), np.float32(1) / step
    loops.signed(tensor, inverse, _NOT_DRAWN if drawn is None else drawn, symbols)
    return symbols, _outliers(_far(tensor, symbols), symbols, inverse, drawn)


def signed_within(
    flat: Tensor, mask: Mask, count: int, step: np.float32, drawn: Numbers | None
) -> tuple[Symbols, Steps]:
    """The same of the `count` elements where `mask` is true, all flat and in the order of memory (which gathers
    faster and comes out no larger)."""
    symbols, inverse, far = np.empty(count, np.uint8), np.float32(1) / step, np.empty(count, np.float32)
    numbers = _NOT_DRAWN if drawn is None else drawn
    outliers = loops.signed_within(flat, mask.view(np.uint8), inverse, numbers, symbols, far)
    return symbols, _outliers(far[:outliers], symbols, inverse, drawn)


def _far(tensor: Tensor, symbols: Symbols) -> Tensor:
    """The elements of `tensor` [B, C, rest] that are outliers, in the order of symbols [C, B, rest]."""
    if symbols.max() < OUTLIER:
        return _NONE
    far = np.empty(symbols.size, np.float32)
    return far[: loops.outliers(tensor, symbols, far)]


def _outliers(far: Tensor, symbols: Symbols, inverse: np.float32, drawn: Numbers | None) -> Steps:
    steps = far * inverse
    if len(far):
        steps += np.float32(0.5) if drawn is None else drawn[_places(symbols)] * UNIT
    # What lies at the edge within float32's rounding is an outlier, so it is to be one of the outliers' steps.
    steps = np.where(steps < 0, np.minimum(np.floor(steps), -128), np.maximum(np.floor(steps), 128))
    return steps.astype(np.int32)


def restore_unsigned(symbols: Symbols, outliers: Steps, step: np.float32, level: int, out: Tensor) -> None:
    """Values `level` 256ths into the steps of symbols [C, B, rest], into `out` [B, C, rest]."""
    below = np.float32(1 - level / 256)
    loops.restore_unsigned(symbols, step, below, out)
    if len(outliers):
        far = (outliers - float(below)) * float(step)
        loops.restore_outliers(symbols, _one_longer(far.astype(np.float32)), out)


def restore_signed(symbols: Symbols, outliers: Steps, step: np.float32, drawn: Numbers | None, out: Tensor) -> None:
    """The values of symbols [C, B, rest], with the `drawn` that was added taken off again, into `out` [B, C, rest]."""
    loops.restore_signed(symbols, step, _NOT_DRAWN if drawn is None else drawn, out)
    if len(outliers):
        loops.restore_outliers(symbols, _far_values(symbols, outliers, step, drawn), out)


def restore_within(
    symbols: Symbols, outliers: Steps, step: np.float32, drawn: Numbers | None, mask: Mask, out: Tensor
) -> None:
    """The same of flat symbols of the elements where `mask` is true, into the flat `out`; zeros elsewhere."""
    far = _far_values(symbols, outliers, step, drawn)
    loops.restore_within(symbols, step, _NOT_DRAWN if drawn is None else drawn, mask.view(np.uint8), far, out)


def _far_values(symbols: Symbols, outliers: Steps, step: np.float32, drawn: Numbers | None) -> Tensor:
    """The outliers' values, one longer as the loops take them."""
    steps = outliers.astype(np.float32)
    if drawn is not None and len(outliers):
        steps += np.float32(0.5)
        steps -= drawn[_places(symbols)] * UNIT
    return _one_longer(steps * step)


def _places(symbols: Symbols) -> NDArray[np.intp]:
    """Where the outliers are, in the order of sending."""
    return np.flatnonzero(symbols.reshape(-1) == OUTLIER)


def _one_longer(far: Tensor) -> Tensor:
    return np.append(far, np.float32(0))


def _symbols(tensor: Tensor) -> Symbols:
    batch, channels, rest = tensor.shape
    return np.empty((channels, batch, rest), np.uint8)
