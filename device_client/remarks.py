"""What a user may not have expected of a recipe and these pictures, said before a run begins; no errors."""

from __future__ import annotations

from collections.abc import Iterator

from common.recipe import Recipe
from common.schedule import courses
from device_client.data import Dataset


def remarks(recipe: Recipe, data: Dataset, *, begun: bool) -> Iterator[str]:
    """Sentences without their full stop; of a run that has `begun` before, those that still matter."""
    pictures, batch = len(data.train), recipe.data.batch
    if data.scaled:
        _, height, width = recipe.model.input
        yield f"pictures are scaled to the model's {width}x{height}, not cropped; {data.scaled}"
    if batch > pictures:
        yield f"data.batch is {batch:,}, more than there are pictures: a step takes all {pictures:,}"
    if begun:
        return
    rest = pictures % batch
    if any(0 < phase.views <= 1 for phase in recipe.schedule.phases) and 0.05 * pictures < rest < pictures:
        yield (
            f"data.batch is {batch:,}, so {rest:,} of {pictures:,} pictures are in no whole batch; a phase with one "
            f"view learns nothing from those"
        )
    warmup = recipe.optimiser.warmup
    for name, steps in courses(recipe, max(1, pictures // batch)):
        if warmup > steps:
            yield f"optimiser.warmup is {warmup:,} steps, and {name} has {steps:,}: it never learns at its full rate"
