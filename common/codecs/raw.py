"""Codecs that only choose the number format: fp32 (what plain split learning sends) and fp16."""

from __future__ import annotations

import math
import struct

import numpy as np

from common.codecs.base import (
    NOTHING,
    Aside,
    Buffer,
    Tensor,
    require_decoded_finite,
    require_finite,
    require_size,
)

_LARGEST = 15  # exponent of what the largest element becomes, at most
_BELOW = np.float32(2**15 - 16)  # the largest number of fp16 below that


def _range(tensor: np.ndarray) -> tuple[float, float]:
    return (float(tensor.min()), float(tensor.max())) if tensor.size else (0.0, 0.0)


class Fp32:
    """4 bytes an element, little endian; exact."""

    name = "fp32"
    exact_zeros = True
    bits = 32.0
    varies = False

    def encode(self, tensor: Tensor, aside: Aside = NOTHING) -> Buffer:
        require_finite(*_range(tensor))
        # A view where memory already is little-endian C order (everywhere that matters): no copy.
        return np.ascontiguousarray(tensor, "<f4").data.cast("B") if tensor.size else b""

    def decode(self, payload: Buffer, shape: tuple[int, ...], aside: Aside = NOTHING) -> Tensor:
        require_size(payload, self.bound(shape), self.name)
        tensor = np.frombuffer(payload, "<f4").reshape(shape)
        require_decoded_finite(*_range(tensor), self.name)
        return tensor

    def bound(self, shape: tuple[int, ...]) -> int:
        return 4 * math.prod(shape)


class Fp16:
    """2 bytes an element, little endian, of the tensor times a power of two, which stands before them in a byte: from
    2^-28 of the largest element on the relative error is at most 2^-11, at any scale."""

    name = "fp16"
    exact_zeros = False  # what is below 2^-40 of the largest becomes zero too
    bits = 16.0
    varies = False

    def encode(self, tensor: Tensor, aside: Aside = NOTHING) -> Buffer:
        low, high = _range(tensor)
        require_finite(low, high)
        # Gradients of a mean loss may lie where fp16 has few bits or none: the largest comes to 2^14 or more.
        power = max(-127, min(126, _LARGEST - math.frexp(max(-low, high))[1]))
        scaled = np.ascontiguousarray(tensor) * np.float32(2.0**power)
        if power < -112:  # rounded up, the largest of all would be more than float32 has
            scaled = np.clip(scaled, -_BELOW, _BELOW)
        # It converts ten times as fast as numpy, both round to nearest even; but for this codec alone it takes seconds.
        import torch

        half = torch.from_numpy(scaled).half().numpy()
        return struct.pack("<b", power) + half.astype("<f2", copy=False).tobytes()

    def decode(self, payload: Buffer, shape: tuple[int, ...], aside: Aside = NOTHING) -> Tensor:
        require_size(payload, self.bound(shape), self.name)
        import torch

        (power,) = struct.unpack_from("<b", payload)
        half = np.frombuffer(payload, "<f2", offset=1).astype(np.float16)
        with np.errstate(over="ignore"):  # of a forged power; it is looked at below
            tensor = np.ldexp(torch.from_numpy(half).float().numpy(), -power).reshape(shape)
        require_decoded_finite(*_range(tensor), self.name)
        return tensor

    def bound(self, shape: tuple[int, ...]) -> int:
        return 1 + 2 * math.prod(shape)
