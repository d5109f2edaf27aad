"""What a user may not have expected of a recipe and these pictures, said before a run begins; no errors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from common.recipe import Recipe
from common.schedule import never_warm, steps_per_epoch
from device_client.batches import Pictures, normalise
from device_client.data import Dataset

_FEW = 0.05  # of the pictures, which nobody misses
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
        yield from _far_from_usual(recipe, data.train.pictures[:: max(1, pictures // _SAMPLE)])  # which may be sorted
    rest = pictures % batch
    if any(0 < phase.views <= 1 for phase in recipe.schedule.phases) and _FEW * pictures < rest < pictures:
        fits = next((size for size in range(batch, batch // 2, -1) if pictures % size <= _FEW * pictures), None)
        yield (
            f"data.batch is {batch:,}, so {rest:,} of {pictures:,} pictures are in no whole batch; a phase with one "
            f"view learns nothing from those{f': with {fits:,} it has next to all' if fits else ''}"
        )
    yield from never_warm(recipe, steps_per_epoch(pictures, batch))


def _far_from_usual(recipe: Recipe, numbers: Pictures) -> Iterator[str]:
    """Remarks on numbers that are no pixels: each channel has a unit of its own, and a network learns next to nothing
    where its mean is far from 0 or its standard deviation far from 1."""
    made = normalise(numbers, recipe.data.mean, recipe.data.std)
    middles, spreads = _by_channel(made)
    means, stds = _by_channel(numbers)
    for channel in np.flatnonzero(stds == 0):
        yield f"channel {channel} has the same number everywhere: nothing can be learnt from it"
    odd = np.flatnonzero((stds > 0) & ((np.abs(middles) > 3) | (spreads < 0.1) | (spreads > 10)))
    if len(odd):
        worst = max(odd, key=lambda channel: abs(middles[channel]) + abs(np.log(spreads[channel])))
        mean, std = _listed(np.where(stds > 0, means, 0)), _listed(np.where(stds > 0, stds, 1))
        yield (
            f"by data.mean and data.std the head is given numbers of mean {middles[worst]:.3g} and deviation "
            f"{spreads[worst]:.3g} in channel {worst}, and learns best from such of mean 0 and deviation 1: write "
            f"mean = [{mean}] and std = [{std}] in the recipe's [data]"
        )


def _listed(values: NDArray[np.float64]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _by_channel(numbers: Pictures) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of each channel."""
    return numbers.mean((0, 2, 3), dtype=np.float64), numbers.std((0, 2, 3), dtype=np.float64)
