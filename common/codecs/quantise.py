"""Uniform quantisation with one step a tensor: float32 to symbols of 8 bits and back, and the few that don't fit.

Two kinds. *Unsigned* (no element negative, as behind a ReLU): symbol 0 is exact zero and nothing else, symbol k lies
from k-1 to k steps and is decoded to where such elements lie on average, near the middle; so the receiver knows which
elements are zero. *Signed*: symbol 127 is zero, 127 + q stands for q steps, rounded to nearest or with dither. Symbol
255 is an outlier in both, whose number of steps stands in a list of its own. Pure numpy; called by codecs/step.py.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Tensor
from common.codecs.dither import Numbers

Symbols = NDArray[np.uint8]
Steps = NDArray[np.int32]

OUTLIER = 255
SIGNED_ZERO = 127
# Steps up to which no symbol is an outlier; a little less than the symbols reach, for float32's own rounding.
_UNSIGNED_REACH, _SIGNED_REACH = 253.9, 126.9
_NO_OUTLIERS = np.empty(0, np.int32)
_BLOCK, _SAMPLE = 1 << 16, 1 << 14
_UNIT = np.float32(2**-16)  # of the numbers that dither


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
        if not 1e-30 < power / flat.size < 1e30:  # float32 squares vanish below 1e-23 and overflow past 1e19
            power = float(np.square(flat, dtype=np.float64).sum())
        return np.float32(np.sqrt(12 * power / max(1, noisy)) * 10 ** (-snr / 20))


def level_of(flat: Tensor, step: np.float32) -> int:
    """Where in its step an unsigned element lies on average, in 256ths, from a sample; never so low as to be zero."""
    some = flat[:: max(1, flat.size // _SAMPLE) | 1]
    some = some[some > 0] * (np.float32(1) / step)
    return max(16, min(255, int(256 * np.mean(some - np.floor(some))))) if some.size else 128


def _blocks(shape: tuple[int, ...]) -> list[tuple[int | slice, ...]]:
    """Parts of a tensor [C, B, rest] that stay in the cache: its channels, or pieces where it is one long row."""
    if shape[:2] != (1, 1):
        return [(channel,) for channel in range(shape[0])]
    return [(0, 0, slice(at, at + _BLOCK)) for at in range(0, shape[2], _BLOCK)]


def unsigned(tensor: Tensor, amax: float, step: np.float32) -> tuple[Symbols, Steps]:
    """Symbols, shaped like `tensor` [C, B, rest], whose elements are 0 to `amax`, and outliers in C order."""
    inverse = np.float32(1) / step
    symbols = np.empty(tensor.shape, np.uint8)
    if amax * float(inverse) < _UNSIGNED_REACH:
        for block in _blocks(tensor.shape):
            out = symbols[block]
            np.multiply(tensor[block], inverse, out=out, casting="unsafe")  # the cast truncates
            out += (tensor[block] > 0).view(np.uint8)
        return symbols, _NO_OUTLIERS
    steps = np.floor(tensor * inverse)
    steps += tensor > 0
    far = steps > 254
    np.copyto(symbols, np.where(far, OUTLIER, steps), casting="unsafe")
    return symbols, steps[far].astype(np.int32)


def signed(tensor: Tensor, amax: float, step: np.float32, noise: Numbers | None) -> tuple[Symbols, Steps]:
    """Symbols, shaped like `tensor` [C, B, rest], rounded to nearest or by `noise`, and outliers."""
    inverse = np.float32(1) / step
    # floor(x + 1/2) is nearest; floor(x + noise) goes up with the probability that makes the mean right.
    half = np.float32(0.5)
    if amax * float(inverse) < _SIGNED_REACH:
        symbols = np.empty(tensor.shape, np.uint8)
        for block in _blocks(tensor.shape):
            steps = tensor[block] * inverse
            steps += half if noise is None else noise[block] * _UNIT
            # Above zero, so that truncating is the floor.
            np.add(steps, np.float32(SIGNED_ZERO), out=symbols[block], casting="unsafe")
        return symbols, _NO_OUTLIERS
    steps = tensor * inverse
    steps += half if noise is None else noise * _UNIT
    np.floor(steps, out=steps)
    far = np.abs(steps) > 127
    symbols = np.where(far, np.float32(OUTLIER), steps + np.float32(SIGNED_ZERO)).astype(np.uint8)
    return symbols, steps[far].astype(np.int32)


def restore_unsigned(symbols: Symbols, outliers: Steps, step: np.float32, level: int, out: Tensor) -> None:
    """Values `level` 256ths into the symbols' steps, into `out` ([C, B, rest] as the symbols, any strides)."""
    below = np.float32(1 - level / 256)
    for block in _blocks(out.shape):
        values = np.multiply(symbols[block], step)
        values -= below * step
        np.maximum(values, 0, out=out[block])
    if len(outliers):
        out[symbols == OUTLIER] = (outliers - float(below)) * float(step)


def restore_signed(symbols: Symbols, outliers: Steps, step: np.float32, noise: Numbers | None, out: Tensor) -> None:
    """The symbols' values, with the `noise` that was added taken off again, into `out` [C, B, rest]."""
    half = np.float32(0.5)
    for block in _blocks(out.shape):
        values = np.subtract(symbols[block], np.float32(SIGNED_ZERO))
        if noise is not None:
            values += half
            values -= noise[block] * _UNIT
        np.multiply(values, step, out=out[block])
    if len(outliers):
        far = symbols == OUTLIER
        steps = outliers.astype(np.float32)
        if noise is not None:
            steps += half
            steps -= noise[far] * _UNIT
        out[far] = steps * step
