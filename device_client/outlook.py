"""What a person is told while a run trains: each step, how long it still takes, and what its budget comes to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.meter import DOWN, UP, Meter
from common.progress import RunningMean, StepProgress
from common.recipe import Recipe
from common.schedule import RECALL, STORE, Phase
from common.words import duration, several, size
from device_client.forecast import Forecast

_NOTICEABLE = 0.1  # share of a run's length by which it must have changed before that is told
_TOLD_AFTER, _LONG_S = 24, 60.0  # steps after which it is told how long the rest takes, if that is long


class Outlook:
    """What one process tells of one run."""

    def __init__(self, live: StepProgress, recipe: Recipe, meter: Meter, forecast: Forecast, planned: int) -> None:
        """`planned`: how many steps the run was to have."""
        self._live, self._recipe, self._meter, self._forecast = live, recipe, meter, forecast
        self._planned = self._told = planned
        self._made = 0

    def after(self, line: Mapping[str, Any], mean: RunningMean, phase: Phase, present: Phase) -> None:
        """A step of `phase` was made, of which `line` is that of metrics.jsonl; the next is of the `present` one."""
        live, crossed = self._live, self._meter.total
        done, steps = line["step"] + 1, present.steps
        seconds, sent = line["seconds"], line["bytes"]
        self._forecast.observe(phase, sum(seconds.values()), sent[UP], sent[DOWN], seconds["wait"])
        budget = self._recipe.schedule.budget_mb * 1e6 or math.inf
        left = self._forecast.left(done, present, max(0.0, budget - crossed(UP).message - crossed(DOWN).message))
        self._made += 1
        if steps != self._planned:
            self._planned = steps
            live.plan(steps)
            if abs(steps - self._told) > _NOTICEABLE * self._told:
                self._told = steps
                warmup = self._recipe.optimiser.warmup
                rising = (
                    f", of which {min(warmup, steps):,} warm up; raise schedule.budget_mb, or lower optimiser.warmup"
                )
                live.say(f"{self._budget} is enough for about {steps:,} steps{rising * (3 * warmup > steps)}.")
        live.step(
            done, mean, phase.widths, (crossed(UP).message, crossed(DOWN).message), left.seconds if left else None,
            phase.frozen,
        )  # fmt: skip
        if present.kind == RECALL and phase.kind == STORE:
            # Which of the phases it is, and so whether it moves them, is not told to a device.
            moves = any(entry.flip or entry.shift for entry in self._recipe.schedule.phases)
            how = ", flipped or moved, on which accuracy is lower" if moves else ""
            live.say(f"The views of all pictures have been sent; the server learns from what it kept{how}.")
        if left and self._made == _TOLD_AFTER and left.seconds > _LONG_S:
            about = "At most about" if self._recipe.schedule.kind == "plateau" else "About"
            live.say(f"{about} {duration(left.seconds)} and {size(left.bytes)} are left, as the link is now.")

    def end(self, steps: int) -> None:
        """The run is over after so many."""
        if self._recipe.schedule.budget_mb and steps < self._planned:
            self._live.say(f"{self._budget} was enough for {several(steps, 'step')}.")

    @property
    def _budget(self) -> str:
        return f"The budget of {size(self._recipe.schedule.budget_mb * 1e6)}"
