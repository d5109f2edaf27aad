"""The ways that `make bench-ways` counts: what it says they would send is what they would."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks import inprocess
from benchmarks.recipes import recipe_text
from benchmarks.ways import TEACHER_SHARE, TEMPERATURE, Differing, Felt, Seldom, distil
from common import optim
from device_client.data import Dataset
from device_client.remote_tail import RemoteTail

STEPS = 40


def _trained(digits: Dataset, remote: type[RemoteTail], lr: float = 0.05, **options: Any) -> tuple[dict[str, Any], Any]:
    text = recipe_text(
        "fixed", data="batch = 32", bottleneck='kind = "linear"', codec='activation = "step:10"\ngradient = "step:5"',
        schedule="phases = [[4, 2]]", optimiser=f"lr = {lr}",
    )  # fmt: skip
    tails: list[RemoteTail] = []
    summary = inprocess.train(
        text, digits, remote, watch=lambda step, phase, trainer, training: tails.append(trainer.remote), **options
    )
    return summary, tails[0]


def test_differences_are_small_where_little_was_learnt(digits: Dataset) -> None:
    summary, tail = _trained(digits, Differing, lr=1e-9, pictures=len(digits.train))
    first, second = tail.bytes.values()
    payload = summary["bytes"]["up"]["by_role"]["activation"]["payload"]
    # In the first epoch nothing is known yet; batch norm alone makes the second differ.
    assert first == pytest.approx(payload / 2, rel=0.1)
    assert second < 0.7 * first
    assert max(tail.apart[0]) == 0 and min(tail.apart[1]) > 3


def test_seldom_leaves_out_whole_gradients(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = []
    step = optim.Optimiser.step
    monkeypatch.setattr(optim.Optimiser, "step", lambda self: (moves.append(self), step(self))[1])
    summary, tail = _trained(digits, Seldom, every=4)
    sent = summary["bytes"]["down"]["by_role"]["gradient"]["message"]
    assert summary["steps"] == STEPS
    assert len(moves) == STEPS + STEPS // 4, "the tail learns in every step, the head in every fourth"
    assert tail.needless == pytest.approx(0.75 * sent, rel=0.05)


def test_a_channel_that_the_loss_feels_more_is_worth_a_finer_step() -> None:
    felt = Felt("127.0.0.1:1", stub=None)
    felt.energy = np.array([1.0, 1.0, 1.0, 1.0])
    assert felt.gain_db() == pytest.approx(0)
    felt.energy = np.array([1.0, 16.0])  # steps of 2 and 1/2 instead of 1 and 1: harm 4 + 4 instead of 1 + 16
    assert felt.gain_db() == pytest.approx(10 * np.log10(17 / 8))


def test_a_distilled_tail_has_the_gradient_of_both_losses() -> None:
    tail = nn.Linear(6, 4)
    distil(SimpleNamespace(halves=SimpleNamespace(tail=tail)))  # type: ignore[arg-type]
    before = copy.deepcopy(tail)
    with torch.no_grad():
        tail.weight += 0.3 * torch.randn(4, 6)
    inputs, truth = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    functional.cross_entropy(tail(inputs), truth).backward()
    free = nn.Linear(6, 4)
    free.load_state_dict(tail.state_dict())
    logits, said = free(inputs), (before(inputs) / TEMPERATURE).softmax(1).detach()
    soft = functional.kl_div((logits / TEMPERATURE).log_softmax(1), said, reduction="batchmean") * TEMPERATURE**2
    ((1 - TEACHER_SHARE) * functional.cross_entropy(logits, truth) + TEACHER_SHARE * soft).backward()
    assert tail.weight.grad is not None and free.weight.grad is not None
    assert torch.allclose(tail.weight.grad, free.weight.grad, atol=1e-6)
