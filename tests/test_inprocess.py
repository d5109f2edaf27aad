"""The in-process link of the benchmarks gives the same losses and the same bytes as two processes over gRPC."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import inprocess, tensors
from benchmarks.recipes import recipe_text
from device_client.data import load
from tests.conftest import train

SCHEDULES = {
    "all": "phases = [[0, 0.5]]",
    "widening": "phases = [[2, 0.25], [5, 0.25]]",
    "frozen": "phases = [[4, 0.25], { width = 8, epochs = 0.75, views = 0.25 }]",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_in_process_is_two_processes(schedule: str, tmp_path: Path) -> None:
    method, kind = ("fixed", "none") if schedule == "all" else ("deprune", "linear")
    text = recipe_text(
        method,
        bottleneck=f'kind = "{kind}"',
        codec='activation = "step:15"\ngradient = "step:10"',
        schedule=SCHEDULES[schedule],
    )
    run = train(tmp_path, text)
    expected = run.summary("device")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two processes have; sums depend on it
    try:
        summary = inprocess.train(text, load("digits", (1, 16, 16), 3, 0.0))
    finally:
        torch.set_num_threads(threads)
    same = ("accuracy", "loss", "steps", "phases", "times_fewer", "digest")
    assert {name: summary[name] for name in same} == {name: expected[name] for name in same}
    for way in ("up", "down"):
        roles = summary["bytes"][way]["by_role"]
        theirs = expected["bytes"][way]["by_role"]
        assert {role: roles[role] for role in roles if role != "control"} == {
            role: theirs[role] for role in theirs if role != "control"
        }
        # Loss and ids in control messages differ by nothing but chance in their length.
        assert roles["control"]["message"] == pytest.approx(theirs["control"]["message"], abs=8)


@pytest.mark.parametrize("width", [0, 4])
def test_the_recorder_keeps_what_crossed(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make bench-codec` works on tensors of the project's own training: both of a step, as they are sent."""
    monkeypatch.setattr(tensors, "EARLY", 1)
    monkeypatch.setattr(tensors, "LATE", 3)
    digits = load("digits", (3, 32, 32), 0, 0.0, limit=200)
    kept = tensors.record(digits, tensors.CASES[0][1], width, 32)
    assert list(kept) == [1, 3]
    for parts in kept.values():
        activation, gradient = parts["activation"], parts["gradient"]
        assert activation.shape == gradient.shape == (32, width or 16, 32, 32)
        assert (activation.min() == 0) == (width == 0) and activation.max() > 0, "behind a ReLU, or mixed"
        assert np.abs(gradient).max() > 0
    assert not np.array_equal(kept[1]["activation"], kept[3]["activation"])
