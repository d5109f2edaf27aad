"""Codecs `step`, `context` and `auto`: one step for the whole tensor, set by an SNR in dB, then entropy coding.

`step` codes with zstd, `context` with a slower coder that looks at the neighbours, `auto` leaves the choice between
the two to the sender (common/chooser.py). Which coder made a payload stands in it: all but `step` decode both.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from typing import Any

from common.codecs.base import NOTHING, Aside, Buffer, Tensor
from common.errors import CodecError

# Form and flags, step, level of unsigned elements in it, outliers, checksum of the mask.
HEADER = struct.Struct("<BfBII")


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

    @property
    def bits(self) -> float:
        return (self.snr + 6) / 10  # as in docs/codec.md

    @property
    def varies(self) -> bool:
        return True

    def by(self, coder: str) -> Step:
        """The same with another coder."""
        return replace(self, coder=coder)

    def load(self) -> None:
        """What the coder needs, ahead of its first use, so that this takes no longer than later ones."""
        work = _payloads()
        if self.coder != "step":  # "auto" tries both after some payloads
            work.load_context()

    def encode(self, tensor: Tensor, aside: Aside = NOTHING) -> Buffer:
        payload: Buffer = _payloads().encode(tensor, self._told(aside), self.snr, self.coder == "context")
        return payload

    def decode(self, payload: Buffer, shape: tuple[int, ...], aside: Aside = NOTHING) -> Tensor:
        try:
            tensor: Tensor = _payloads().decode(memoryview(payload), shape, self._told(aside), self.coder != "step")
        except CodecError as error:
            raise CodecError(f"{self.name}: {error}") from error
        return tensor

    def _told(self, aside: Aside) -> Aside:
        return replace(aside, dither=None) if self.nearest else aside

    def bound(self, shape: tuple[int, ...]) -> int:
        return HEADER.size + 4 * math.prod(shape)


def _payloads() -> Any:
    """codecs/payload.py, which loads a compiler: a second and 120 MB for those alone who code."""
    from common.codecs import payload

    return payload
