"""A linear bottleneck starts from principal components of what the device sends; called by the trainer, once a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common import halves
from common.bottleneck import LinearEncoder
from common.importance import principal_components
from common.norms import undisturbed
from device_client import batches
from device_client.data import Part
from device_client.inputs import batches_of, computing, sent_batches

if TYPE_CHECKING:
    from device_client.trainer import Trainer


@torch.no_grad()
def rotate(trainer: Trainer) -> None:
    """Turn the bottleneck into the principal components of what is sent, and tell the server.

    They are weighted by what the loss feels, where the head's own classifier or the server has said that.
    """
    encoder = trainer.head.bottleneck
    assert isinstance(encoder, LinearEncoder)
    encoder.resize(trainer.channels)
    count = min(trainer.recipe.bottleneck.principal_pictures, len(trainer.data.train))
    # Where batch norm has no statistics yet, and is to learn some, what is sent is normalised by those of its batch.
    schedule, recipe = trainer.recipe.schedule, trainer.recipe
    fresh = not (recipe.model.init or recipe.local.epochs or (schedule.phases and schedule.phases[0].views))
    if fresh:
        count = max(trainer.batch, count - count % trainer.batch)  # whole batches
        halves.reseed(recipe.seed, 0, "head")
    trainer.head.train(fresh)
    # Some of all classes: a folder lists one after the other.
    chosen = batches.order(trainer.recipe.seed, 0, len(trainer.data.train))[:count]
    part = Part(trainer.data.train.pictures[chosen], trainer.data.train.labels[chosen])
    sent = _sent_in_training(trainer, part) if fresh else _sent(trainer, part)
    told, trainer.remote.sensitivity = trainer.remote.sensitivity, None
    if told is not None:
        trainer.felt = torch.from_numpy(told.copy())
    with undisturbed(trainer.head):
        components, mean = principal_components(sent, trainer.felt)
    trainer.felt = None
    encoder.rotate(components, mean)
    trainer.basis = np.concatenate([components.numpy(), mean.numpy()[None]])
    trainer.remote.send_basis(trainer.basis)


def _sent(trainer: Trainer, part: Part) -> Iterator[Tensor]:
    return (torch.from_numpy(batch) for batch, _ in sent_batches(trainer.head, part, trainer.recipe))


def _sent_in_training(trainer: Trainer, part: Part) -> Iterator[Tensor]:
    """In batches as large as those of a step."""
    for inputs, _ in batches_of(part, trainer.recipe, trainer.batch):
        with computing(trainer.head, trainer.recipe, "a batch"):
            yield trainer.head(inputs).cpu()
