"""A run that suffered faults is judged rightly against the one without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.faults import compare


def a_run(folder: Path) -> Path:
    for side, name in compare.HALVES.items():
        place = folder / side
        place.mkdir(parents=True)
        save_file({"a": np.zeros((2, 2), np.float32), "b": np.ones(3, np.float32)}, place / name)
        lines = [
            {"step": step, "phase": 0, "width": 2, "loss": 0.5, "accuracy": 1.0, "bytes": {"up": 9, "down": 3}}
            for step in range(3)
        ]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        book = {"by_role": {"activation": {"raw": 4, "payload": 2, "message": 3}}}
        table = {
            "accuracy": 1.0,
            "loss": 0.1,
            "steps": 3,
            "samples": 6,
            "phases": [],
            "bytes": {"up": book, "down": book},
        }
        (place / "summary.json").write_text(json.dumps(table))
    return folder


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_equal_runs_are_equal(tmp_path: Path) -> None:
    assert compare.differences(a_run(tmp_path / "a"), a_run(tmp_path / "b")) == []


@pytest.mark.parametrize(
    ("path", "old", "new", "says"),
    [
        ("device/metrics.jsonl", '"step": 1', '"step": 0', "has 1 steps twice, 1 not at all"),
        ("server/metrics.jsonl", '"loss": 0.5', '"loss": 0.25', "differs in 1 steps, first in step 0"),
        ("device/metrics.jsonl", '"up": 9', '"up": 8', "disagree on the bytes of 1 steps"),
        ("server/summary.json", '"accuracy": 1.0', '"accuracy": 0.9', "accuracy 0.9, 1.0 without faults"),
        ("server/summary.json", '"payload": 2', '"payload": 1', "the meters disagree on bytes up of activation"),
        ("device/summary.json", "{", "", "cannot be read"),
    ],
)
def test_each_difference_is_found(tmp_path: Path, path: str, old: str, new: str, says: str) -> None:
    reference, run = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    swap(run / path, old, new)
    found = compare.differences(reference, run)
    assert len(found) == 1 and says in found[0], found


def test_weights_are_compared_by_their_bits(tmp_path: Path) -> None:
    reference, run = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    zero = np.zeros((2, 2), np.float32)
    zero[0, 0] = -0.0
    save_file({"a": zero, "b": np.ones(3, np.float32)}, run / "server" / "tail.safetensors")
    assert compare.differences(reference, run) == ["server/tail.safetensors differs in 1 of 2 tensors"]
    assert not compare.weights_equal(reference, run)
