"""Codec int8: one byte an element with a scale per channel, then zstd.

Source: symmetric linear quantisation as in most 8-bit split learning; the error of an element is at most half
its channel's scale. Zero stays exactly zero, which after a ReLU is most of the tensor and what zstd lives on.
"""

from __future__ import annotations

import struct

import numpy as np
import zstandard

from common.codecs.base import Buffer, Tensor, elements, require_finite, require_size
from common.errors import CodecError

# Level 1: on activations higher levels gain under 3 % and cost several times the time.
_LEVEL = 1
_HEADER = struct.Struct("<B")  # 1: codes are unsigned (no element is negative), 0: signed


def _channels(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """`shape` as (batch, channels, rest); rank 1 is one channel."""
    if len(shape) < 2:
        return 1, 1, elements(shape)
    return shape[0], shape[1], elements(shape[2:])


class Int8:
    """About 0.3 to 1 bytes an element: 1 byte of flags, float32 scales (one a channel), one zstd frame of codes."""

    name = "int8"

    def encode(self, tensor: Tensor) -> Buffer:
        grid = np.ascontiguousarray(tensor, np.float32).reshape(_channels(tensor.shape))
        if not grid.size:
            return b""
        low, high = grid.min(axis=(0, 2)), grid.max(axis=(0, 2))
        require_finite(float(low.min()), float(high.max()))
        unsigned = bool(low.min() >= 0)
        scale = (np.maximum(high, -low) / (255 if unsigned else 127)).astype("<f4")
        # A channel of zeros, or one so small that its inverse overflows, is sent as zeros.
        tiny = scale < 1e-37
        scale[tiny] = 0
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=~tiny)
        codes = grid * inverse[None, :, None]
        np.rint(codes, out=codes)
        np.clip(codes, 0 if unsigned else -127, 255 if unsigned else 127, out=codes)
        raw = codes.astype(np.uint8 if unsigned else np.int8)
        packed = zstandard.ZstdCompressor(level=_LEVEL).compress(memoryview(raw).cast("B"))
        return b"".join((_HEADER.pack(unsigned), scale.tobytes(), packed))

    def decode(self, payload: Buffer, shape: tuple[int, ...]) -> Tensor:
        count = elements(shape)
        if not count:
            require_size(payload, 0, self.name)
            return np.zeros(shape, np.float32)
        _, channels, _ = _channels(shape)
        start = _HEADER.size + 4 * channels
        view = memoryview(payload)
        if len(view) <= start:
            raise CodecError(f"{self.name}: {len(view)} bytes are too few for {channels} channels")
        unsigned = _HEADER.unpack_from(view)[0]
        scale = np.frombuffer(view[_HEADER.size : start], "<f4")
        if unsigned > 1 or not np.all(np.isfinite(scale)) or scale.min() < 0:
            raise CodecError(f"{self.name}: the flags or scales are damaged")
        codes = np.frombuffer(_decompress(view[start:], count), np.uint8 if unsigned else np.int8)
        with np.errstate(over="ignore"):  # a forged scale may overflow; the check below names it
            tensor = codes.reshape(_channels(shape)) * scale[None, :, None]
        if float(scale.max()) > 1e36:
            raise CodecError(f"{self.name}: a scale is out of range")
        return tensor.reshape(shape)

    def bound(self, shape: tuple[int, ...]) -> int:
        count = elements(shape)
        # zstd's own worst case for incompressible input: ZSTD_COMPRESSBOUND.
        packed = count + (count >> 8) + 512
        return _HEADER.size + 4 * _channels(shape)[1] + packed


def _decompress(frame: memoryview, expected: int) -> bytes:
    """The `expected` bytes in one zstd frame; nothing larger is ever allocated."""
    try:
        # python-zstandard ignores max_output_size when the frame declares a size, so that is compared first.
        declared = zstandard.frame_content_size(frame)
        if declared != expected:
            raise CodecError(f"int8: the zstd frame declares {declared} bytes, {expected} were expected")
        # 2^27: zstd's own default limit for windows, far above what any level needs for one frame here.
        decompressor = zstandard.ZstdDecompressor(max_window_size=2**27)
        return decompressor.decompress(frame, max_output_size=expected, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"int8: the zstd frame is damaged: {error}") from error
