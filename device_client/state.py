"""What a checkpoint of the device holds, and how the trainer gets it back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common import optim, weights
from common.checkpoint import Checkpoint, part
from common.errors import DataError
from common.progress import RunningMean
from common.run import HEAD
from common.schedule import phase_of_table
from common.words import some
from device_client.data import Dataset, Part

if TYPE_CHECKING:
    from device_client.trainer import Trainer


def state_of(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of the head, copied, and of its optimiser, and the rest as JSON."""
    tensors = {f"head.{name}": value.to("cpu", copy=True) for name, value in trainer.head.state_dict().items()}
    tensors |= {f"optimiser.{name}": value for name, value in optim.tensors_of(trainer.optimiser).items()}
    if trainer.step == 0 and trainer.basis is not None:  # the server may not have got it yet
        tensors["basis"] = torch.from_numpy(trainer.basis)
    remote, kernel = trainer.remote, trainer.remote.kernel.read()
    return tensors, {
        "half": HEAD, "data": trainer.data_id, "judged": trainer.judged_id,
        "pictures": len(trainer.data.train), "classes": trainer.data.classes,
        "then": trainer.then, "phases": [asdict(phase) for phase in trainer.phases],
        "meter": remote.meter.state(), "kernel": asdict(kernel) if kernel else None, "faults": asdict(remote.faults),
        "wall_s": trainer.elapsed_s, "busy_s": trainer.busy_s, "local": trainer.local,
        "mean": asdict(trainer.mean),
    }  # fmt: skip


def restore(trainer: Trainer, step: int) -> Checkpoint:
    """Let the trainer stand where it stood before `step`; what its books were is the caller's matter."""
    kept = trainer.checkpoints.read(step)
    source = f"the checkpoint of step {step}"
    if kept.state["data"] != trainer.data_id:
        raise DataError(
            f"{_other(trainer.data, kept.state)}; give it the same --data and --limit, or begin anew with --overwrite "
            f"on both sides"
        )
    if kept.state["judged"] != trainer.judged_id:
        raise DataError(
            "the test or validation pictures are not those that the run began with; give it the same --data, or begin "
            "anew with --overwrite on both sides"
        )
    weights.fill(trainer.head, part(kept.tensors, "head"), source)
    head = trainer.head
    trainer.optimiser = optim.build(trainer.recipe.optimiser, head.layers, head.bottleneck)
    optim.restore(trainer.optimiser, part(kept.tensors, "optimiser"), source)
    trainer.step, trainer.then, trainer.busy_s = step, kept.state["then"], kept.state["busy_s"]
    trainer.mean = RunningMean(**kept.state["mean"])
    trainer.local = kept.state["local"]
    trainer.phases = [phase_of_table(table) for table in kept.state["phases"]]
    if "basis" in kept.tensors:
        trainer.basis = kept.tensors["basis"].numpy()
        trainer.remote.keep_basis(trainer.basis)
    head.bottleneck.resize(trainer.phase.width, trainer.phase.order)
    head.train(not trainer.phase.frozen)
    return kept


def _other(data: Dataset, state: Mapping[str, Any]) -> str:
    """How a run's pictures are others than those that its state is of."""
    began, here = tuple(state["classes"]), data.classes
    if began != here:
        told = [
            f"{what} {some([name for name in names if name not in others], 5)}"
            for what, names, others in (("without", began, here), ("with", here, began))
            if not set(names) <= set(others)
        ]
        return f"the classes are not those that the run began with: {'; '.join(told) or 'in another order'}"
    if state["pictures"] != len(data.train):
        return f"the run began with {state['pictures']:,} training pictures, and here are {len(data.train):,}"
    return f"these are not the {len(data.train):,} pictures that the run began with"


def fingerprint(*parts: Part) -> str:
    """SHA-256 (hex) over pictures and labels, in their order."""
    result = hashlib.sha256()
    for pictures in parts:
        result.update(np.ascontiguousarray(pictures.pictures).data)
        result.update(np.ascontiguousarray(pictures.labels).data)
    return result.hexdigest()
