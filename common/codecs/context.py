"""Symbols to bytes with what is around them as context: fewer bytes than zstd, at a fraction of its speed.

A payload says which channels each one is predicted from, and holds what codecs/mixing.py coded. Called by
codecs/payload.py.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from common.codecs import mixing
from common.codecs.base import Buffer, Mask
from common.codecs.mixing import PARENTS
from common.codecs.quantise import Symbols
from common.errors import CodecError

# The products of `_likest` are small, and numpy's BLAS divides them among threads that spin while they wait: on cores
# that others use too, coding took 18 times longer. torch, which has a library and threads of its own, is left alone.
for _library in ThreadpoolController().lib_controllers:
    if _library.user_api == "blas" and "torch" not in (_library.filepath or ""):
        _library.set_num_threads(1)

Array = NDArray[Any]
Shape = tuple[int, int, int, int]  # channels, pictures, height, width

# Beyond so many channels finding the like ones takes long; planes of fewer places have hardly any neighbours.
_CHANNELS, _SMALLEST = 256, 16
_SAMPLES = 8192  # of a channel, to see which are like it
_NONE = np.empty(0, np.uint8)


def _planes(shape: Shape) -> Shape:
    """Maps [C, B, H, W] as they are coded: tiny ones side by side, too many channels as one."""
    channels, pictures, height, width = shape
    if height * width < _SMALLEST:
        return 1, 1, channels, pictures * height * width
    return shape if channels <= _CHANNELS else (1, channels * pictures, height, width)


def _likest(maps: Symbols, zero: int) -> Array:
    """For each channel of maps [C, ...] those before it that are most like it [C, PARENTS], best first."""
    channels = len(maps)
    flat = maps.reshape(channels, -1)
    some = np.abs(flat[:, :: max(1, flat.shape[1] // _SAMPLES) | 1].astype(np.float32) - np.float32(zero))
    some -= some.mean(axis=1, keepdims=True)
    some /= np.maximum(np.sqrt(np.square(some).sum(axis=1, keepdims=True)), np.float32(1e-9))
    alike = np.abs(some @ some.T)
    parents = np.zeros((channels, PARENTS), np.uint8)
    for channel in range(1, channels):
        best = np.argsort(-alike[channel, :channel], kind="stable")[:PARENTS]
        parents[channel, : len(best)] = best
    return parents


def _choices(channels: int) -> list[int]:
    """Of how many channels each parent is one, in the order in which they are sent."""
    return [channel for channel in range(2, channels) for _ in range(min(channel, PARENTS))]


def _lineage_size(channels: int) -> int:
    return (prod(_choices(channels)) - 1).bit_length() + 7 >> 3


def _pack_lineage(parents: Array) -> bytes:
    """Parents as the digits of one number, each with the base of its own choices."""
    number = 0
    sent = [parent for channel, row in enumerate(parents) if channel > 1 for parent in row[: min(channel, PARENTS)]]
    for choices, parent in zip(_choices(len(parents)), sent, strict=True):
        number = number * choices + int(parent)
    return number.to_bytes(_lineage_size(len(parents)), "little")


def _unpack_lineage(packed: bytes, channels: int) -> Array:
    number, parents = int.from_bytes(packed, "little"), np.zeros((channels, PARENTS), np.uint8)
    for channel in range(channels - 1, 1, -1):
        for at in range(min(channel, PARENTS) - 1, -1, -1):
            number, parents[channel, at] = divmod(number, channel)
    if number:
        raise CodecError("which channels are like which is damaged")
    return parents


def _flat(part: Array | None) -> Array:
    return _NONE if part is None else np.ascontiguousarray(part).reshape(-1).view(np.uint8)


def encode(maps: Symbols, zero: int, most: int, mask: Mask | None = None, drawn: Array | None = None) -> bytes | None:
    """Bytes of symbols [C, B, H, W], most of which are near `zero`; of those alone where `mask` is true, if given.
    None where they would be more than `most`.

    `drawn`: the numbers that dithered the symbols, in 16ths of their range.
    """
    shape = _planes(maps.shape)
    maps = np.ascontiguousarray(maps).reshape(shape)
    parents = _likest(maps, zero)
    lineage = _pack_lineage(parents)
    data = np.empty(max(0, most - len(lineage)), np.uint8)
    size = mixing.code(maps.reshape(-1), shape, zero, _flat(mask), _flat(drawn), parents, data, False)
    return None if size < 0 else lineage + data[:size].tobytes()


def decode(data: Buffer, shape: Shape, zero: int, mask: Mask | None = None, drawn: Array | None = None) -> Symbols:
    """Symbols [C, B, H, W]; `zero` outside `mask`. CodecError where `data` holds anything else."""
    planes = _planes(shape)
    start = _lineage_size(planes[0])
    if len(data) < start:
        raise CodecError("the symbols' header is cut short")
    parents = _unpack_lineage(bytes(data[:start]), planes[0])
    coded = np.frombuffer(data, np.uint8)[start:].copy()
    symbols = np.full(prod(shape), zero, np.uint8)
    size = mixing.code(symbols, planes, zero, _flat(mask), _flat(drawn), parents, coded, True)
    if size != len(coded):
        raise CodecError("the coded symbols do not end where they should: they are damaged")
    return symbols.reshape(shape)
