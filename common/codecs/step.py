"""Codecs `step`, `context` and `auto`: one step for the whole tensor, set by an SNR in dB, then entropy coding.

`step` codes with zstd, `context` with a slower coder that looks at the neighbours, `auto` leaves the choice between
the two to the sender (common/chooser.py). All three decode each other's payloads: which coder made one stands in it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.codecs import dither, pack, quantise
from common.codecs.base import NOTHING, Aside, Buffer, Support, Tensor, elements, grid, require_finite
from common.codecs.dither import Numbers
from common.codecs.quantise import Steps, Symbols
from common.codecs.raw import Fp32
from common.errors import CodecError

# Below this many elements the headers cost more than coding saves.
_SMALL = 256
# Steps outside are not safe to divide by, or to multiply with, in float32: such a tensor goes as it is.
_LEAST, _MOST, _FURTHEST = 1e-36, 1e28, 2.0**30
# Form and flags, step, level of unsigned elements in it, outliers, checksum of the support.
_HEADER = struct.Struct("<BfBII")
_RAW, _ZEROS, _PACKED, _CONTEXT = range(4)
_SIGNED, _DITHERED, _SUPPORTED = 4, 8, 16
_UNCODED = Fp32()


@dataclass(frozen=True)
class Step:
    """About 0.1 to 0.5 bytes an element; exact zeros stay zeros where nothing is negative."""

    coder: str  # "step", "context", or "auto", which codes as "step" where nobody has chosen
    snr: float  # dB
    nearest: bool = False  # round to nearest even where dither is at hand

    @property
    def name(self) -> str:
        return f"{self.coder}:{self.snr:g}" + (":nearest" if self.nearest else "")

    @property
    def exact_zeros(self) -> bool:
        return True

    def by(self, coder: str) -> Step:
        """The same with another coder."""
        return replace(self, coder=coder)

    def load(self) -> None:
        """What the coder needs, ahead of its first use, so that this takes no longer than later ones."""
        if self.coder == "context":
            _coder()

    def _flags(self, aside: Aside) -> int:
        """What both sides know of the form beforehand."""
        dithered = _SIGNED | _DITHERED if aside.dither and not self.nearest else 0
        return dithered | (_SUPPORTED if aside.support is not None else 0)

    def encode(self, tensor: Tensor, aside: Aside = NOTHING) -> Buffer:
        tensor = np.ascontiguousarray(tensor, np.float32)
        low, high = (float(tensor.min()), float(tensor.max())) if tensor.size else (0.0, 0.0)
        require_finite(low, high)
        amax = max(-low, high)
        values = _in_sending_order(tensor, aside.support)
        if not values.size or not amax:
            return _HEADER.pack(_ZEROS, 0, 0, 0, 0)
        flags = self._flags(aside) | (_SIGNED if low < 0 else 0)
        flat = values.reshape(-1) if aside.support is not None else tensor.reshape(-1)
        step = quantise.step_of(flat, self.snr, not flags & _SIGNED)
        if tensor.size < _SMALL or not _LEAST < step < _MOST or amax > float(step) * _FURTHEST:
            return _raw(tensor)
        level = 0 if flags & _SIGNED else quantise.level_of(flat, step)
        drawn = _drawn(flags, aside, values.size)
        if flags & _SIGNED:
            symbols, outliers = quantise.signed(values, amax, step, _noise(drawn, values.shape))
        else:
            symbols, outliers = quantise.unsigned(values, amax, step)
        tail = outliers.astype("<i4").tobytes()
        row = symbols.reshape(-1)
        body = pack.encode([row] if drawn is None else dither.apart(row, drawn, _zero(flags)), _zero(flags), tail)
        form = _PACKED
        if self.coder == "context":
            maps, most = as_maps(symbols, tensor.shape, aside.support, _zero(flags)), len(body) - len(tail) - 1
            slow = _coder().encode(maps, _zero(flags), most, *beside(tensor.shape, aside.support, drawn))
            if slow is not None:
                form, body = _CONTEXT, tail + slow
        payload = _HEADER.pack(form | flags, step, level, len(outliers), _checksum(aside.support)) + body
        return payload if len(payload) < 4 * tensor.size else _raw(tensor)

    def decode(self, payload: Buffer, shape: tuple[int, ...], aside: Aside = NOTHING) -> Tensor:
        try:
            return self._decode(memoryview(payload), shape, aside)
        except CodecError as error:
            raise CodecError(f"{self.name}: {error}") from error

    def _decode(self, payload: memoryview, shape: tuple[int, ...], aside: Aside) -> Tensor:
        count = elements(shape)
        if len(payload) < _HEADER.size:
            raise CodecError(f"{len(payload)} bytes are too few for a header")
        form, size, level, outlying, checksum = _HEADER.unpack_from(payload)
        body, flags, step = payload[_HEADER.size :], form & ~3, np.float32(size)
        if form in (_RAW, _ZEROS):
            if size or level or outlying or checksum or len(body) != (4 * count if form == _RAW else 0):
                raise CodecError(f"{len(body)} bytes came for {count} elements that are not coded")
            return _UNCODED.decode(body, shape) if form == _RAW else np.zeros(shape, np.float32)
        if form & 3 not in (_PACKED, _CONTEXT) or flags & ~_SIGNED != self._flags(aside) & ~_SIGNED or flags >= 32:
            raise CodecError(f"form {form} is not what was agreed on: the two sides differ in dither or support")
        if flags & (_DITHERED | _SIGNED) == _DITHERED or bool(flags & _SIGNED) == bool(level):
            raise CodecError(f"form {form} does not exist")
        if checksum != _checksum(aside.support):
            raise CodecError("the two sides differ in which elements are zero")
        chosen = None if aside.support is None else np.flatnonzero(aside.support)
        wanted = count if chosen is None else len(chosen)
        if outlying > wanted or not _LEAST < step < _MOST:
            raise CodecError(f"a step of {size:g} with {outlying} outliers among {wanted} elements cannot be")
        tail, drawn = 4 * outlying, _drawn(flags, aside, wanted)
        if form & 3 == _CONTEXT:
            if len(body) < tail:
                raise CodecError(f"{outlying} outliers were announced, more than came")
            rest = bytes(body[:tail])
            known = beside(shape, aside.support, drawn)
            maps = _coder().decode(body[tail:], map_shape(shape), _zero(flags), *known)
            symbols = maps.reshape(-1) if chosen is None else _in_order_of_memory(maps, shape).take(chosen)
        else:
            symbols, rest = pack.decode(body, wanted if drawn is None else len(drawn), _zero(flags), tail)
            symbols = symbols if drawn is None else dither.together(symbols, drawn)[:wanted]
        outliers = np.frombuffer(rest, "<i4").astype(np.int32)
        _check_outliers(symbols, outliers, bool(flags & _SIGNED))
        out = (np.empty if chosen is None else np.zeros)(shape, np.float32)
        values = _sending_view(out) if chosen is None else np.empty((1, 1, wanted), np.float32)
        symbols = symbols.reshape(values.shape)
        if flags & _SIGNED:
            quantise.restore_signed(symbols, outliers, step, _noise(drawn, values.shape), values)
        else:
            quantise.restore_unsigned(symbols, outliers, step, level, values)
        if chosen is not None:
            out.reshape(-1)[chosen] = values.reshape(-1)
        return out

    def bound(self, shape: tuple[int, ...]) -> int:
        return _HEADER.size + 4 * elements(shape)


def _coder() -> Any:
    """codecs/context.py, which loads a compiler: half a second and 60 MB for those alone who use it."""
    from common.codecs import context

    return context


def _zero(flags: int) -> int:
    return quantise.SIGNED_ZERO if flags & _SIGNED else 0


def _checksum(support: Support | None) -> int:
    return 0 if support is None else zlib.crc32(np.packbits(support.reshape(-1)).data)


def _drawn(flags: int, aside: Aside, count: int) -> Numbers | None:
    return dither.numbers(aside.dither, count) if flags & _DITHERED and aside.dither is not None else None


def _noise(drawn: Numbers | None, shape: tuple[int, ...]) -> Numbers | None:
    return None if drawn is None else drawn[: elements(shape)].reshape(shape)


def _sending_view(tensor: Tensor) -> Tensor:
    """[B, C, ...] as [C, B, rest], a view: channels are alike in themselves."""
    return tensor.reshape(grid(tensor.shape)).transpose(1, 0, 2)


def _in_sending_order(tensor: Tensor, support: Support | None) -> Tensor:
    """What is sent: everything [C, B, rest], or what lies where `support` is true, in the order of memory [1, 1, rest]
    (which gathers faster and comes out no larger)."""
    if support is None:
        return _sending_view(tensor)
    return tensor.reshape(-1).take(np.flatnonzero(support)).reshape(1, 1, -1)


def map_shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A tensor [B, C, H, W], [B, C, L] or [B, C] as maps [C, B, H, W]."""
    batch, channels, rest = grid(shape)
    return (channels, batch, shape[2], shape[3]) if len(shape) == 4 else (channels, batch, 1, rest)


def _maps_of(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Values in the order of memory as maps."""
    batch, channels, rest = grid(shape)
    return np.ascontiguousarray(values.reshape(batch, channels, rest).transpose(1, 0, 2)).reshape(map_shape(shape))


def _in_order_of_memory(maps: Symbols, shape: tuple[int, ...]) -> Symbols:
    batch, channels, rest = grid(shape)
    return maps.reshape(channels, batch, rest).transpose(1, 0, 2).reshape(-1)


def as_maps(symbols: Symbols, shape: tuple[int, ...], support: Support | None, zero: int) -> Symbols:
    """Symbols in sending order as maps."""
    if support is None:
        return symbols.reshape(map_shape(shape))
    spread = np.full(elements(shape), zero, np.uint8)
    spread[np.flatnonzero(support)] = symbols.reshape(-1)
    return _maps_of(spread, shape)


def beside(
    shape: tuple[int, ...], support: Support | None, drawn: Numbers | None
) -> tuple[Support | None, Symbols | None]:
    """As maps: the support, and the numbers drawn in 16ths of their range."""
    mask = None if support is None else _maps_of(support, shape)
    if drawn is None:
        return mask, None
    count = elements(shape) if support is None else int(np.count_nonzero(support))
    return mask, as_maps((drawn[:count] >> 12).astype(np.uint8), shape, support, 0)


def _check_outliers(symbols: Symbols, outliers: Steps, signed: bool) -> None:
    found = int(np.count_nonzero(symbols == quantise.OUTLIER))
    near = np.abs(outliers.astype(np.int64)) <= 127 if signed else outliers <= 254
    if found != len(outliers) or np.any(near) or np.any(np.abs(outliers.astype(np.int64)) > _FURTHEST * 2):
        raise CodecError(f"{len(outliers)} outliers came for {found} places, or lie where no outlier can be")


def _raw(tensor: Tensor) -> bytes:
    return _HEADER.pack(_RAW, 0, 0, 0, 0) + bytes(_UNCODED.encode(tensor))
