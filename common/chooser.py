"""Chooses between zstd and context coding for codec `auto`: what costs less time on this link, by measurement.

One on each side, for what that side sends. A smaller payload is worth its coding time on a slow link only; both
coders hold the same symbols, so the choice never changes what is trained.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from common.codecs.base import Aside, Buffer, Codec, Tensor
from common.codecs.step import Step
from common.tcp_info import Flow

# Link and coders are measured after the first _FIRST sends, and again after each _AGAIN, for they change.
_AGAIN, _FIRST = 32, 4
# In all measurements the context coder was at least so many times slower than zstd, and saved at most this share.
_SLOWER, _SAVES = 6.0, 0.5


@dataclass(frozen=True)
class Cost:
    """What a coder takes for an element: seconds of coding on both sides (the other taken to be as fast), bytes."""

    seconds: float
    bytes: float

    def on(self, rate: float) -> float:
        """Seconds an element over a link of `rate` bytes a second."""
        return self.seconds + self.bytes / rate


class Chooser:
    def __init__(self, flow: Callable[[], Flow | None]) -> None:
        """`flow`: what the connection has sent so far; None where that isn't known."""
        self._flow = flow
        self._before: Flow | None = None
        self._sends = self._measured = 0
        self._best = "step"

    def encode(self, codec: Codec, tensor: Tensor, aside: Aside) -> Buffer:
        """`codec.encode`, with the better coder where the codec is `auto`."""
        if not isinstance(codec, Step) or codec.coder != "auto" or not tensor.size:
            return codec.encode(tensor, aside)
        self._sends += 1
        if self._sends == 1:
            self._before = self._flow()
        if self._sends % _AGAIN == _FIRST and (rate := self._rate()):
            return self._measure(codec, tensor, aside, rate)
        return codec.by(self._best).encode(tensor, aside)

    def _rate(self) -> float | None:
        """Bytes a second that the link took since this was last asked."""
        now, before, sends = self._flow(), self._before, self._sends - 1 - self._measured
        self._before, self._measured = now, self._sends - 1
        return now.rate_since(before, sends) if now and before else None

    def _measure(self, codec: Step, tensor: Tensor, aside: Aside, rate: float) -> Buffer:
        """Try the coders on this tensor, unless zstd is so fast here that there is nothing to win; the best payload."""
        costs: dict[str, Cost] = {}
        payloads: dict[str, Buffer] = {}
        for coder in ("step", "context"):
            codec.by(coder).load()
            started = time.thread_time()  # the coder's own: what else runs meanwhile is chance
            payloads[coder] = codec.by(coder).encode(tensor, aside)
            codec.decode(payloads[coder], tensor.shape, aside)
            seconds = time.thread_time() - started
            costs[coder] = cost = Cost(seconds / tensor.size, len(payloads[coder]) / tensor.size)
            if coder == "step" and cost.bytes * _SAVES / rate < cost.seconds * (_SLOWER - 1):
                break
        self._best = min(costs, key=lambda coder: costs[coder].on(rate))
        return payloads[self._best]
