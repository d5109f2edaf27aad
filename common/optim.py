"""The optimiser of one half, and the learning rate as a function of the step; both sides call the same code."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping

import torch
from torch import nn

from common.errors import ModelError
from common.recipe import OptimiserRecipe
from common.schedule import Phase


def build(recipe: OptimiserRecipe, layers: nn.Module, bottleneck: nn.Module) -> torch.optim.Optimizer:
    """Optimiser over a half's layers and its part of the bottleneck.

    The bottleneck has no weight decay: it would shrink the channels that are not sent yet.
    """
    groups = [
        {"params": list(layers.parameters()), "weight_decay": recipe.weight_decay},
        {"params": list(bottleneck.parameters()), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        # A head without weights (a cut right after a reshape or an activation) has nothing to learn.
        groups = [{"params": [nn.Parameter(torch.zeros(0))]}]
    if recipe.name == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def learning_rate(recipe: OptimiserRecipe, step: int, phase: Phase) -> float:
    """Learning rate of `step`, which lies in `phase`."""
    done = step - phase.decay_from
    if done < recipe.warmup:
        return phase.lr * (done + 1) / recipe.warmup
    if recipe.decay == "constant":
        return phase.lr
    progress = (done - recipe.warmup) / max(1, phase.decay_until - phase.decay_from - recipe.warmup)
    return phase.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = value


def tensors_of(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What the optimiser remembers of each parameter, by "number.name", for a checkpoint."""
    return {
        f"{index}.{name}": value
        for index, slots in optimiser.state_dict()["state"].items()
        for name, value in slots.items()
        if isinstance(value, torch.Tensor)
    }


def restore(optimiser: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Give a new optimiser back what `tensors_of` told; ModelError where it is of other parameters."""
    shapes = [value.shape for group in optimiser.param_groups for value in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        if not number.isdigit() or int(number) >= len(shapes) or value.shape not in (shapes[int(number)], ()):
            raise ModelError(f"the optimiser's state in {source} is of another model: {key} has no place in it")
        state.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def arithmetic(precision: str, kind: str = "cpu") -> contextlib.AbstractContextManager[object]:
    """The context in which a half computes on a `kind` of processor: nothing for fp32, autocast for bf16."""
    if precision == "bf16":
        return torch.autocast(kind, dtype=torch.bfloat16)
    return contextlib.nullcontext()
