"""What the head computes on: a step's batch, or all pictures of a part as they are; and the arithmetic that it uses.

Called by the trainer, by the stage in which the head learns alone, and by evaluate and predict.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from common import optim
from common.halves import Head
from common.processor import fits
from common.recipe import Recipe
from common.schedule import STORE, Phase, steps_per_epoch
from device_client import batches
from device_client.data import Part


def training_batch(
    recipe: Recipe, part: Part, step: int, batch: int, phase: Phase | None = None
) -> tuple[torch.Tensor, np.ndarray]:
    """Pictures [B, *input] and labels [B] of a step: a function of (seed, step), in a STORE phase also of its start."""
    ordered = step
    if phase and phase.kind == STORE:
        # Each picture is to cross once a view: the phase has epochs of its own, the first of which begins with it.
        epoch = steps_per_epoch(len(part), batch)
        ordered += -phase.from_step % epoch
    chosen = batches.indices(recipe.seed, ordered, len(part), batch)
    pictures = batches.augment(part.pictures[chosen], recipe.seed, step, recipe.data.crop, recipe.data.flip)
    return torch.from_numpy(batches.normalise(pictures, recipe.data.mean, recipe.data.std)), part.labels[chosen]


def batches_of(part: Part, recipe: Recipe, size: int) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Pictures [B, *input] and labels [B] of a part, unaugmented and in order, `size` at a time."""
    for start in range(0, len(part), size):
        pictures = batches.normalise(part.pictures[start : start + size], recipe.data.mean, recipe.data.std)
        yield torch.from_numpy(pictures), part.labels[start : start + size]


def sent_batches(
    head: Head, part: Part, recipe: Recipe, size: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the head in its present mode sends for a part's pictures, unaugmented, `size` at a time, by default as many
    as the recipe judges at once: ([B, width, ...], labels [B]).

    It computes on no more of them at once than a step of training has, which is what the device has memory for.
    """
    size = size or recipe.data.evaluation_batch
    for start in range(0, len(part), size):
        batch = Part(part.pictures[start : start + size], part.labels[start : start + size])
        sent, done = np.empty(0, np.float32), 0
        for inputs, _ in batches_of(batch, recipe, recipe.data.batch):
            with torch.no_grad(), computing(head.processor, recipe, "an evaluation's batch"):
                made = head(inputs).cpu().numpy()
            if not done:
                sent = np.empty((len(batch), *made.shape[1:]), np.float32)
            sent[done : done + len(made)] = made
            done += len(made)
        yield sent, batch.labels


@contextlib.contextmanager
def computing(processor: torch.device, recipe: Recipe, what: str) -> Iterator[None]:
    """The head's arithmetic on `processor`; ModelError where `what` does not fit into that card."""
    with fits(what, processor), optim.arithmetic(recipe.precision, processor.type):
        yield
