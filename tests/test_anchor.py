"""The anchor: with raw fp32 and no bottleneck, split training over real sockets is the unsplit model's training."""

from __future__ import annotations

import safetensors.torch
import torch
from torch.nn import functional

from common import models, optim, recipe, schedule
from device_client import batches, data
from tests.conftest import Run


def test_split_training_equals_unsplit(plain_run: Run) -> None:
    parsed, _ = recipe.load(plain_run.recipe)
    loaded = data.load("digits", parsed.model.input, parsed.seed, 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(parsed.seed)
        model = models.channels_last(models.build("tiny", parsed.model.input, 10)).train()
        optimiser = optim.build(parsed.optimiser, model, torch.nn.Identity())
        losses = []
        (phase,), _ = schedule.planned(parsed, 32, len(loaded.train) // 32)
        for step in range(20):
            chosen = batches.indices(parsed.seed, step, len(loaded.train), 32)
            pictures = batches.augment(loaded.train.pictures[chosen], parsed.seed, step, 1, True)
            inputs = torch.from_numpy(batches.normalise(pictures, parsed.data.mean, parsed.data.std))
            loss = functional.cross_entropy(model(inputs), torch.from_numpy(loaded.train.labels[chosen]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.lr = optim.learning_rate(parsed.optimiser, step, phase)
            optimiser.step()
            losses.append(loss.item())
    finally:
        torch.set_num_threads(threads)

    ours = [line["loss"] for line in plain_run.metrics("device")]
    assert len(ours) == 20
    # StepDone carries a float32, as loss.item() is one: equal means equal.
    assert ours == losses
    halves: dict[str, torch.Tensor] = {}
    for side, half in (("device", "head"), ("server", "tail")):
        tensors = safetensors.torch.load_file(plain_run.path / side / f"{half}.safetensors")
        halves |= {name.removeprefix("layers."): value for name, value in tensors.items() if name.startswith("layers.")}
    assert halves.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(halves[name], value, rtol=1e-6, atol=0, msg=name)
