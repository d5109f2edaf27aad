"""Symbols as codec `context` wants them: maps [C, B, H, W], whole, with what both sides know beside."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Mask, grid
from common.codecs.dither import Numbers
from common.codecs.quantise import Symbols


def map_shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A tensor [B, C, H, W], [B, C, L] or [B, C] as maps [C, B, H, W]."""
    batch, channels, rest = grid(shape)
    return (channels, batch, shape[2], shape[3]) if len(shape) == 4 else (channels, batch, 1, rest)


def _maps_of(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Values in the order of memory as maps."""
    batch, channels, rest = grid(shape)
    return np.ascontiguousarray(values.reshape(batch, channels, rest).transpose(1, 0, 2)).reshape(map_shape(shape))


def in_order_of_memory(maps: Symbols, shape: tuple[int, ...]) -> Symbols:
    """Maps as flat symbols in the order of memory."""
    batch, channels, rest = grid(shape)
    return maps.reshape(channels, batch, rest).transpose(1, 0, 2).reshape(-1)


def as_maps(symbols: Symbols, shape: tuple[int, ...], mask: Mask | None, zero: int) -> Symbols:
    """Symbols in sending order as maps."""
    if mask is None:
        return symbols.reshape(map_shape(shape))
    spread = np.full(math.prod(shape), zero, np.uint8)
    spread[np.flatnonzero(mask)] = symbols.reshape(-1)
    return _maps_of(spread, shape)


def beside(shape: tuple[int, ...], mask: Mask | None, drawn: Numbers | None) -> tuple[Mask | None, Symbols | None]:
    """As maps: the mask, and the numbers drawn in 16ths of their range."""
    spread = None if mask is None else _maps_of(mask, shape)
    if drawn is None:
        return spread, None
    count = math.prod(shape) if mask is None else int(np.count_nonzero(mask))
    return spread, as_maps((drawn[:count] >> 12).astype(np.uint8), shape, mask, 0)
