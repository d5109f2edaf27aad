"""How far a run may go so that it spends no more than its recipe allows. Called by the coordinator alone.

Steps of one phase cost about the same, so what they have cost says what the others will; phases that are still to
come are estimated from their widths and codecs until they begin. All is a function of bytes that are the same in each
run, so a run that is made again, after a fault, goes exactly as far.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from common.codecs import codec
from common.recipe import Recipe
from common.room import FIRST
from common.schedule import RANK, Phase, ends_of, phase_of_entry, ranked_at

# Steps between two judgements of a phase by what they cost; the first is after FIRST.
_EVERY = 16
_MEMORY = 64  # steps that a running mean looks back
# The plan changes only where the rest of the run would change by more than this share.
_NOTICEABLE = 0.02
# How much more than in training a picture may take in an evaluation: batch norm and rounding are not the same there.
_EVALUATED = 1.1
# Bytes around the payloads of a step, at most. The messages are not measured, for they may differ by some bytes between
# a run and the same run after a fault, and both must go exactly as far.
_FRAMING = 256
# There is another step only if so many of its kind can be paid for: itself, and a margin.
_AHEAD = 1.5


@dataclass(frozen=True)
class Load:
    """What decides how many bytes a step takes: channels that cross, on average, and the codecs."""

    width: float
    activation: str
    gradient: str

    def of_step(self, spent: Spent) -> tuple[float, float]:
        """Bytes up and down of a step, from what `spent` says of another load."""
        width, before = self.width / spent.load.width, spent.load
        up = width * codec(self.activation).bits / codec(before.activation).bits
        down = width * codec(self.gradient).bits / codec(before.gradient).bits
        return spent.up * up, spent.down * down


def _step_load(phase: Phase) -> Load:
    return Load(phase.mean_width, phase.activation_codec, phase.gradient_codec)


def _judging_load(phase: Phase) -> Load:
    """An evaluation takes all the channels that a nested phase has."""
    return Load(phase.width, phase.activation_codec, phase.gradient_codec)


@dataclass
class Spent:
    """What the run has spent, in bytes, and on what of late."""

    payloads: tuple[int, int] = (0, 0)  # up and down, of all roles
    framing: int = 0
    load: Load = Load(0, "", "")  # that `steps`, `up` and `down` are of
    steps: int = 0
    up: float = 0.0  # a step of late
    down: float = 0.0
    ranked: int = 0  # the dearest step that ranked all channels: narrower ones say less of what the next will take

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
        # Of each entry of the schedule: a step's load, and an evaluation's.
        self._entries = recipe.schedule.phases
        phases = [phase_of_entry(recipe, entry, channels) for entry in self._entries]
        self._step_loads = [_step_load(phase) for phase in phases]
        self._judging_loads = [_judging_load(phase) for phase in phases]
        self._channels, self._seed = channels, recipe.seed
        self._ranking = recipe.bottleneck.ranking_steps if recipe.bottleneck.kind == "channels" else 0
        self.ends = ends_of(recipe.schedule, steps_per_epoch)
        self._asked = [end - start for start, end in pairwise((0, *self.ends))]
        self._epoch = steps_per_epoch
        self._validation, self._test = beside.validation, beside.test
        self._batch, self._judged_at_once = batch, recipe.data.evaluation_batch
        self._spent = Spent()

    def book(self, up: int, down: int, phase: Phase | None = None, step: int = 0) -> None:
        """The run's payloads have come to so many bytes in all: by `step`, which is of `phase`, or, without one, by
        whatever else was sent."""
        spent = self._spent
        sent_up, sent_down = up - spent.payloads[0], down - spent.payloads[1]
        spent.payloads = up, down
        if not phase:
            if sent_up:
                spent.framing += self._framing(self._validation)
            return
        spent.framing += _FRAMING
        if self._ranks_all(phase):
            spent.ranked = max(spent.ranked, sent_up + sent_down)
        load = _step_load(phase)
        # Of nested widths it had one; it says what one of their mean width would take.
        of_mean = load.width / phase.width_at(self._seed, step)
        if spent.load != load:
            spent.load, spent.steps = load, 0
        spent.steps += 1
        share = 1 / min(spent.steps, _MEMORY)
        spent.up = sent_up * of_mean * share + spent.up * (1 - share)
        spent.down = sent_down * of_mean * share + spent.down * (1 - share)

    def allows(self, done: int, present: Phase, coming: Phase, tested: Phase, validates: bool) -> bool:
        """Whether there is enough left for one more step than the `done` ones, which is of phase `coming`.

        Before it come the step that was just made, of phase `present`, which is not booked yet, and, with `validates`,
        a validation in that phase; after it the test, in phase `tested`.
        """
        spent = self._spent
        if not spent.steps:
            return True
        step = self._bytes_of(coming, done)
        ahead = self._bytes_of(present, done - 1) + _AHEAD * step + self._judging(self._test, _judging_load(tested))
        if coming.kind == RANK:  # it is not over before all its steps are made, and the next phase has begun
            ahead += self._ranking * step
        elif coming is not present:
            ahead += step  # what it costs is an estimate until it has begun
        if validates:
            ahead += self._judging(self._validation, _judging_load(present))
        return spent.total + ahead <= self._allowed

    def _bytes_of(self, phase: Phase, step: int) -> float:
        """Bytes that one step of a phase takes, whose width is known."""
        takes = self._bytes_at(replace(_step_load(phase), width=phase.width_at(self._seed, step)))
        return max(takes, self._spent.ranked + _FRAMING) if self._ranks_all(phase) else takes

    def _ranks_all(self, phase: Phase) -> bool:
        return phase.kind == RANK and phase.width == self._channels

    @property
    def shortens(self) -> bool:
        """Whether the run is planned to be shorter than its recipe asks for."""
        return self.ends[-1] < sum(self._asked)

    def fit(self, done: int) -> bool:
        """Plan anew after `done` steps, the last of which is not booked yet; whether `ends` changed."""
        spent, entry = self._spent, self._entry(done - 1)
        if spent.steps < FIRST or spent.steps % _EVERY != FIRST % _EVERY:
            return False
        ends = self._plan(done, range(entry, len(self._step_loads)))
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
        self.ends = self._plan(done, range(entry + 1, len(self._step_loads)))

    def _plan(self, done: int, coming: range) -> list[int]:
        """`ends` with as much of the entries `coming`, in the proportions that were asked for, as can be paid for."""
        entry = coming[0]
        start = self.ends[entry - 1] if entry else 0
        costs = {other: self._bytes_at(self._step_loads[other]) for other in coming}
        if self.ends[-1] >= self._epoch:  # a run that is shorter has no validation
            for other in coming:
                costs[other] += self._judging(self._validation, self._judging_loads[other]) / self._epoch
        share, last = self._share(done, start, coming, costs)
        ends = list(self.ends)
        ends[entry] = max(done, start + round(self._asked[entry] * share))
        for other in range(entry + 1, len(ends)):
            ends[other] = ends[other - 1] + (round(self._asked[other] * share) if other <= last else 0)
        return [min(end, sum(self._asked)) for end in ends]  # each was rounded by itself

    def _share(self, done: int, start: int, coming: range, costs: Mapping[int, float]) -> tuple[float, int]:
        """Which share of the steps that were asked for can be paid for in each of the entries `coming`, the first of
        which began at step `start`, and which of them is to be the run's last. `costs`: bytes of a step of each."""
        entry = coming[0]
        # What the run takes beside its steps if it ends in one entry or another.
        beside, ranked = {}, 0.0
        for last in coming:
            ranked += self._to_rank(last) if last > entry else 0.0
            beside[last] = ranked + self._judging(self._test, self._judging_loads[last])
        for last in reversed(coming):
            kept = range(entry, last + 1)
            wanted = sum(self._asked[other] * costs[other] for other in kept)
            if not wanted:  # entries that come to no step
                return 0.0, last
            left = self._allowed - self._spent.total - costs[entry] - beside[last]
            share = (left + (done - start) * costs[entry]) / wanted
            # No more steps in all than were asked for: where earlier entries had fewer, these may have more.
            most = (sum(self._asked) - start) / sum(self._asked[other] for other in kept)
            if share >= most and last == len(self._step_loads) - 1:
                return most, last  # all can be paid for, whatever is beside it
            share = max(0.0, min(share, most))
            # The last entry is left out, so that the others have more, where what it takes beside its steps is more
            # than these, or where it would end before it is known whether one more step can be paid for.
            steps = share * self._asked[last]
            if last == entry or (steps >= _AHEAD and steps * costs[last] >= beside[last] - beside[last - 1]):
                return share, last
        raise AssertionError("the first entry is never left out")

    def _entry(self, step: int) -> int:
        """The entry of the schedule that a step lies in."""
        return min(bisect_right(self.ends, step), len(self.ends) - 1)

    def _bytes_at(self, load: Load) -> float:
        """Bytes that a step takes."""
        return sum(load.of_step(self._spent)) + _FRAMING

    def _judging(self, pictures: int, load: Load) -> float:
        """Bytes that an evaluation takes."""
        return _EVALUATED * pictures / self._batch * load.of_step(self._spent)[0] + self._framing(pictures)

    def _framing(self, pictures: int) -> int:
        return _FRAMING * math.ceil(pictures / self._judged_at_once)

    def _to_rank(self, entry: int) -> float:
        """Bytes that choosing an entry's channels takes, in steps with all that they may be of."""
        load = self._step_loads[entry]
        if self._entries[entry].views:  # what the server is to keep is of the channels chosen before
            return 0.0
        # Chosen are those of the last one that comes to a step.
        spans = pairwise((0, *self.ends))
        before = [one for one, (start, end) in zip(self._entries[:entry], spans, strict=False) if end > start][-1]
        ranked = ranked_at(self._entries[entry], self._channels, before.width or self._channels)
        expected = sum(Load(ranked, load.activation, load.gradient).of_step(self._spent))
        return self._ranking * (expected if ranked < self._channels else max(expected, self._spent.ranked))

    # Checkpoints

    def state(self) -> dict[str, Any]:
        return {"spent": asdict(self._spent), "ends": self.ends}

    def restore(self, state: Mapping[str, Any]) -> None:
        up, down = state["spent"]["payloads"]
        self._spent = Spent(**{**state["spent"], "payloads": (up, down), "load": Load(**state["spent"]["load"])})
        self.ends = list(state["ends"])
