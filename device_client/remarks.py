"""What a user may not have expected of a recipe and these pictures, said before a run begins; no errors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from common.recipe import Recipe
from common.schedule import courses, steps_per_epoch
from device_client.batches import Pictures, normalise
from device_client.data import Dataset

_SAMPLE = 1024  # of the numbers that are looked at


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
    if data.train.pictures.dtype == np.float32:
        yield from _far_from_usual(recipe, data.train.pictures[:_SAMPLE])
    rest = pictures % batch
    if any(0 < phase.views <= 1 for phase in recipe.schedule.phases) and 0.05 * pictures < rest < pictures:
        yield (
            f"data.batch is {batch:,}, so {rest:,} of {pictures:,} pictures are in no whole batch; a phase with one "
            f"view learns nothing from those"
        )
    warmup = recipe.optimiser.warmup
    for name, steps in courses(recipe, steps_per_epoch(pictures, batch)):
        if warmup > steps:
            yield f"optimiser.warmup is {warmup:,} steps, and {name} has {steps:,}: it never learns at its full rate"


def _far_from_usual(recipe: Recipe, numbers: Pictures) -> Iterator[str]:
    """Numbers come in any unit, and networks learn next to nothing from those that are far from 0, or from 1 apart."""
    made = normalise(numbers, recipe.data.mean, recipe.data.std)
    middle, spread = float(made.mean(dtype=np.float64)), float(made.std(dtype=np.float64))
    if abs(middle) > 3 or not 0.1 <= spread <= 10:
        mean, std = float(numbers.mean(dtype=np.float64)), float(numbers.std(dtype=np.float64))
        yield (
            f"by data.mean and data.std the head is given numbers around {middle:.3g}, {spread:.3g} apart, and learns "
            f"best from such around 0, 1 apart: these would be by mean = [{mean:.4g}] and std = [{std:.4g}]"
        )
