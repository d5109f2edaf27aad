"""What a codec is, and the checks that all of them share."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import CodecError, DivergedError

Tensor = NDArray[np.float32]
Buffer = bytes | bytearray | memoryview


class Codec(Protocol):
    name: str

    def encode(self, tensor: Tensor) -> Buffer:
        """Bytes of `tensor` (float32, C order, rank 1 to 4, channels second); DivergedError where it isn't finite."""

    def decode(self, payload: Buffer, shape: tuple[int, ...]) -> Tensor:
        """The float32 tensor of `shape` in `payload`; CodecError where the bytes are not that of such a tensor.

        Memory is bounded by a small multiple of the shape's size, whatever the bytes say.
        """

    def bound(self, shape: tuple[int, ...]) -> int:
        """The most bytes that `encode` makes of a tensor of `shape`; more is refused unread."""


def require_finite(low: float, high: float) -> None:
    """Check the smallest and the largest element before encoding: NaN and Inf show in one of them."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DivergedError("a tensor to be sent is not finite: training has diverged; lower the learning rate")


def require_size(payload: Buffer, expected: int, codec: str) -> None:
    if len(payload) != expected:
        raise CodecError(f"{codec}: {len(payload)} bytes came where {expected} were expected")


def require_decoded_finite(low: float, high: float, codec: str) -> None:
    if not (np.isfinite(low) and np.isfinite(high)):
        raise CodecError(f"{codec}: the payload holds NaN or Inf")


def elements(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
