"""Codecs: a tensor to bytes and back. Pure: no I/O, no state, no knowledge of roles or the wire.

A codec has a name, `encode`, `decode` and `bound`; add one by writing its file and its line in `CODECS`.
"""

from __future__ import annotations

from common.codecs.base import Codec
from common.codecs.int8 import Int8
from common.codecs.raw import Fp16, Fp32

CODECS: dict[str, Codec] = {codec.name: codec for codec in (Fp32(), Fp16(), Int8())}

__all__ = ["CODECS", "Codec"]
