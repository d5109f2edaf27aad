"""How far a run may go so that it spends no more than its recipe allows. Called by the coordinator alone.

Steps of one phase cost about the same, so what they have cost says what the others will; phases that are still to
come are estimated from their widths and codecs until they begin. All is a function of bytes that are the same in each
run, so a run that is made again, after a fault, goes exactly as far.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from common.recipe import Recipe
from common.room import FIRST, bits
from common.schedule import RANK, Phase, ends_of

# Steps between two judgements of a phase by what they cost; the first is after FIRST.
_EVERY = 16
_MEMORY = 64  # steps that a running mean looks back
# The plan changes only where the rest of the run would change by more than this share.
_NOTICEABLE = 0.02
# How much more than in training a picture may take in an evaluation, where batch norm and rounding are others.
_EVALUATED = 1.1
# What stands around the payloads of a step, at most: counted as so many bytes, for the messages themselves may differ
# by some between a run and the same run after a fault.
_FRAMING = 256
# Steps that must be paid for so that there is another, beside the one that is not booked yet: the next, and a margin.
_AHEAD = 1.5


@dataclass(frozen=True)
class Load:
    """What decides how many bytes a step takes: channels that cross, on average, and the codecs."""

    width: float
    activation: str
    gradient: str

    def of_step(self, spent: Spent) -> tuple[float, float]:
        """Bytes up and down of a step, from what `spent` says of another load."""
        up = self.width * bits(self.activation) / (spent.load.width * bits(spent.load.activation))
        down = self.width * bits(self.gradient) / (spent.load.width * bits(spent.load.gradient))
        return spent.up * up, spent.down * down


@dataclass
class Spent:
    """What the run has spent, in bytes, and on what of late."""

    payloads: tuple[int, int] = (0, 0)  # up and down, of all roles
    framing: int = 0
    load: Load = Load(0, "", "")  # that `steps`, `up` and `down` are of
    steps: int = 0
    up: float = 0.0  # a step of late
    down: float = 0.0
    ranked: int = 0  # the dearest step that ranked channels: more telling than what narrower ones let expect

    @property
    def total(self) -> int:
        return sum(self.payloads) + self.framing


@dataclass(frozen=True)
class Beside:
    """What a run sends beside its steps: pictures of each validation and of the test at the end, and the trained head's
    bytes where it is published.
    """

    validation: int = 0
    test: int = 0
    head: int = 0


class Budget:
    """One run's. `ends`: for each entry of the schedule the step at which it is to be over, as planned now."""

    def __init__(self, recipe: Recipe, channels: int, steps_per_epoch: int, batch: int, beside: Beside) -> None:
        """`batch`: pictures a step."""
        # The head comes last and whole: it is set aside from the beginning.
        self._allowed = recipe.schedule.budget_mb * 1e6 - beside.head - (_FRAMING if beside.head else 0)
        self._loads = [
            _load(
                (*entry.nested, entry.width or channels), entry.activation or recipe.codec.activation,
                entry.gradient or recipe.codec.gradient,
            )
            for entry in recipe.schedule.phases
        ]  # fmt: skip
        self._widest = [
            Load(entry.width or channels, load.activation, load.gradient)
            for entry, load in zip(recipe.schedule.phases, self._loads, strict=True)
        ]  # an evaluation takes all that a nested phase has
        self._channels = channels
        self._ranking = recipe.bottleneck.ranking_steps if recipe.bottleneck.kind == "channels" else 0
        self.ends = ends_of(recipe.schedule, steps_per_epoch)
        self._asked = [end - start for start, end in pairwise((0, *self.ends))]
        self._epoch = steps_per_epoch
        self._validation, self._test = beside.validation, beside.test
        self._batch, self._judged_at_once = batch, recipe.data.evaluation_batch
        self._spent = Spent()

    def book(self, up: int, down: int, phase: Phase | None = None) -> None:
        """The run's payloads have come to so many bytes; with `phase` by one of its steps."""
        spent = self._spent
        sent_up, sent_down = up - spent.payloads[0], down - spent.payloads[1]
        spent.payloads = up, down
        if not phase:
            if sent_up:
                spent.framing += self._framing(self._validation)
            return
        spent.framing += _FRAMING
        if phase.kind == RANK:
            spent.ranked = max(spent.ranked, sent_up + sent_down)
        load = _load(phase.widths, phase.activation_codec, phase.gradient_codec)
        if spent.load != load:
            spent.load, spent.steps = load, 0
        spent.steps += 1
        share = 1 / min(spent.steps, _MEMORY)
        spent.up = sent_up * share + spent.up * (1 - share)
        spent.down = sent_down * share + spent.down * (1 - share)

    def allows(self, present: Phase, coming: Phase, tested: Phase, validates: bool) -> bool:
        """Whether a step of phase `coming`, and the validation before it, can be paid for after one of `present` that
        is not booked yet, and the test at the end if that is made in phase `tested`."""
        spent = self._spent
        if not spent.steps:
            return True
        ahead = self._of(present) + _AHEAD * self._of(coming) + self._judging(self._test, _whole(tested))
        if coming.kind == RANK:  # it is not over before all its steps are made, and the next phase has begun
            ahead += self._ranking * self._of(coming)
        elif coming is not present:
            ahead += self._of(coming)  # what it costs is an estimate until it has begun
        if validates:
            ahead += self._judging(self._validation, _whole(coming))
        return spent.total + ahead <= self._allowed

    def _of(self, phase: Phase) -> float:
        """Bytes that a step of a phase takes."""
        step = self._step(_load(phase.widths, phase.activation_codec, phase.gradient_codec))
        return max(step, self._spent.ranked + _FRAMING) if phase.kind == RANK else step

    @property
    def shortens(self) -> bool:
        """Whether the run is planned to be shorter than its recipe asks for."""
        return self.ends[-1] < sum(self._asked)

    def fit(self, done: int) -> bool:
        """Plan anew after `done` steps, the last of which is not booked yet; whether `ends` changed."""
        spent, entry = self._spent, self._entry(done - 1)
        if spent.steps < FIRST or spent.steps % _EVERY != FIRST % _EVERY:
            return False
        ends = self._plan(done, range(entry, len(self._loads)))
        change = max(abs(then - now) for then, now in zip(ends, self.ends, strict=True))
        if change <= _NOTICEABLE * (self.ends[-1] - done):
            return False
        self.ends = ends
        return True

    def stay(self, done: int) -> None:
        """Plan what is left for the entry that the last of `done` steps was of, since the next cannot be paid for."""
        entry = self._entry(done - 1)
        self.ends = self._plan(done, range(entry, entry + 1))

    def leave(self, done: int) -> None:
        """Plan what is left for the entries after the one that the last of `done` steps was of."""
        entry = self._entry(done - 1)
        self.ends[entry] = done
        self.ends = self._plan(done, range(entry + 1, len(self._loads)))

    def _plan(self, done: int, coming: range) -> list[int]:
        """`ends` with as much of the entries `coming`, in the proportions that were asked for, as can be paid for."""
        entry = coming[0]
        start = self.ends[entry - 1] if entry else 0
        costs = {other: self._step(self._loads[other]) for other in coming}
        if self.ends[-1] >= self._epoch:  # a run that is shorter has no validation
            for other in coming:
                costs[other] += self._judging(self._validation, self._widest[other]) / self._epoch
        # What the run takes beside its steps if it ends in one entry or another.
        beside, ranked = {}, 0.0
        for last in coming:
            ranked += self._to_rank(last) if last > entry else 0.0
            beside[last] = ranked + self._judging(self._test, self._widest[last])
        share, last = 0.0, coming[-1]
        for last in reversed(coming):
            kept = range(entry, last + 1)
            wanted = sum(self._asked[other] * costs[other] for other in kept)
            if not wanted:  # entries that come to no step
                share = 0.0
                break
            left = self._allowed - self._spent.total - costs[entry] - beside[last]
            share = (left + (done - start) * costs[entry]) / wanted
            # No more steps in all than were asked for: where earlier phases had fewer, these may have more.
            most = (sum(self._asked) - start) / sum(self._asked[other] for other in kept)
            if share >= most and last == len(self._loads) - 1:
                share = most  # all can be paid for, whatever is beside it
                break
            share = max(0.0, min(share, most))
            # An entry that would take more beside its steps than by them, or end before it can be judged whether a
            # step more is paid for, is left out, so others have more.
            steps = share * self._asked[last]
            if last == entry or (steps >= _AHEAD and steps * costs[last] >= beside[last] - beside[last - 1]):
                break
        ends = list(self.ends)
        ends[entry] = max(done, start + round(self._asked[entry] * share))
        for other in range(entry + 1, len(ends)):
            ends[other] = ends[other - 1] + (round(self._asked[other] * share) if other <= last else 0)
        return ends

    def _entry(self, step: int) -> int:
        """The entry of the schedule that a step lies in."""
        return min(bisect_right(self.ends, step), len(self.ends) - 1)

    def _step(self, load: Load) -> float:
        """Bytes that a step takes."""
        return sum(load.of_step(self._spent)) + _FRAMING

    def _judging(self, pictures: int, load: Load) -> float:
        """Bytes that an evaluation takes."""
        return _EVALUATED * pictures / self._batch * load.of_step(self._spent)[0] + self._framing(pictures)

    def _framing(self, pictures: int) -> int:
        return _FRAMING * math.ceil(pictures / self._judged_at_once)

    def _to_rank(self, entry: int) -> float:
        """Bytes that choosing an entry's channels takes, in steps with all of them."""
        load = self._loads[entry]
        if load.width >= self._channels:
            return 0.0
        expected = sum(Load(self._channels, load.activation, load.gradient).of_step(self._spent))
        return self._ranking * max(expected, self._spent.ranked)

    # Checkpoints

    def state(self) -> dict[str, Any]:
        return {"spent": asdict(self._spent), "ends": self.ends}

    def restore(self, state: Mapping[str, Any]) -> None:
        up, down = state["spent"]["payloads"]
        self._spent = Spent(**{**state["spent"], "payloads": (up, down), "load": Load(**state["spent"]["load"])})
        self.ends = list(state["ends"])


def _whole(phase: Phase) -> Load:
    """Of an evaluation in the phase: it takes all that a nested one has."""
    return Load(phase.width, phase.activation_codec, phase.gradient_codec)


def _load(widths: tuple[int, ...], activation: str, gradient: str) -> Load:
    return Load(sum(widths) / len(widths), activation, gradient)
