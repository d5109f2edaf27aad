"""Payloads of codecs `step` and `context`: a header that says of which form the rest is, and the rest.

Forms: raw float32, nothing but zeros, symbols as codecs/pack.py codes them, or as codecs/context.py does; outliers with
either. Loads a compiler: codecs/step.py, which is what others call, imports this where it is used.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np

from common.codecs import dither, pack, quantise
from common.codecs.base import Aside, Buffer, Mask, Tensor, grid, require_finite
from common.codecs.dither import Numbers
from common.codecs.maps import as_maps, beside, in_order_of_memory, map_shape
from common.codecs.quantise import Steps, Symbols
from common.codecs.raw import Fp32
from common.codecs.step import HEADER
from common.errors import CodecError

# Below this many elements the headers cost more than coding saves.
_SMALL = 256
# Steps outside are not safe to divide by, or to multiply with, in float32: such a tensor goes as it is.
_LEAST, _MOST, _FURTHEST = 1e-36, 1e28, 2.0**30
_RAW, _ZEROS, _PACKED, _CONTEXT = range(4)
_SIGNED, _DITHERED, _MASKED = 4, 8, 16
_UNCODED = Fp32()


def load_context() -> Any:
    """codecs/context.py, whose loops take a second to load and several to compile: for those alone who use it."""
    from common.codecs import context

    return context


def _flags(aside: Aside) -> int:
    """The flags that follow from what both sides know."""
    return (_DITHERED if aside.dither else 0) | (_MASKED if aside.mask is not None else 0)


def encode(tensor: Tensor, aside: Aside, snr: float, by_context: bool) -> Buffer:
    """The payload of `tensor` at `snr` dB, coded by `context` where that is asked for and smaller."""
    tensor = np.require(tensor, np.float32, ["C", "A", "W"])  # as compiled loops take them
    flat, mask, level = tensor.reshape(-1), _flat(aside.mask, tensor.size), 0
    power, nonzero, most, negative = quantise.survey(flat, mask)
    require_finite(most, most)
    if not power:
        return HEADER.pack(_ZEROS, 0, 0, 0, 0)
    count = tensor.size if mask is None else int(np.count_nonzero(mask))
    flags = _flags(aside)
    flags |= _SIGNED if flags or negative else 0
    # Where nothing is negative, elements that are zero stay exactly zero. They have no rounding noise, so the others
    # may have more for the same SNR.
    step = quantise.step_of(power, count if flags & _SIGNED else nonzero, snr)
    if tensor.size < _SMALL or not _LEAST < step < _MOST or most > float(step) * _FURTHEST:
        return _raw(tensor)
    drawn = _drawn(aside, count)
    if mask is not None:
        symbols, outliers = quantise.signed_within(flat, mask, count, step, drawn)
    elif flags & _SIGNED:
        symbols, outliers = quantise.signed(tensor.reshape(grid(tensor.shape)), step, drawn)
    else:
        symbols, outliers, level = quantise.unsigned(tensor.reshape(grid(tensor.shape)), step)
    listed = outliers.astype("<i4").tobytes()
    row = symbols.reshape(-1)
    body = pack.encode([row] if drawn is None else dither.apart(row, drawn, _zero(flags)), _zero(flags), listed)
    form = _PACKED
    if by_context:
        maps, room = as_maps(symbols, tensor.shape, mask, _zero(flags)), len(body) - len(listed) - 1
        slow = load_context().encode(maps, _zero(flags), room, *beside(tensor.shape, mask, drawn))
        if slow is not None:
            form, body = _CONTEXT, listed + slow
    payload = HEADER.pack(form | flags, step, level, len(outliers), _checksum(mask)) + body
    return payload if len(payload) < 4 * tensor.size else _raw(tensor)


def decode(payload: memoryview, shape: tuple[int, ...], aside: Aside, by_context: bool) -> Tensor:
    """The tensor of `shape` in `payload`; CodecError where it isn't one that these settings make.

    Without `by_context` a payload that is coded by context is refused: to decode some hundred bytes may take a second.
    """
    count, mask = math.prod(shape), _flat(aside.mask, math.prod(shape))
    if len(payload) < HEADER.size:
        raise CodecError(f"{len(payload)} bytes are too few for a header")
    form, size, level, outlying, checksum = HEADER.unpack_from(payload)
    body, flags, step = payload[HEADER.size :], form & ~3, np.float32(size)
    if form in (_RAW, _ZEROS):
        if size or level or outlying or checksum or len(body) != (4 * count if form == _RAW else 0):
            raise CodecError(f"{len(body)} bytes came for {count} elements that are not coded")
        if form == _ZEROS:
            return np.zeros(shape, np.float32)
        raw = _UNCODED.decode(body, shape)
        return raw if mask is None else np.where(mask.reshape(shape), raw, np.float32(0))
    if form & 3 == _CONTEXT and not by_context:
        raise CodecError("the payload is coded by context, which this codec does not take")
    if form & 3 not in (_PACKED, _CONTEXT) or flags & ~_SIGNED != _flags(aside):
        raise CodecError(f"form {form} is not what was agreed on: the two sides differ in dither or mask")
    if flags & ~_SIGNED and not flags & _SIGNED or bool(flags & _SIGNED) == bool(level):
        raise CodecError(f"form {form} does not exist")
    if checksum != _checksum(mask):
        raise CodecError("the two sides differ in which elements are zero")
    wanted = count if mask is None else int(np.count_nonzero(mask))
    if outlying > wanted or not _LEAST < step < _MOST:
        raise CodecError(f"a step of {size:g} with {outlying} outliers among {wanted} elements cannot be")
    listed, drawn = 4 * outlying, _drawn(aside, wanted)  # bytes of the list of outliers
    if form & 3 == _CONTEXT:
        if len(body) < listed:
            raise CodecError(f"{outlying} outliers were announced, more than came")
        steps = bytes(body[:listed])
        known = beside(shape, mask, drawn)
        maps = load_context().decode(body[listed:], map_shape(shape), _zero(flags), *known)
        symbols = maps.reshape(-1) if mask is None else in_order_of_memory(maps, shape)[mask]
    else:
        symbols, steps = pack.decode(body, wanted if drawn is None else len(drawn), _zero(flags), listed)
        symbols = symbols if drawn is None else dither.together(symbols, drawn, wanted)
    outliers = np.frombuffer(steps, "<i4").astype(np.int32)
    _check_outliers(symbols, outliers, bool(flags & _SIGNED))
    out = np.empty(shape, np.float32)
    batch, channels, places = grid(shape)
    if mask is not None:
        quantise.restore_within(symbols, outliers, step, drawn, mask, out.reshape(-1))
    elif flags & _SIGNED:
        symbols = symbols.reshape(channels, batch, places)
        quantise.restore_signed(symbols, outliers, step, drawn, out.reshape(batch, channels, places))
    else:
        symbols = symbols.reshape(channels, batch, places)
        quantise.restore_unsigned(symbols, outliers, step, level, out.reshape(batch, channels, places))
    return out


def _zero(flags: int) -> int:
    return quantise.SIGNED_ZERO if flags & _SIGNED else 0


def _checksum(mask: Mask | None) -> int:
    return 0 if mask is None else zlib.crc32(np.packbits(mask).data)


def _drawn(aside: Aside, count: int) -> Numbers | None:
    return dither.numbers(aside.dither, count) if aside.dither else None


def _flat(mask: Mask | None, count: int) -> Mask | None:
    """As compiled loops take it, which go by the tensor's size alone."""
    if mask is not None and mask.size != count:
        raise CodecError(f"a mask of {mask.size} elements was given for a tensor of {count}")
    return None if mask is None else np.require(mask, np.bool_, ["C", "A", "W"]).reshape(-1)


def _check_outliers(symbols: Symbols, outliers: Steps, signed: bool) -> None:
    found, steps = int(np.count_nonzero(symbols == quantise.OUTLIER)), np.abs(outliers.astype(np.int64))
    near = steps <= 127 if signed else outliers <= 254
    if found != len(outliers) or np.any(near | (steps > _FURTHEST + 256)):
        raise CodecError(f"{len(outliers)} outliers came for {found} places, or lie where no outlier can be")


def _raw(tensor: Tensor) -> bytes:
    return HEADER.pack(_RAW, 0, 0, 0, 0) + bytes(_UNCODED.encode(tensor))
