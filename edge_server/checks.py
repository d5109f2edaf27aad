"""Whether a recipe's model, cut and schedule fit each other: asked once, before a server waits for its device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from common import weights, wire, words
from common.errors import ModelError
from common.halves import Halves
from common.norms import undisturbed
from common.recipe import Recipe
from common.schedule import phase_of_entry


def require_elements(recipe: Recipe, halves: Halves, most: int) -> None:
    """ModelError where one batch at full width comes to more than the `most` elements that may cross in one tensor."""
    pictures = max(recipe.data.batch, recipe.data.evaluation_batch)
    largest = math.prod(halves.sent_shape(pictures, halves.channels))
    if largest > most:
        raise ModelError(
            f"an activation of {largest:,} elements would cross the link; at most {most:,} may: lower data.batch or "
            f"data.evaluation_batch, cut later, or raise --max-elements"
        )


def require_head(recipe: Recipe, halves: Halves) -> None:
    """ModelError where a device would refuse the weights of its own half, for their size."""
    size = weights.room(halves.head)
    if size > wire.MAX_WEIGHTS_BYTES:
        raise ModelError(
            f"the weights before the cut {recipe.model.cut} are {words.size(size)}; a device takes up to "
            f"{words.size(wire.MAX_WEIGHTS_BYTES)}: cut earlier"
        )


def require_schedule(recipe: Recipe, halves: Halves) -> None:
    """ModelError where the schedule asks for what the cut has not: flips and shifts of what is no map, widths above its
    channels, nested ones that are no narrower, channels by a rank that nothing has measured."""
    channels = halves.channels
    largest_shift = max((phase.shift for phase in recipe.schedule.phases), default=0)
    moves = largest_shift or any(phase.flip for phase in recipe.schedule.phases)
    if moves and (len(halves.cut) != 3 or largest_shift >= min(halves.cut[1:])):
        how = f"shifts what was kept by {largest_shift} places" if largest_shift else "flips what was kept"
        raise ModelError(
            f"the schedule {how}, which an activation of shape {list(halves.cut)} at the cut {recipe.model.cut} does "
            f"not allow; leave that out"
        )
    for entry in recipe.schedule.phases:
        phase = phase_of_entry(recipe, entry, channels)
        if phase.nested and max(phase.nested) >= phase.width:
            raise ModelError(
                f"the schedule has nested {list(phase.nested)}, and {phase.width} channels cross at most "
                f"in that phase: give narrower ones"
            )
    ranked = recipe.bottleneck.kind != "channels"  # channels have an order by now, or need none
    for entry in recipe.schedule.phases:
        narrow = min(phase_of_entry(recipe, entry, channels).widths) < channels
        if narrow and entry.views and not ranked:
            raise ModelError(
                'bottleneck.kind "channels" ranks them by their gradients, and none comes back in a phase with views: '
                "put a phase without views before it that is narrower than all channels, or choose linear"
            )
        ranked = ranked or (narrow and not entry.views)
    too_wide = [entry.width for entry in recipe.schedule.entries if entry.width > channels]
    if too_wide:
        raise ModelError(
            f"the schedule has width {too_wide[0]}, but only {channels} channels cross the cut {recipe.model.cut}; "
            f"give 1 to {channels}, or 0 for all"
        )


def require_output(recipe: Recipe, halves: Halves) -> None:
    """ModelError where the model does not end in a number for each class: better now than in the first step."""
    halves.head.eval(), halves.tail.eval()

    def forward(pictures: torch.Tensor) -> object:
        return halves.tail.layers(halves.tail.bottleneck(halves.head(pictures)))

    require_logits(recipe.model.name, recipe.model.input, recipe.model.classes, forward)


def require_logits(model: str, shape: tuple[int, ...], classes: int, forward: Callable[[torch.Tensor], object]) -> None:
    """ModelError where what `forward` of `model` makes of one picture of `shape` is not [1, classes]."""
    try:
        with torch.no_grad():
            logits = forward(torch.zeros(1, *shape))
    except Exception as error:  # forward is anybody's code
        raise ModelError(
            f"the model {model} cannot take one picture by itself, as predict gives it ({words.one_line(error)}); "
            f"does it call squeeze() without a dimension?"
        ) from error
    if isinstance(logits, torch.Tensor) and logits.shape == (classes,):
        raise ModelError(
            f"the model {model} drops the first dimension where it is given one picture, as predict does; name the "
            f"dimensions in squeeze(), as in x.squeeze((2, 3))"
        )
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, classes):
        what = f"of shape {list(logits.shape[1:])}" if isinstance(logits, torch.Tensor) else "that is no tensor"
        raise ModelError(
            f"the model {model} has an output {what}; {classes} numbers a picture were expected, one for each class: "
            f"change the number of classes, or the model"
        )


def require_batch(recipe: Recipe, halves: Halves, samples: int = 2) -> None:
    """ModelError where the model cannot be trained with the recipe's batch, or with no more than `samples` pictures:
    batch norm needs two numbers a channel."""
    pictures = min(2, recipe.data.batch, samples)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), undisturbed(halves.head, halves.tail):
            halves.head.train(), halves.tail.train()
            halves.tail.layers(halves.tail.bottleneck(halves.head(torch.zeros(pictures, *recipe.model.input))))
    except ValueError as error:
        cure = "give more" if pictures == 1 else "change the model"
        batch = f"data.batch = {recipe.data.batch}" if pictures < samples else "one picture"
        raise ModelError(f"the model {recipe.model.name} cannot be trained with {batch} ({error}); {cure}") from error
    finally:
        halves.head.eval(), halves.tail.eval()


def wasteful(recipe: Recipe, halves: Halves) -> Iterator[str]:
    """Words for the operator about what costs bytes or time for nothing: a model or a head that cannot learn, widths
    that never come, validation pictures that cross after each epoch though the head is frozen."""
    learns = any(parameter.requires_grad for parameter in halves.head.parameters())
    views = [phase.views for phase in recipe.schedule.phases]
    if not learns and not any(parameter.requires_grad for parameter in halves.tail.layers.parameters()):
        yield f"no parameter of the model {recipe.model.name} has requires_grad: nothing of it learns"
    if not learns and not all(views):
        yield (
            f"nothing before the cut {recipe.model.cut} learns, and gradients are sent there all the same: give the "
            f"schedule's phases views, and nothing is sent down and each picture up but once a view"
        )
    schedule = recipe.schedule
    # The first validation is a gain, and the last epoch ends the run.
    if len(schedule.widths) > 1 and schedule.max_epochs < schedule.patience + 2:
        yield (
            f"schedule.max_epochs is {schedule.max_epochs}, and a width takes {schedule.patience + 1} epochs or more "
            f"(schedule.patience is {schedule.patience}): the next never comes"
        )
    if any(views) and recipe.data.validation:
        yield (
            "the validation part crosses after each epoch, in phases with views too, where it may come to more than "
            "all else: leave data.validation out if bytes count"
        )
