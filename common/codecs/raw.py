"""Codecs that only choose the number format: fp32 (what plain split learning sends) and fp16."""

from __future__ import annotations

import math

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

_FP16_MAX = float(np.finfo(np.float16).max)


def _range(tensor: np.ndarray) -> tuple[float, float]:
    return (float(tensor.min()), float(tensor.max())) if tensor.size else (0.0, 0.0)


class Fp32:
    """4 bytes an element, little endian; exact."""

    name = "fp32"
    exact_zeros = True

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
    """2 bytes an element, little endian; relative error up to 2^-11, values past 65504 are clamped there."""

    name = "fp16"
    exact_zeros = False  # what is below 2^-25 becomes zero too

    def encode(self, tensor: Tensor, aside: Aside = NOTHING) -> Buffer:
        low, high = _range(tensor)
        require_finite(low, high)
        if low < -_FP16_MAX or high > _FP16_MAX:
            tensor = np.clip(tensor, -_FP16_MAX, _FP16_MAX)
        # It converts ten times as fast as numpy, both round to nearest even; but for this codec alone it takes seconds.
        import torch

        half = torch.from_numpy(np.ascontiguousarray(tensor)).half().numpy()
        return half.astype("<f2", copy=False).data.cast("B") if half.size else b""

    def decode(self, payload: Buffer, shape: tuple[int, ...], aside: Aside = NOTHING) -> Tensor:
        require_size(payload, self.bound(shape), self.name)
        import torch

        half = np.frombuffer(payload, "<f2").astype(np.float16)
        tensor = torch.from_numpy(half).float().numpy().reshape(shape)
        require_decoded_finite(*_range(tensor), self.name)
        return tensor

    def bound(self, shape: tuple[int, ...]) -> int:
        return 2 * math.prod(shape)
