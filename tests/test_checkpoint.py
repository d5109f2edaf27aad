"""Checkpoints: what is kept is what comes back, damaged files are known, and old ones stay good as long as needed."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from pathlib import Path

import psutil
import pytest
import torch

from common import checkpoint, memory, optim
from common.checkpoint import Checkpoints, due
from common.errors import ModelError, RunFolderError
from common.recipe import OptimiserRecipe

TENSORS = {
    "weights": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "count": torch.tensor(7),
    "order": torch.tensor([2, 0, 1]),
    "none": torch.zeros(0, 4),
}


def kept(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder, "run", "digest")
    for step in steps:
        checkpoints.write(step, TENSORS, {"at": step, "list": [1, 2.5, None]})
    return checkpoints


def names(folder: Path) -> list[int]:
    return sorted(int(path.name[5:17]) for path in folder.glob("step-*"))


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    found = kept(tmp_path, 12).read(12)
    assert found.step == 12 and found.state == {"at": 12, "list": [1, 2.5, None]}
    assert found.tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(found.tensors[name], value) and found.tensors[name].dtype == value.dtype
    head = checkpoint.newest(tmp_path)
    assert head and (head["run_id"], head["step"]) == ("run", 12)


@pytest.mark.parametrize("where", ["header", "tensors", "end", "empty", "state"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, where: str) -> None:
    checkpoints = kept(tmp_path, 1, 2)
    path = tmp_path / "step-000000000002.safetensors"
    data = bytearray(path.read_bytes())
    if where == "empty":
        data.clear()
    elif where == "end":
        del data[-1]
    else:
        at = {"header": 9, "tensors": len(data) - 5, "state": data.index(b"2.5")}[where]
        data[at] ^= 1
    path.write_bytes(data)
    (tmp_path / ".step-000000000003.safetensors.abc").write_bytes(b"half")
    again = Checkpoints(tmp_path, "run", "digest")
    found, warnings = again.sound()
    assert found == [1] and len(warnings) == 1 and "step-000000000002" in warnings[0] and "damaged" in warnings[0]
    assert again.written == {1}, "the other side is told of no other"
    assert not list(tmp_path.glob(".step-*")), "what a process that died had begun is gone"
    head = checkpoint.newest(tmp_path)
    assert head and head["step"] == 1
    del checkpoints


def test_another_runs_checkpoint_is_not_taken(tmp_path: Path) -> None:
    kept(tmp_path, 1)
    for run, digest in (("other", "digest"), ("run", "other")):
        with pytest.raises(RunFolderError, match="another run, recipe or step"):
            Checkpoints(tmp_path, run, digest).read(1)


def test_the_newest_two_stay_and_the_one_that_the_other_side_has(tmp_path: Path) -> None:
    checkpoints = kept(tmp_path, 0, 10, 20)
    assert names(tmp_path) == [10, 20]
    checkpoints.confirm(10)
    for step in (30, 40, 50):
        checkpoints.write(step, TENSORS, {})
    assert names(tmp_path) == [10, 40, 50], "the other side's disk is full: here is where both can go on"
    checkpoints.confirm(15)  # never kept here
    assert names(tmp_path) == [10, 40, 50]
    checkpoints.confirm(40)
    checkpoints.confirm(0)  # no news
    checkpoints.write(60, TENSORS, {})
    checkpoints.write(70, TENSORS, {})
    assert names(tmp_path) == [40, 60, 70]
    checkpoints.confirm(60)
    checkpoints.confirm(40)  # said long ago
    assert names(tmp_path) == [60, 70]
    checkpoints.forget_after(60)
    assert names(tmp_path) == [60] == sorted(checkpoints.written)
    checkpoints.clear()
    assert not tmp_path.exists()


def test_a_full_disk_leaves_the_older_one_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = kept(tmp_path, 1, 2)

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError, match="No space left"):
            checkpoints.write(3, TENSORS, {})
    assert checkpoints.sound() == ([1, 2], [])


def test_both_sides_tell_each_other_of_regular_ones_alone(tmp_path: Path) -> None:
    checkpoints = kept(tmp_path, 20, 27)
    assert [checkpoints.news(step, 20) for step in (20, 27, 40)] == [20, 0, 0]
    assert [due(step, 20, turn=False) for step in (20, 27)] == [True, False]
    assert due(27, 20, turn=True)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_optimiser_goes_on_where_it_was(name: str) -> None:
    def step(layer: torch.nn.Linear, optimiser: optim.Optimiser) -> None:
        optimiser.zero_grad()
        layer(torch.ones(2, 3)).pow(2).sum().backward()
        optimiser.step()

    recipe = OptimiserRecipe(name=name, lr=0.01)
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimiser = optim.build(recipe, layer, torch.nn.Identity())
    step(layer, optimiser)
    copy = torch.nn.Linear(3, 2)
    copy.load_state_dict(layer.state_dict())
    again = optim.build(recipe, copy, torch.nn.Identity())
    state = {key: value.clone() for key, value in optim.tensors_of(optimiser).items()}
    optim.restore(again, state, "here")
    step(layer, optimiser)
    step(copy, again)
    assert torch.equal(layer.weight, copy.weight) and torch.equal(layer.bias, copy.bias)
    with pytest.raises(ModelError, match="of another model: 9"):
        optim.restore(again, {"9.momentum_buffer": torch.zeros(2)}, "here")


@pytest.mark.skipif(memory._trim is None, reason="this C library has no malloc_trim")
def test_memory_that_was_freed_goes_back_to_the_system() -> None:
    process = psutil.Process()
    blocks = [bytearray(1000) for _ in range(100_000)]
    # One in a hundred stays in use, so that the C library keeps the pages between.
    kept = blocks[::100]
    del blocks
    before = process.memory_info().rss
    memory.give_back()
    assert before - process.memory_info().rss > 50e6 and len(kept) == 1000


def test_objects_that_hold_each_other_go_at_the_next_checkpoint() -> None:
    class Batch:
        itself: Batch

    memory.give_back()
    batch = Batch()
    batch.itself, gone = batch, weakref.ref(batch)
    del batch
    assert gone() is not None
    memory.give_back()
    assert gone() is None
    assert gc.get_freeze_count() > 100_000  # what was there before: a collection does not look at it again
