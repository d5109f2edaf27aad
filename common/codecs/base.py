"""What a codec is, what it may be told beside the tensor, and the checks that all of them share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import CodecError, DivergedError

Tensor = NDArray[np.float32]
Mask = NDArray[np.bool_]
Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Aside:
    """What both sides know without sending it; encoder and decoder must be given the same.

    `dither` seeds the random numbers that make rounding unbiased: (seed of the run, step, role); None rounds to
    nearest. `mask` [B, C, ...] is true where the receiver needs a value: elsewhere it gets zero.
    """

    dither: tuple[int, int, int] | None = None
    mask: Mask | None = None


NOTHING = Aside()


class Codec(Protocol):
    @property
    def name(self) -> str:
        """As a recipe writes it, settings included: "fp32", "step:15"."""

    @property
    def exact_zeros(self) -> bool:
        """Whether an element of a tensor without negative ones is decoded to zero only if it was zero."""

    @property
    def bits(self) -> float:
        """About how many an element takes."""

    @property
    def varies(self) -> bool:
        """Whether tensors of one shape take more or fewer bytes by what is in them."""

    def encode(self, tensor: Tensor, aside: Aside = NOTHING) -> Buffer:
        """Bytes of `tensor` (float32, C order, rank 1 to 4, channels second); DivergedError where it isn't finite."""

    def decode(self, payload: Buffer, shape: tuple[int, ...], aside: Aside = NOTHING) -> Tensor:
        """The float32 tensor of `shape` in `payload`; CodecError where the bytes are not that of such a tensor.

        Memory is bounded by a small multiple of the shape's size, whatever the bytes say.
        """

    def bound(self, shape: tuple[int, ...]) -> int:
        """The most bytes that `encode` makes of a tensor of `shape`; more is refused unread."""


def require_finite(low: float, high: float) -> None:
    """Check the smallest and the largest element before encoding: NaN and Inf show in one of them."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DivergedError(
            "a tensor to be sent is not finite: training has diverged, or a number in the data is far from all others; "
            "lower the recipe's learning rate, or leave it out"
        )


def require_size(payload: Buffer, expected: int, codec: str) -> None:
    if len(payload) != expected:
        raise CodecError(f"{codec}: {len(payload)} bytes came where {expected} were expected")


def require_decoded_finite(low: float, high: float, codec: str) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CodecError(f"{codec}: the payload holds NaN or Inf")


def grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """`shape` as (batch, channels, all the rest); rank 1 is a batch of one value each."""
    if len(shape) < 2:
        return math.prod(shape), 1, 1
    return shape[0], shape[1], math.prod(shape[2:])
