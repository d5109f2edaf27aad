"""Uniform quantisation with one step a tensor: float32 to symbols of 8 bits and back, and the few that don't fit.

Two kinds. *Unsigned* (no element negative, as behind a ReLU): symbol 0 is exact zero and nothing else, symbol k lies
from k-1 to k steps and is decoded to where such elements lie on average, near the middle; so the receiver knows which
elements are zero. *Signed*: symbol 127 is zero, 127 + q stands for q steps, rounded to nearest or with dither. Symbol
255 is an outlier in both, whose number of steps stands in a list of its own. Called by codecs/payload.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs import loops
from common.codecs.base import Support, Tensor
from common.codecs.dither import Numbers, Symbols
from common.codecs.loops import UNIT

Steps = NDArray[np.int32]

OUTLIER = 255
SIGNED_ZERO = 127
_NO_OUTLIERS = np.empty(0, np.int32)
_NO_NOISE = np.empty(0, np.uint16)
_BLOCK = 1 << 16


def step_of(flat: Tensor, snr: float, exact_zeros: bool) -> np.float32:
    """The step whose rounding noise, step^2/12 an element, lies `snr` dB below the tensor's power; 0 for zeros.

    `exact_zeros`: elements that are zero stay so and have no noise, so that the others may have more.
    """
    power, noisy = 0.0, 0 if exact_zeros else flat.size
    with np.errstate(over="ignore"):
        for at in range(0, flat.size, _BLOCK):
            part = flat[at : at + _BLOCK]
            power += float(np.dot(part, part))
            if exact_zeros:
                noisy += int(np.count_nonzero(part > 0))
    return _step(power, flat.size, noisy, snr, flat)


def step_within(flat: Tensor, support: Support, count: int, snr: float) -> np.float32:
    """The same of the `count` elements where `support` is true."""
    return _step(loops.power(flat, support.view(np.uint8)), count, count, snr, flat, support)


def _step(power: float, count: int, noisy: int, snr: float, flat: Tensor, support: Support | None = None) -> np.float32:
    if not 1e-30 < power / count < 1e30:  # float32 squares vanish below 1e-23 and overflow past 1e19
        power = float(np.square(flat if support is None else flat[support], dtype=np.float64).sum())
    with np.errstate(over="ignore"):  # such a step is refused for what it is
        return np.float32(np.sqrt(12 * power / max(1, noisy)) * 10 ** (-snr / 20))


def unsigned(tensor: Tensor, step: np.float32) -> tuple[Symbols, Steps, int]:
    """Symbols [C, B, rest] of `tensor` [B, C, rest], which has no element below zero; outliers in their order; where in
    its step an element lies on average, in 256ths, never so low as to be zero."""
    symbols, inverse = _symbols(tensor), np.float32(1) / step
    within = loops.unsigned(tensor, inverse, symbols)
    some = int(np.count_nonzero(symbols))
    level = max(16, min(255, int(256 * within / some))) if some else 128
    if symbols.max() < OUTLIER:
        return symbols, _NO_OUTLIERS, level
    values = _in_sending_order(tensor)[symbols == OUTLIER]
    return symbols, (np.floor(values * inverse) + 1).astype(np.int32), level


def signed(tensor: Tensor, step: np.float32, noise: Numbers | None) -> tuple[Symbols, Steps]:
    """Symbols [C, B, rest] of `tensor` [B, C, rest], rounded to nearest or by `noise` (flat, in the symbols' order),
    and outliers."""
    symbols, inverse = _symbols(tensor), np.float32(1) / step
    loops.signed(tensor, inverse, _NO_NOISE if noise is None else noise, symbols)
    if symbols.max() < OUTLIER:
        return symbols, _NO_OUTLIERS
    return symbols, _outliers(_in_sending_order(tensor).reshape(-1), symbols, inverse, noise)


def signed_within(
    flat: Tensor, support: Support, count: int, step: np.float32, noise: Numbers | None
) -> tuple[Symbols, Steps]:
    """The same of the `count` elements where `support` is true, all flat and in the order of memory (which gathers
    faster and comes out no larger)."""
    symbols, inverse = np.empty(count, np.uint8), np.float32(1) / step
    loops.signed_within(flat, support.view(np.uint8), inverse, _NO_NOISE if noise is None else noise, symbols)
    if symbols.max() < OUTLIER:
        return symbols, _NO_OUTLIERS
    return symbols, _outliers(flat[support], symbols, inverse, noise)


def _outliers(values: Tensor, symbols: Symbols, inverse: np.float32, noise: Numbers | None) -> Steps:
    far = np.flatnonzero(symbols.reshape(-1) == OUTLIER)
    steps = values[far] * inverse
    steps += np.float32(0.5) if noise is None else noise[far] * UNIT
    # What lies at the edge within float32's rounding is an outlier, so it is to be one of the outliers' steps.
    steps = np.where(steps < 0, np.minimum(np.floor(steps), -128), np.maximum(np.floor(steps), 128))
    return steps.astype(np.int32)


def restore_unsigned(symbols: Symbols, outliers: Steps, step: np.float32, level: int, out: Tensor) -> None:
    """Values `level` 256ths into the steps of symbols [C, B, rest], into `out` [B, C, rest]."""
    below = np.float32(1 - level / 256)
    loops.restore_unsigned(symbols, step, below, out)
    if len(outliers):
        _in_sending_order(out)[symbols == OUTLIER] = (outliers - float(below)) * float(step)


def restore_signed(symbols: Symbols, outliers: Steps, step: np.float32, noise: Numbers | None, out: Tensor) -> None:
    """The values of symbols [C, B, rest], with the `noise` that was added taken off again, into `out` [B, C, rest]."""
    loops.restore_signed(symbols, step, _NO_NOISE if noise is None else noise, out)
    if len(outliers):
        _in_sending_order(out)[symbols == OUTLIER] = _far_values(symbols, outliers, step, noise)


def restore_within(
    symbols: Symbols, outliers: Steps, step: np.float32, noise: Numbers | None, support: Support, out: Tensor
) -> None:
    """The same of flat symbols of the elements where `support` is true, into the flat `out`; zeros elsewhere."""
    loops.restore_within(symbols, step, _NO_NOISE if noise is None else noise, support.view(np.uint8), out)
    if len(outliers):
        out[np.flatnonzero(support)[symbols == OUTLIER]] = _far_values(symbols, outliers, step, noise)


def _far_values(symbols: Symbols, outliers: Steps, step: np.float32, noise: Numbers | None) -> Tensor:
    steps = outliers.astype(np.float32)
    if noise is not None:
        steps += np.float32(0.5)
        steps -= noise[: symbols.size][symbols.reshape(-1) == OUTLIER] * UNIT
    return steps * step


def _symbols(tensor: Tensor) -> Symbols:
    batch, channels, rest = tensor.shape
    return np.empty((channels, batch, rest), np.uint8)


def _in_sending_order(tensor: Tensor) -> Tensor:
    """A view [C, B, rest]: channels are alike in themselves."""
    return tensor.transpose(1, 0, 2)
