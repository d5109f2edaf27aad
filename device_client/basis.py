"""A linear bottleneck starts from principal components of what the device sends; called by the trainer, once a run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from common import halves
from common.bottleneck import LinearEncoder
from common.halves import Head
from common.importance import principal_components
from common.norms import undisturbed
from common.recipe import Recipe
from device_client import batches
from device_client.data import Part
from device_client.inputs import batches_of, computing, sent_batches


@torch.no_grad()
def principal_basis(head: Head, train: Part, recipe: Recipe, batch: int, sensitivity: Tensor | None) -> np.ndarray:
    """Have the head's bottleneck send principal components of what it sends of `train` now.

    Returns what the server needs to undo that: components as rows, then the mean, float32 [C + 1, C].

    `batch`: pictures of a step. `sensitivity` [C, C]: by which the components are weighted, where it is known.
    """
    encoder = head.bottleneck
    assert isinstance(encoder, LinearEncoder)
    encoder.resize(encoder.channels)
    count = min(recipe.bottleneck.principal_pictures, len(train))
    # Where batch norm has no statistics yet, and is to learn some, activations are taken as in training, where each
    # batch is normalised by its own.
    schedule = recipe.schedule
    fresh = not (recipe.model.init or recipe.local.epochs or (schedule.phases and schedule.phases[0].views))
    if fresh:
        count = max(batch, count - count % batch)  # whole batches
        halves.reseed(recipe.seed, 0, "head")
    head.train(fresh)
    # Some of all classes: a folder lists one after the other.
    chosen = batches.order(recipe.seed, 0, len(train))[:count]
    part = Part(train.pictures[chosen], train.labels[chosen])
    sent = _sent_in_training(head, part, recipe, batch) if fresh else _sent(head, part, recipe)
    with undisturbed(head):
        components, mean = principal_components(sent, sensitivity)
    encoder.rotate(components, mean)
    return np.concatenate([components.numpy(), mean.numpy()[None]])


def _sent(head: Head, part: Part, recipe: Recipe) -> Iterator[Tensor]:
    return (torch.from_numpy(batch) for batch, _ in sent_batches(head, part, recipe))


def _sent_in_training(head: Head, part: Part, recipe: Recipe, batch: int) -> Iterator[Tensor]:
    """In batches as large as those of a step."""
    for inputs, _ in batches_of(part, recipe, batch):
        with computing(head.processor, recipe, "a batch"):
            yield head(inputs).cpu()
