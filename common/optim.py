"""The optimiser of one half, and the learning rate as a function of the step; both sides call the same code."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import adamw, sgd

from common.bottleneck import ChannelDecoder, ChannelEncoder
from common.errors import ModelError
from common.recipe import OptimiserRecipe
from common.schedule import Phase


class Optimiser:
    """SGD with momentum, or AdamW, over a half's parameters: torch's arithmetic without the classes of torch.optim.

    The first instance of one of those loads torch's compiler, which nothing here uses: three seconds and 75 MB at each
    start of either side, several times that on a small device.
    """

    def __init__(
        self, recipe: OptimiserRecipe, groups: Sequence[tuple[list[nn.Parameter], float]],
        opening: Sequence[tuple[list[nn.Parameter], float]] = (),
    ) -> None:  # fmt: skip
        """`groups`: parameters, each group with its weight decay. `opening`: under AdamW those whose elements begin to
        learn one after the other, as channels open; `_adam_by_element` moves them."""
        self.lr = recipe.lr
        self.parameters = [parameter for parameters, _ in (*groups, *opening) for parameter in parameters]
        # What it remembers of a parameter, from its first step on.
        self.state: defaultdict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)
        self._recipe, self._groups, self._opening = recipe, groups, opening

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move each parameter that has a gradient."""
        move = self._adamw if self._recipe.name == "adamw" else self._sgd
        for parameters, weight_decay in self._groups:
            moving: list[torch.Tensor] = [parameter for parameter in parameters if parameter.grad is not None]
            if moving:
                move(moving, [parameter.grad for parameter in moving if parameter.grad is not None], weight_decay)
        for parameters, weight_decay in self._opening:
            for parameter in parameters:
                if parameter.grad is not None:
                    self._adam_by_element(parameter, parameter.grad, weight_decay)

    def _sgd(self, moving: list[torch.Tensor], gradients: list[torch.Tensor], weight_decay: float) -> None:
        momentum = self._recipe.momentum
        buffers = [self.state[parameter].get("momentum_buffer") for parameter in moving]
        sgd.sgd(
            moving, gradients, buffers, lr=self.lr, weight_decay=weight_decay, momentum=momentum, nesterov=momentum > 0,
            dampening=0.0, maximize=False,
        )  # fmt: skip
        for parameter, buffer in zip(moving, buffers, strict=True):
            if buffer is not None:  # sgd has put in those that were missing, unless there is no momentum
                self.state[parameter]["momentum_buffer"] = buffer

    def _adamw(self, moving: list[torch.Tensor], gradients: list[torch.Tensor], weight_decay: float) -> None:
        for parameter in moving:
            if not self.state[parameter]:
                zeros = torch.zeros_like(parameter)
                self.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        means, squares, steps = (
            [self.state[parameter][name] for parameter in moving] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        adamw.adamw(
            moving, gradients, means, squares, [], steps, lr=self.lr, weight_decay=weight_decay, beta1=0.9, beta2=0.999,
            eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    def _adam_by_element(self, parameter: torch.Tensor, gradient: torch.Tensor, weight_decay: float) -> None:
        """AdamW with a count of steps for each element: those in which it had a gradient.

        torch has one count for a whole parameter. By that, channels that are first sent late would seem to have stood
        still for many steps, and would move at several times the learning rate at first.
        """
        state = self.state[parameter]
        if not state:
            state |= {name: torch.zeros_like(parameter) for name in ("steps", "exp_avg", "exp_avg_sq")}
        moved = gradient != 0
        steps = state["steps"].add_(moved)
        for name, beta, value in (("exp_avg", 0.9, gradient), ("exp_avg_sq", 0.999, gradient.square())):
            state[name].lerp_(value, (1 - beta) * moved)
        mean = state["exp_avg"] / (1 - 0.9**steps).clamp_min(1e-9)
        spread = (state["exp_avg_sq"] / (1 - 0.999**steps).clamp_min(1e-9)).sqrt_()
        parameter.mul_(1 - self.lr * weight_decay).sub_(self.lr * moved * mean / (spread + 1e-8))


def build(recipe: OptimiserRecipe, layers: nn.Module, bottleneck: nn.Module) -> Optimiser:
    """Optimiser over a half's layers and its part of the bottleneck.

    The bottleneck has no weight decay: it would shrink the channels that are not sent yet.
    """
    decaying, steady = (list(layers.parameters()), recipe.weight_decay), (list(bottleneck.parameters()), 0.0)
    if recipe.name != "adamw":
        return Optimiser(recipe, [decaying, steady])
    # Of channels taken as they are, those not sent yet have no gradient in the layers beside the cut either.
    if isinstance(bottleneck, (ChannelEncoder, ChannelDecoder)):
        return Optimiser(recipe, [], [decaying, steady])
    return Optimiser(recipe, [decaying], [steady])


def learning_rate(recipe: OptimiserRecipe, step: int, phase: Phase) -> float:
    """Learning rate of `step`, which lies in `phase`."""
    done = step - phase.decay_from
    if done < recipe.warmup:
        return phase.lr * (done + 1) / recipe.warmup
    if recipe.decay == "constant":
        return phase.lr
    progress = (done - recipe.warmup) / max(1, phase.decay_until - phase.decay_from - recipe.warmup)
    return phase.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def tensors_of(optimiser: Optimiser) -> dict[str, torch.Tensor]:
    """What the optimiser remembers of each parameter, by "number.name", for a checkpoint."""
    return {
        f"{number}.{name}": value
        for number, parameter in enumerate(optimiser.parameters)
        for name, value in optimiser.state.get(parameter, {}).items()
    }


def restore(optimiser: Optimiser, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Give a new optimiser back what `tensors_of` told; ModelError where it is of other parameters."""
    parameters = optimiser.parameters
    optimiser.state.clear()
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        fits = number.isdigit() and int(number) < len(parameters)
        if not fits or value.shape not in (parameters[int(number)].shape, ()):
            raise ModelError(f"the optimiser's state in {source} is of another model: {key} has no place in it")
        parameter = parameters[int(number)]
        # Laid out as the parameter is, by which torch chooses its loop, and one loop may round where another doesn't.
        # A count of steps stays on the processor, where it is needed.
        optimiser.state[parameter][name] = value if name == "step" else torch.empty_like(parameter).copy_(value)


def imitated(precision: str) -> str:
    """What to tell a user whose processor has no instructions for a recipe's `precision`; empty where it has."""
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if precision != "bf16" or any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")):
        return ""
    return 'the recipe computes in bf16, which this processor imitates: precision = "fp32" in it is faster here'


def arithmetic(precision: str, kind: str) -> contextlib.AbstractContextManager[object]:
    """The context in which a half computes on a `kind` of processor: nothing for fp32, autocast for bf16."""
    if precision == "bf16":
        return torch.autocast(kind, dtype=torch.bfloat16)
    return contextlib.nullcontext()
