"""Switches phases: after each step it says what the next one is, and both sides follow at that very step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from common import schedule
from common.importance import rank_channels, reorder
from common.meter import DOWN, UP, Meter
from common.recipe import Recipe
from common.rpc import split_pb2 as pb
from common.schedule import RANK, RECALL, Phase, Plateau, phase_of_table
from edge_server.budget import Budget


@dataclass(frozen=True)
class Decision:
    """What comes after a step or a validation; `phase` is None where it stays the same."""

    then: pb.Then
    phase: Phase | None = None


class Coordinator:
    """One run's phases. `steps` is the length of the run as it is planned now, under a plateau the most it can take."""

    def __init__(
        self, recipe: Recipe, channels: int, steps_per_epoch: int, budget: Budget | None = None,
        known: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        """`known`: the only channels that an earlier run trained the network with; empty where it used all or there
        was none."""
        self._recipe = recipe
        self._channels = channels
        self._steps_per_epoch = steps_per_epoch
        self._known = len(known)
        self._upcoming, self.steps = schedule.planned(recipe, channels, steps_per_epoch, self._known)
        self._plateau, self._budget = Plateau(), budget
        self._scores = torch.zeros(channels)
        rest = tuple(channel for channel in range(channels) if channel not in known)
        self._order = known + rest if recipe.bottleneck.kind == "channels" else ()
        self._sent = len(known)  # channels chosen so far; they stay in front of the order
        self.phases: list[Phase] = []
        self._validated: tuple[int, Decision] | None = None
        self._advance()

    @property
    def phase(self) -> Phase:
        return self.phases[-1]

    @property
    def recalls(self) -> bool:
        """Whether what the device sends in the present phase is learnt from again in the next."""
        return bool(self._upcoming) and self._upcoming[0].kind == RECALL

    def observe(self, activation: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take the channels' worth from a step of a ranking phase: activation and gradient as they are sent, both
        [B, w, ...], all channels in their own order, fewer in that of their worth so far."""
        worth = rank_channels(activation, gradient).to(self._scores)
        if len(worth) == self._channels:
            self._scores += worth
        else:
            self._scores[list(self._order[: len(worth)])] += worth

    def book(self, meter: Meter, phase: Phase | None = None, step: int = 0) -> None:
        """Take in what the run has spent up to now, with `phase` by `step`, which is one of it."""
        if self._budget:
            self._budget.book(meter.total(UP).payload, meter.total(DOWN).payload, phase, step)

    def after_step(self, step: int) -> Decision:
        """What follows `step`."""
        done = step + 1
        validate = self._recipe.data.validation > 0 and done % self._steps_per_epoch == 0
        if self._budget:
            has_room = self._keep_within(self._budget, done)
            validate = validate and has_room
        if done >= self.steps:
            return Decision(pb.FINISH)
        # A validation is of the phase that has been trained: the next begins with its verdict.
        return Decision(pb.VALIDATE) if validate else Decision(pb.STEP, self._switch(done))

    def _keep_within(self, budget: Budget, done: int) -> bool:
        """Plan anew, or end the run, where the budget has no room for what was planned after `done` steps; whether it
        has room for a validation now."""
        self._fit(budget, done)
        coming, tested = self._ahead(done)
        # Not while channels are ranked: a run that ended there would be tested, and used, with too many.
        if self.phase.kind != RANK and not budget.allows(done, self.phase, coming, tested, validates=False):
            self._end(budget, done)
            coming, tested = self._ahead(done)
        # A budget goes with a fixed list of phases, where a validation decides nothing. In a run that is shortened its
        # bytes are better spent on steps, above all while channels are ranked: it would send as many.
        if self.phase.kind == RANK and budget.shortens:
            return False
        return budget.allows(done, self.phase, coming, tested, validates=True)

    def after_validation(self, step: int, loss: float) -> Decision:
        """What follows a validation made after `step`: under a plateau schedule another width or the end, perhaps.

        The same decision again where a validation is made once more because its verdict was lost.
        """
        if self._validated and self._validated[0] == step:
            return self._validated[1]
        decision = self._validation(step, loss)
        self._validated = step, decision
        return decision

    def _validation(self, step: int, loss: float) -> Decision:
        if self._recipe.schedule.kind != "plateau" or self.phase.kind == RANK:  # its loss is that of more channels
            return Decision(pb.STEP, self._switch(step + 1))
        before = self._plateau.position
        self._plateau = schedule.after_validation(self._plateau, loss, self._recipe.schedule)
        if self._plateau.finished:
            return Decision(pb.FINISH)
        if self._plateau.position != before:
            entry = self._recipe.schedule.entries[self._plateau.position]
            span = step + 1, self.steps
            coming = schedule.stretches(self._recipe, entry, self._channels, span, 0, self._sent)
            self._upcoming = [schedule.run_long(phase, self._recipe, self.steps) for phase in coming]
        return Decision(pb.STEP, self._switch(step + 1))

    def _ahead(self, done: int) -> tuple[Phase, Phase]:
        """The phase of the next step, and the one that the run is tested in if it ends soon after."""
        coming = self._upcoming if self._due(done) else [self.phase, *self._upcoming]
        return coming[0], self._tested(coming)

    def _tested(self, coming: list[Phase]) -> Phase:
        """The first of these phases that does more than rank channels."""
        return next((phase for phase in coming if phase.kind != RANK), self.phase)

    def _due(self, step: int) -> bool:
        """Whether the next phase begins at `step`."""
        return bool(self._upcoming) and self._upcoming[0].from_step <= step

    def _switch(self, step: int) -> Phase | None:
        """Begin the next phase if it begins at `step`: that phase, or None."""
        return self._advance() if self._due(step) else None

    def _fit(self, budget: Budget, done: int) -> None:
        """Follow the budget where it has come to another length of the run."""
        if self.phase.kind != RANK and not self._due(done) and budget.fit(done):
            self._follow(budget, done)

    def _end(self, budget: Budget, done: int) -> None:
        """End the run, unless steps of another phase than the planned one can still be paid for.

        If the next phase is due and is what costs too much, the present one goes on instead. If the present one costs
        too much, for a test now would be made at its width, the next begins at once.
        """
        if self._due(done):
            budget.stay(done)
            self._follow(budget, done)
            if budget.allows(done, self.phase, self.phase, self.phase, validates=False):
                return
        elif self._upcoming:
            coming = self._upcoming
            if budget.allows(done, self.phase, coming[0], self._tested(coming), validates=False):
                budget.leave(done)
                self._follow(budget, done)
                # What comes now may be another phase, and dearer: entries for which little was left come to no step.
                if budget.allows(done, self.phase, *self._ahead(done), validates=False):
                    return
        self.steps = done

    def _follow(self, budget: Budget, done: int) -> None:
        """Take over the phases as the budget plans them now.

        What is left of the present one becomes a phase of its own, by which the device is told of the run's new length.
        """
        phases = schedule.phases_of(self._recipe, self._channels, self._steps_per_epoch, budget.ends, self._known)
        self._upcoming = [phase for phase in phases if phase.from_step >= done]
        self.steps = budget.ends[-1]
        if not self._due(done):
            rest = [phase for phase in phases if phase.from_step < done][-1]
            if rest.kind == RANK:  # the entry is longer now, and so its ranking; but its channels are chosen already
                rest = self._upcoming.pop(0)
            self._upcoming.insert(0, replace(rest, from_step=done))

    def _advance(self) -> Phase:
        """Begin the next phase; after a ranking with the order of channels that came of it."""
        coming = self._upcoming.pop(0)
        if self.phases and self.phase.kind == RANK:
            self._order = reorder(self._order, self._sent, self._scores)
            self._scores.zero_()
        if self._order and coming.kind != RANK:
            self._sent = coming.width
        self.phases.append(replace(coming, index=len(self.phases), order=self._order, steps=self.steps))
        return self.phase

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON."""
        return {
            "upcoming": [asdict(phase) for phase in self._upcoming], "phases": [asdict(phase) for phase in self.phases],
            "plateau": asdict(self._plateau), "scores": self._scores.tolist(), "order": self._order, "sent": self._sent,
            "known": self._known,
            "validated": self._validated and [
                self._validated[0], self._validated[1].then,
                asdict(self._validated[1].phase) if self._validated[1].phase else None,
            ],
            "steps": self.steps, "budget": self._budget.state() if self._budget else None,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where the coordinator stood that told this."""
        self._upcoming = [phase_of_table(table) for table in state["upcoming"]]
        self.phases = [phase_of_table(table) for table in state["phases"]]
        self._plateau = Plateau(**state["plateau"])
        # float32 to JSON's float64 and back is exact.
        self._scores = torch.tensor(state["scores"])
        self._order, self._sent, self._known = tuple(state["order"]), state["sent"], state["known"]
        self.steps = state["steps"]
        if self._budget:
            self._budget.restore(state["budget"])
        if state["validated"]:
            step, then, phase = state["validated"]
            self._validated = step, Decision(then, phase_of_table(phase) if phase else None)
