"""Codecs: a tensor to bytes and back. Pure: no I/O, no state, no knowledge of roles or the wire.

`base.Codec` says what each has; add one by writing its file and its line in `_MAKERS`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

from common.codecs.base import NOTHING, Aside, Codec
from common.codecs.int8 import Int8
from common.codecs.raw import Fp16, Fp32
from common.codecs.step import Step
from common.errors import CodecError

_PATIENCE_S = 4.0
SNR_RANGE = (1.0, 40.0)  # dB; above, fp16 is the better choice


def _step(coder: str) -> Callable[..., Codec]:
    def make(snr: str = "", rounding: str = "") -> Codec:
        low, high = SNR_RANGE
        try:
            value = float(snr)
        except ValueError:
            value = 0.0
        if not low <= value <= high:
            raise CodecError(f"{coder} needs an SNR of {low:g} to {high:g} dB, such as {coder}:15")
        if rounding not in ("", "nearest"):
            raise CodecError(f"{rounding!r} is no rounding; write {coder}:{value:g}:nearest, or leave it out")
        return Step(coder, value, rounding == "nearest")

    return make


_MAKERS: dict[str, Callable[..., Codec]] = {
    "fp32": Fp32, "fp16": Fp16, "int8": Int8,
    "step": _step("step"), "context": _step("context"), "auto": _step("auto"),
}  # fmt: skip
KINDS = tuple(_MAKERS)


@cache
def codec(name: str) -> Codec:
    """The codec that a recipe calls `name`: "fp32", "fp16", "int8", or "step:15", "context:15", "auto:15" with an SNR
    in dB, and ":nearest" after it where gradients are not to be dithered. CodecError says what is wrong with others."""
    kind, *settings = name.split(":")
    if (family := kind.rstrip("0123456789.")) in _MAKERS and kind not in _MAKERS:
        raise CodecError(f"a colon is missing: write {family}:{kind.removeprefix(family)}")
    if kind not in _MAKERS:
        raise CodecError(f"there is no codec {kind!r}; there are {', '.join(KINDS)}")
    try:
        return _MAKERS[kind](*settings)
    except TypeError:
        raise CodecError(f"{name!r} has more settings than {kind} takes") from None


def load(*names: str, say: Callable[[str], None] = lambda text: None) -> None:
    """What codecs need before their first use, so that no step is held up by it; `say` is told where it takes long."""
    told = threading.Timer(
        _PATIENCE_S,
        say,
        [
            "The codec's loops are loaded, or compiled where this machine has not done so before or cannot keep them "
            "(docs/guide.md, Containers and services); on a slow or busy machine that takes a while."
        ],
    )
    told.daemon = True
    told.start()
    try:
        for chosen in map(codec, names):
            if isinstance(chosen, Step):
                chosen.load()
    finally:
        told.cancel()


__all__ = ["KINDS", "NOTHING", "Aside", "Codec", "codec", "load"]
