"""What is left of a run, in seconds and bytes, from what its steps took of late. Called by the trainer.

Widths grow or shrink, so the mean of all steps says little of those to come. What a step sends goes with its width and
codecs, and the time for that with the link's rate, which the kernel tells; the rest goes on whatever crosses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from common import schedule
from common.codecs import codec
from common.recipe import Recipe
from common.schedule import LEARN, RANK, RECALL, Phase
from common.tcp_info import Flow

_MEMORY = 32  # steps that a running mean looks back
_ENOUGH, _ENOUGH_S = 4, 10.0  # steps or seconds of a phase that say more than what was known before it
_AGAIN, _TELLING = 16, 1500  # steps after which the link is measured anew, and bytes that say nothing of it yet
# Of a step's computing, what judging as many pictures takes: a quarter or a third of each side's, which work at once.
_FORWARD = 1 / 5


@dataclass(frozen=True)
class Left:
    seconds: float
    bytes: float


class Forecast:
    """One run's, on the device."""

    def __init__(
        self, recipe: Recipe, cut: tuple[int, ...], batch: int, parts: tuple[int, int, int],
        flow: Callable[[], Flow | None],
    ) -> None:  # fmt: skip
        """`cut`: [C, ...] of a picture; `batch`: pictures a step; `parts`: those trained on, of a validation, of the
        test; `flow`: what the connection has sent so far, None where that is not known."""
        samples, validation, test = parts
        self._epoch = schedule.steps_per_epoch(samples, batch)
        self._validation, self._test = validation / batch, test / batch  # in steps' worth of pictures
        self._phases, self._planned = schedule.planned(recipe, cut[0], self._epoch)
        # Under a plateau: the widths, one after the other.
        self._widths = [width or cut[0] for width in recipe.schedule.widths]
        self._flow, self._before = flow, flow()
        self._rate: float | None = None  # bytes a second
        self._sends = self._steps = 0  # since the link was measured
        # Steps of the present phase that were observed. -1: none of this process yet, whose first step is left out, for
        # it waits for what is set up.
        self._seen = -1
        self._index = -1
        self._seconds = self._waiting = self._up = self._down = 0.0  # of a step, as a running mean
        # Bytes for each unit of what `_load` tells; down as up, as long as nothing has come.
        self._up_of_load, self._down_of_load = batch * math.prod(cut[1:]) / 8, 0.0
        self._computing: dict[str, float] = {}  # seconds that a step computes on both sides, by its kind
        self._elsewhere = 0.0  # the server's share of that, in the newest kind but RECALL

    def observe(self, phase: Phase, seconds: float, up: int, down: int, waiting: float = 0.0) -> None:
        """Take in a step of `phase`: seconds, those of them spent `waiting` for its answer, bytes of messages."""
        self._sends += bool(up)
        self._steps += 1
        if self._seen < 0:
            self._seen = 0
            return
        if phase.index != self._index:
            self._index, self._seen = phase.index, 0
        self._seen += 1
        share = 1 / min(self._seen, _MEMORY)
        self._seconds += (seconds - self._seconds) * share
        self._waiting += (waiting - self._waiting) * share
        self._up += (up - self._up) * share
        self._down += (down - self._down) * share
        if self._steps >= _AGAIN or self._rate is None:
            self._measure()
        if self._seen < _ENOUGH and self._seen * self._seconds < _ENOUGH_S:
            return
        load_up, load_down = _load(phase)
        if load_up:
            self._up_of_load = self._up / load_up
        if load_down:
            self._down_of_load = self._down / load_down
        crossing = (self._up + self._down) / self._rate if self._rate else 0.0
        self._computing[phase.kind] = max(0.0, self._seconds - crossing)
        if phase.kind != RECALL:
            self._elsewhere = max(0.0, self._waiting - crossing)

    def left(self, step: int, present: Phase, most: float = math.inf) -> Left | None:
        """Before `step`, which is of the `present` phase; None as long as nothing is known. `most`: bytes that may
        still be sent."""
        if not self._computing:
            return None
        # Under a plateau nobody knows when the next phase comes: at most all that is left is of the widest. Where a
        # budget has changed the run's length, phases are taken to begin earlier in proportion.
        steps, phases = present.steps, self._phases
        if self._widths:
            ranking = present.width not in self._widths  # with all channels
            coming = self._widths if ranking else self._widths[self._widths.index(present.width) :]
            phases = [replace(present, width=max(coming))]
        scale = steps / self._planned
        ends = [*(phase.from_step * scale for phase in phases[1:]), steps]
        seconds = sent = 0.0
        for phase, end in zip(phases, ends, strict=True):
            count = max(0.0, end - max(step, phase.from_step * scale))
            up, down = _load(phase)
            sent += count * (self._up_of_load * up + (self._down_of_load or self._up_of_load) * down)
            seconds += count * self._computing_of(phase)
        last = phases[-1]
        judged = self._test + self._validation * ((steps - step) // self._epoch)
        sent += judged * self._up_of_load * last.width * codec(last.activation_codec).bits
        seconds += judged * self._computing_of(last) * _FORWARD
        sent = min(sent, most)
        return Left(seconds + (sent / self._rate if self._rate else 0.0), sent)

    def _computing_of(self, phase: Phase) -> float:
        """Seconds that a step of `phase` computes. One of a kind that has not come yet is taken to be as long as the
        longest of those that have; a recall, in which the device has no part, as the server's share of a step."""
        unknown = self._elsewhere if phase.kind == RECALL else max(self._computing.values())
        return self._computing.get(phase.kind, unknown)

    def _measure(self) -> None:
        """Take the link's rate anew, from all that was sent since it was last taken.

        What evaluations sent counts too: it says most where hardly anything crosses in steps.
        """
        now, self._steps = self._flow(), 0
        if now and self._before and now.acknowledged >= self._before.acknowledged:  # else it is of a new connection
            if now.acknowledged - self._before.acknowledged < _TELLING:
                return
            self._rate = now.rate_since(self._before, self._sends)
        self._before, self._sends = now, 0


def _load(phase: Phase) -> tuple[float, float]:
    """What the bytes of a step go with, up and down: channels that cross, and bits that their codecs take."""
    up = 0.0 if phase.kind == RECALL else phase.mean_width * codec(phase.activation_codec).bits
    down = phase.mean_width * codec(phase.gradient_codec).bits if phase.kind in (LEARN, RANK) else 0.0
    return up, down
