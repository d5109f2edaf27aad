"""What split learning is compared with: the whole network trained in one place, or by federated averaging.

The same network, pictures, augmentation and optimiser as the split runs; bytes are those of the same wire messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from common import models, optim, weights, wire
from common.halves import CPU
from common.meter import DOWN, UP, Meter
from common.recipe import Recipe
from common.rpc import split_pb2 as pb
from common.schedule import Phase
from common.wire import Place
from device_client import batches
from device_client.data import Dataset, Part

DEVICES = 10
Watch = Callable[[int, nn.Module, Meter], None]


def network(recipe: Recipe, processor: torch.device = CPU) -> nn.Module:
    torch.manual_seed(recipe.seed)
    model = models.build(recipe.model.name, recipe.model.input, recipe.model.classes)
    return models.channels_last(model).to(processor)


def _optimiser(recipe: Recipe, model: nn.Module) -> optim.Optimiser:
    return optim.build(recipe.optimiser, model, nn.Identity())


def _learn(recipe: Recipe, model: nn.Module, optimiser: optim.Optimiser, part: Part, step: int, rate: float) -> None:
    chosen = batches.indices(recipe.seed, step, len(part), recipe.data.batch)
    pictures = batches.augment(part.pictures[chosen], recipe.seed, step, recipe.data.crop, recipe.data.flip)
    inputs = torch.from_numpy(batches.normalise(pictures, recipe.data.mean, recipe.data.std))
    where = next(model.parameters()).device
    with optim.arithmetic(recipe.precision, where.type):
        logits = model(inputs.to(where))
        loss = functional.cross_entropy(logits.float(), torch.from_numpy(part.labels[chosen]).to(where))
    optimiser.zero_grad()
    loss.backward()
    optimiser.lr = rate
    optimiser.step()


def _course(recipe: Recipe, steps: int) -> Phase:
    return Phase(0, 0, 1, "fp32", "fp32", recipe.optimiser.lr, 0, steps)


def _as_long_a_warmup(recipe: Recipe, steps: int, of: int) -> Recipe:
    """The recipe with the share of `steps` to warm up in that it has of a central run's `of`."""
    optimiser = replace(recipe.optimiser, warmup=round(recipe.optimiser.warmup * steps / of))
    return replace(recipe, optimiser=optimiser)


def central(
    recipe: Recipe, data: Dataset, epochs: int, size: int, watch: Watch, processor: torch.device = CPU
) -> float:
    """Train on pictures that were uploaded once, of `size` bytes each; seconds on the device: none to speak of.

    The server has the pictures then: what split learning keeps on the device has left it.
    """
    meter = Meter()
    for _ in range(len(data.train)):
        _count(meter, UP, bytes(size))
    for frame in wire.pack_labels(Place(pb.LABEL, 0, 0), data.train.labels, recipe.model.classes):
        meter.frame(UP, frame)
    model = network(recipe, processor).train()
    optimiser = _optimiser(recipe, model)
    steps = epochs * (len(data.train) // recipe.data.batch)
    course = _course(recipe, steps)
    for step in range(steps):
        _learn(recipe, model, optimiser, data.train, step, optim.learning_rate(recipe.optimiser, step, course))
        watch(step, model, meter)
    return 0.0


def federated(recipe: Recipe, data: Dataset, rounds: int, watch: Watch, processor: torch.device = CPU) -> float:
    """Federated averaging (McMahan et al., arXiv 1602.05629) over DEVICES with equal shares of the pictures, an epoch
    of their own a round, all of them in every round; the seconds that the devices compute, added up.

    `watch` is called as often as a central run of as many epochs would, once for all steps of a round.
    """
    meter, busy = Meter(), 0.0
    model = network(recipe, processor)
    shares = list(_shares(data.train, recipe.seed))
    local = len(shares[0]) // recipe.data.batch
    course = _course(recipe, rounds * local)
    recipe = _as_long_a_warmup(recipe, local, len(data.train) // recipe.data.batch)
    for number in range(rounds):
        sent = weights.to_bytes(model)
        total: dict[str, torch.Tensor] = {}
        for share in shares:
            started = time.perf_counter()
            _count(meter, DOWN, sent)
            device = network(recipe, processor).train()
            weights.fill(device, weights.from_bytes(sent, "the server"), "the server")
            optimiser = _optimiser(recipe, device)
            for step in range(number * local, (number + 1) * local):
                _learn(recipe, device, optimiser, share, step, optim.learning_rate(recipe.optimiser, step, course))
            answer = weights.to_bytes(device)
            busy += time.perf_counter() - started
            _count(meter, UP, answer)
            for name, value in weights.from_bytes(answer, "a device").items():
                total[name] = total.get(name, 0) + value.double() / DEVICES
        state = {name: total[name].to(value.dtype) for name, value in model.state_dict().items()}
        weights.fill(model, state, "the average")
        watch((number + 1) * (len(data.train) // recipe.data.batch) - 1, model, meter)
    return busy


def _count(meter: Meter, way: str, data: bytes) -> None:
    for frame in wire.pack_bytes(Place(pb.WEIGHTS, 0, 0), data):
        meter.frame(way, frame)


def _shares(part: Part, seed: int) -> Iterator[Part]:
    order = np.random.default_rng(seed).permutation(len(part))
    for chosen in np.array_split(order, DEVICES):
        yield Part(part.pictures[chosen], part.labels[chosen])
