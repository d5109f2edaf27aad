"""Which phase comes when: pure functions of the recipe's schedule, and the plateau's small state.

The server decides, and its device is told. Both sides reckon by the recipe what is to be expected: whether a budget has
room for a run, and for the device's remarks and what its head learns alone, how many steps a course has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from common.draw import NESTED, generator
from common.recipe import PhaseRecipe, Recipe, ScheduleRecipe

# What a step of a phase does; split.proto says it in full.
LEARN, RANK, STORE, RECALL = "learn", "rank", "store", "recall"
KINDS = (LEARN, RANK, STORE, RECALL)  # in the order of the protocol's numbers
# Steps of a recall that a device asks for at once: none waits for a round trip, and Ctrl-C is soon heard. The device is
# not told what its server allows, so no server may allow less.
RECALLED = 64


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with one kind, one width, one codec setting and one course of the learning rate."""

    index: int
    from_step: int
    width: int
    activation_codec: str
    gradient_codec: str
    lr: float  # highest learning rate; it starts at step decay_from and has come down to 0 at decay_until
    decay_from: int
    decay_until: int
    order: tuple[int, ...] = ()  # bottleneck "channels": the most important first
    kind: str = LEARN
    flip: bool = False  # recall: mirror what was kept half of the time
    shift: int = 0  # recall: move it by up to so many places
    nested: tuple[int, ...] = ()  # narrower widths of which, and of `width`, each step draws one
    steps: int = 0  # of the whole run, as far as is known in this phase

    @property
    def frozen(self) -> bool:
        """Whether head and encoder stay as they are."""
        return self.kind in (STORE, RECALL)

    @property
    def widths(self) -> tuple[int, ...]:
        """All that its steps may have."""
        return (*self.nested, self.width)

    @property
    def mean_width(self) -> float:
        """Channels that cross in a step, on average."""
        return sum(self.widths) / len(self.widths)

    def width_at(self, seed: int, step: int) -> int:
        """The width of one step: a function of seed and step."""
        return self.widths[generator(seed, NESTED, step).integers(len(self.widths))] if self.nested else self.width


def phase_of_table(table: Mapping[str, Any]) -> Phase:
    """The phase that asdict() made `table` of, its lists read from JSON; KeyError or TypeError where it is none."""
    return Phase(**{**table, "order": tuple(table["order"]), "nested": tuple(table["nested"])})


def ranked_at(entry: PhaseRecipe, channels: int, sent: int) -> int:
    """How many channels cross while those that an entry sends are ranked, where `sent` did until then; 0 where there is
    nothing to choose."""
    width = entry.width or channels
    if min(width, *entry.nested, channels) == channels or (width == sent and not entry.nested):
        return 0  # all are sent, or those that were: no other could become one of them
    # A narrower width's are among those in front; a wider one's may be any.
    return sent if width <= sent else channels


def phase_of_entry(recipe: Recipe, entry: PhaseRecipe, channels: int, span: tuple[int, int] = (0, 0)) -> Phase:
    """The phase that an entry of the schedule is, from span[0] up to span[1], where all its steps are of one kind."""
    start, end = span
    return Phase(
        index=0, from_step=start, width=entry.width or channels, nested=entry.nested,
        activation_codec=entry.activation or recipe.codec.activation,
        gradient_codec=entry.gradient or recipe.codec.gradient,
        lr=entry.lr or recipe.optimiser.lr, decay_from=start, decay_until=end,
    )  # fmt: skip


def stretches(
    recipe: Recipe, entry: PhaseRecipe, channels: int, span: tuple[int, int], views: int, sent: int = 0
) -> list[Phase]:  # fmt: skip
    """The phases that one entry of the schedule comes to, from span[0] up to span[1], numbered from 0.

    One; or two where channels are chosen by rank and must be measured first, or where the server recalls what was
    sent in the first `views` steps. `sent`: how many channels were until then, chosen already; 0 where none are.
    """
    start, end = span
    phase = phase_of_entry(recipe, entry, channels, span)
    ranking = recipe.bottleneck.ranking_steps if recipe.bottleneck.kind == "channels" else 0
    # At least one step of the entry is left at its own width: a run that ended while ranking would have too many.
    ranking = min(ranking, end - start - 1)
    result = [phase]
    if entry.views:
        result = [replace(phase, kind=STORE)]
        if entry.views < entry.epochs:  # with as many there are none to recall, however their steps are rounded
            recalls = start + max(1, views)
            result.append(replace(phase, from_step=recalls, kind=RECALL, flip=entry.flip, shift=entry.shift))
    elif ranking > 0 and (width := ranked_at(entry, channels, sent)):
        result = [replace(phase, width=width, kind=RANK, nested=()), replace(phase, from_step=start + ranking)]
    # One without steps is left out.
    return [piece for piece in result if piece.from_step < end]


def steps_per_epoch(samples: int, batch: int) -> int:
    """Whole batches in `samples` pictures, the last, partial one left out; one where there are fewer than a batch."""
    return max(1, samples // batch)


def steps_of(epochs: float, per_epoch: int) -> int:
    return round(epochs * per_epoch)


def ends_of(schedule: ScheduleRecipe, per_epoch: int) -> list[int]:
    """For each entry of the schedule the step at which it is over."""
    ends = [steps_of(epochs, per_epoch) for epochs in accumulate(entry.epochs for entry in schedule.phases)]
    return [*ends[:-1], max(1, ends[-1])]  # a run shorter than half a step is one step of its last phase


def steps_asked(schedule: ScheduleRecipe, per_epoch: int) -> int | None:
    """Steps of a run that no budget shortens; None under a plateau."""
    return ends_of(schedule, per_epoch)[-1] if schedule.phases else None


def courses(recipe: Recipe, per_epoch: int) -> Iterator[tuple[str, int]]:
    """In how many steps the learning rate rises and falls, each time that it does, and what that is a part of."""
    schedule = recipe.schedule
    if recipe.local.epochs:
        yield "the head, alone,", max(1, steps_of(recipe.local.epochs, per_epoch))
    if schedule.kind == "plateau":
        yield "the run", schedule.max_epochs * per_epoch
        return
    ends = ends_of(schedule, per_epoch)
    if not recipe.optimiser.restart:
        yield "the run", ends[-1]
        return
    for number, (start, end) in enumerate(pairwise((0, *ends)), 1):
        if end > start:  # one that comes to no step is left out
            yield f"phase {number} of {len(ends)}", end - start


def never_warm(recipe: Recipe, per_epoch: int) -> Iterator[str]:
    """Words on each of the courses that is over before its learning rate has risen."""
    warmup = recipe.optimiser.warmup
    for name, steps in courses(recipe, per_epoch):
        if warmup > steps:
            yield f"optimiser.warmup is {warmup:,} steps, and {name} has {steps:,}: it never learns at its full rate"


def planned(recipe: Recipe, channels: int, per_epoch: int, sent: int = 0) -> tuple[list[Phase], int]:
    """All phases known beforehand, and the steps of the run (the most that it can take, under a plateau).

    `sent`: as many of the channels as an earlier run has chosen; 0 where it used all or there was none."""
    schedule = recipe.schedule
    if schedule.kind == "plateau":
        steps = schedule.max_epochs * per_epoch
        return stretches(recipe, schedule.entries[0], channels, (0, steps), 0, sent), steps
    ends = ends_of(schedule, per_epoch)
    return phases_of(recipe, channels, per_epoch, ends, sent), ends[-1]


def phases_of(recipe: Recipe, channels: int, per_epoch: int, ends: list[int], sent: int = 0) -> list[Phase]:
    """The phases of the schedule's entries, which are over at the steps `ends`; `sent` as in planned()."""
    result: list[Phase] = []
    for entry, start, end in zip(recipe.schedule.phases, [0, *ends], ends, strict=False):
        pieces = stretches(recipe, entry, channels, (start, end), steps_of(entry.views, per_epoch), sent)
        sent = pieces[-1].width if pieces else sent
        result += pieces
    return result if recipe.optimiser.restart else [run_long(phase, recipe, ends[-1]) for phase in result]


def run_long(phase: Phase, recipe: Recipe, steps: int) -> Phase:
    """The phase with the learning rate of a run that starts only once."""
    return replace(phase, lr=recipe.optimiser.lr, decay_from=0, decay_until=steps)


@dataclass(frozen=True)
class Plateau:
    """Where a plateau schedule stands: the width's place in the list, the best loss there, epochs without gain."""

    position: int = 0
    best: float = float("inf")
    stale: int = 0
    finished: bool = False


def after_validation(state: Plateau, loss: float, schedule: ScheduleRecipe) -> Plateau:
    """The state after one more epoch with this validation loss: gain, patience, next width, or the end."""
    if loss < state.best * (1 - schedule.min_gain):
        return replace(state, best=loss, stale=0)
    if state.stale + 1 < schedule.patience:
        return replace(state, stale=state.stale + 1)
    if state.position + 1 < len(schedule.widths):
        # A new width starts with its own best: right after a prune the loss is worse than before.
        return Plateau(position=state.position + 1)
    return replace(state, stale=state.stale + 1, finished=True)
