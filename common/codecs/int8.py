"""Codec int8: one byte an element with a scale per channel, then zstd.

Source: symmetric linear quantisation as in most 8-bit split learning; the error of an element is at most half
its channel's scale. Zero stays exactly zero, which after a ReLU is most of the tensor and what zstd lives on.
"""

from __future__ import annotations

import math
import struct

import numpy as np

from common.codecs import frame
from common.codecs.base import NOTHING, Aside, Buffer, Tensor, grid, require_finite, require_size
from common.errors import CodecError

_MOST_SCALE = 1e36  # so that no code times its scale overflows
_HEADER = struct.Struct("<B")  # 1: codes are unsigned (no element is negative), 0: signed


class Int8:
    """About 0.3 to 1 bytes an element: 1 byte of flags, float32 scales (one a channel), one zstd frame of codes."""

    name = "int8"
    exact_zeros = False  # what is less than half a scale becomes zero too
    bits = 6.0  # zstd leaves 5 to 7 of the 8
    varies = True

    def encode(self, tensor: Tensor, aside: Aside = NOTHING) -> Buffer:
        values = np.ascontiguousarray(tensor, np.float32).reshape(grid(tensor.shape))
        if not values.size:
            return b""
        low, high = values.min(axis=(0, 2)), values.max(axis=(0, 2))
        require_finite(float(low.min()), float(high.max()))
        unsigned = bool(low.min() >= 0)
        scale = (np.maximum(high, -low) / (255 if unsigned else 127)).astype("<f4")
        if float(scale.max()) > _MOST_SCALE:  # on its way to Inf
            require_finite(0.0, math.inf)
        # A channel of zeros, or one so small that its inverse overflows, is sent as zeros.
        tiny = scale < 1e-37
        scale[tiny] = 0
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=~tiny)
        codes = values * inverse[None, :, None]
        np.rint(codes, out=codes)
        np.clip(codes, 0 if unsigned else -127, 255 if unsigned else 127, out=codes)
        raw = codes.astype(np.uint8 if unsigned else np.int8)
        return b"".join((_HEADER.pack(unsigned), scale.tobytes(), frame.compress(memoryview(raw).cast("B"))))

    def decode(self, payload: Buffer, shape: tuple[int, ...], aside: Aside = NOTHING) -> Tensor:
        count = math.prod(shape)
        if not count:
            require_size(payload, 0, self.name)
            return np.zeros(shape, np.float32)
        _, channels, _ = grid(shape)
        start = _HEADER.size + 4 * channels
        view = memoryview(payload)
        if len(view) <= start:
            raise CodecError(f"{self.name}: {len(view)} bytes are too few for {channels} channels")
        unsigned = _HEADER.unpack_from(view)[0]
        scale = np.frombuffer(view[_HEADER.size : start], "<f4")
        if unsigned > 1 or not np.all(np.isfinite(scale)) or scale.min() < 0:
            raise CodecError(f"{self.name}: the flags or scales are damaged")
        codes = np.frombuffer(frame.decompress(view[start:], count), np.uint8 if unsigned else np.int8)
        with np.errstate(over="ignore"):  # a forged scale may overflow; the check below names it
            tensor = codes.reshape(grid(shape)) * scale[None, :, None]
        if float(scale.max()) > _MOST_SCALE:
            raise CodecError(f"{self.name}: a scale is out of range")
        return tensor.reshape(shape)

    def bound(self, shape: tuple[int, ...]) -> int:
        return _HEADER.size + 4 * grid(shape)[1] + frame.bound(math.prod(shape))
