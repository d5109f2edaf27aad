"""Which phase comes when: pure functions of the recipe's schedule, and the plateau's small state.

Called by the server's coordinator alone; the device is told.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from common.recipe import Recipe, ScheduleRecipe


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with one width and one codec setting."""

    index: int
    from_step: int
    width: int
    activation_codec: str
    gradient_codec: str
    order: tuple[int, ...] = ()  # bottleneck "channels": the most important first
    ranking: bool = False  # all channels cross, so that the server can measure what each is worth


@dataclass(frozen=True)
class Stretch:
    """A phase to come, before the order of its channels is known."""

    from_step: int
    width: int
    ranking: bool = False


def stretches(width: int, from_step: int, channels: int, ranking_steps: int) -> list[Stretch]:
    """The phases that sending `width` of `channels` from `from_step` on takes: one, or two where channels are
    chosen by rank and must be measured first (`ranking_steps` above 0)."""
    if ranking_steps and width < channels:
        return [Stretch(from_step, channels, True), Stretch(from_step + ranking_steps, width)]
    return [Stretch(from_step, width)]


def resolve(width: int, channels: int) -> int:
    """Channels that the recipe's `width` means at a cut of `channels`: 0 means all."""
    return width or channels


def steps_of(epochs: float, steps_per_epoch: int) -> int:
    return round(epochs * steps_per_epoch)


def planned(recipe: Recipe, channels: int, steps_per_epoch: int) -> tuple[list[Stretch], int]:
    """All phases known beforehand, and the steps of the run (the most that it can take, under a plateau)."""
    schedule = recipe.schedule
    ranking = recipe.bottleneck.ranking_steps if recipe.bottleneck.kind == "channels" else 0
    if schedule.kind == "plateau":
        first = stretches(resolve(schedule.widths[0], channels), 0, channels, ranking)
        return first, schedule.max_epochs * steps_per_epoch
    result: list[Stretch] = []
    epochs = 0.0
    for width, length in schedule.phases:
        start, end = steps_of(epochs, steps_per_epoch), steps_of(epochs + length, steps_per_epoch)
        epochs += length
        pieces = stretches(resolve(width, channels), start, channels, ranking)
        # A phase shorter than its ranking is measured for what there is of it; one without steps is left out.
        result += [piece for piece in pieces if piece.from_step < end]
    if not result:  # a run shorter than half a step is one step of its first phase
        result = stretches(resolve(schedule.phases[0][0], channels), 0, channels, 0)
    return result, max(1, steps_of(epochs, steps_per_epoch))


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
