"""A linear bottleneck starts from principal components of what the device sends; called by the trainer, once a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from common.bottleneck import LinearEncoder
from common.importance import principal_components
from device_client import batches
from device_client.data import Part
from device_client.inputs import sent_batches

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
    trainer.head.eval()
    count = min(trainer.recipe.bottleneck.principal_pictures, len(trainer.data.train))
    # Some of all classes: a folder lists one after the other.
    chosen = batches.order(trainer.recipe.seed, 0, len(trainer.data.train))[:count]
    part = Part(trainer.data.train.pictures[chosen], trainer.data.train.labels[chosen])
    sent = (torch.from_numpy(batch) for batch, _ in sent_batches(trainer.head, part, trainer.recipe))
    told, trainer.remote.sensitivity = trainer.remote.sensitivity, None
    if told is not None:
        trainer.felt = torch.from_numpy(told.copy())
    components, mean = principal_components(sent, trainer.felt)
    trainer.felt = None
    encoder.rotate(components, mean)
    trainer.basis = np.concatenate([components.numpy(), mean.numpy()[None]])
    trainer.remote.send_basis(trainer.basis)
