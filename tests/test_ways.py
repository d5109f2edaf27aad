"""The ways that `make bench-ways` counts: what it says they would send is what they would."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import inprocess
from benchmarks.recipes import recipe_text
from benchmarks.ways import Differing, Seldom
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
