"""What either half draws at random is a function of seed, step and side: the same when a step is made again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.recipes import recipe_text
from common import bottleneck, halves, models
from device_client.data import Dataset
from tests.legs import FEW, assert_same_end, leg, server_of
from tests.test_put_back import begun


def dropping(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Draws at random in either half where it is cut after its first dropout."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 4, 3, 4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(16, classes),
    )  # fmt: skip


def test_what_is_drawn_at_random_is_the_same_when_it_is_drawn_again(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By either half, in a run that went on and wherever torch's generator stands."""
    build = models.build
    monkeypatch.setattr(models, "build", lambda name, *rest: build(name, *rest[:2], (name,)))
    model = f'name = "{__name__}:dropping"\ninput = [1, 16, 16]\nclasses = 10\ncut = "_1"'
    text = recipe_text(model=model, data=FEW)
    assert leg(tmp_path / "whole", text, few)
    assert leg(tmp_path / "broken", text, few, 6) is None
    torch.rand(1)
    assert leg(tmp_path / "broken", text, few)
    assert_same_end(tmp_path / "broken", tmp_path / "whole")
    host, losses = server_of(tmp_path / "alone", text), set()
    begun(host)
    assert host.run and host.run.training
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.add(host.run.training.learn(np.ones((16, 4, 4, 4), np.float32), np.zeros(16, np.int64))[1])
    assert len(losses) == 1


def test_each_seed_begins_with_a_bottleneck_of_its_own() -> None:
    maps = [bottleneck.build("linear", 6, seed)[0].state_dict()["weight"] for seed in (0, 3, 3)]
    assert torch.equal(maps[1], maps[2]) and not torch.equal(maps[0], maps[1])


def test_each_step_of_each_half_draws_something_else() -> None:
    def drawn(seed: int, step: int, side: str) -> tuple[float, ...]:
        halves.reseed(seed, step, side)
        return tuple(torch.rand(3).tolist())

    draws = [drawn(seed, step, side) for seed in (3, 4) for step in (0, 1) for side in ("head", "tail")]
    assert len(set(draws)) == 8 and drawn(3, 0, "head") == draws[0]
