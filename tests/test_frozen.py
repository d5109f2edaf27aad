"""Phases with a frozen head: pictures cross once, and the server learns again and again from what it kept."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from rich.console import Console
from torch import nn

from benchmarks import inprocess
from benchmarks.recipes import recipe_text
from common import halves, models, schedule, wire
from common.codecs import codec
from common.errors import FrameError, ModelError, StoreError
from common.meter import Draft
from common.phase_message import phase_of_message
from common.recipe import parse
from common.rpc import split_pb2 as pb
from common.run import RunFolder
from common.schedule import Phase
from common.wire import Place
from device_client.data import Dataset, Part, load
from device_client.inputs import training_batch
from device_client.remote_tail import RemoteTail
from device_client.trainer import Trainer
from edge_server.host import Host
from edge_server.store import Store
from edge_server.training import Training
from tests.conftest import Run, train

PER_EPOCH = 1438 // 32
SHAPE = (4, 2, 3, 3)


@pytest.fixture(scope="module")
def frozen_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An epoch in which both halves learn, then a frozen phase: two epochs sent, two recalled."""
    text = recipe_text(
        "deprune",
        bottleneck='kind = "linear"',
        codec='activation = "step:15"\ngradient = "step:10"',
        schedule="phases = [[4, 1], { width = 8, epochs = 4, views = 2, activation = 'context:10', lr = 0.02 }]",
        optimiser="lr = 0.05\nrestart = true",
    )
    return train(tmp_path_factory.mktemp("frozen"), text)


def test_nothing_comes_back_and_recalls_are_nearly_free(frozen_run: Run) -> None:
    kinds = [(phase["from_step"], phase["kind"]) for phase in frozen_run.summary("device")["phases"]]
    assert kinds == [(0, "learn"), (PER_EPOCH, "store"), (3 * PER_EPOCH, "recall")]
    lines = frozen_run.metrics("device")
    learn, store, recall = ([line["bytes"] for line in lines if line["phase"] == phase] for phase in (0, 1, 2))
    assert (len(learn), len(store), len(recall)) == (PER_EPOCH, 2 * PER_EPOCH, 2 * PER_EPOCH)
    assert min(step["down"] for step in learn) > 500
    assert max(step["down"] for step in store) < 80, "a StepDone, and once the next phase"
    assert min(step["up"] for step in store) > 500
    assert sum(step["up"] + step["down"] for step in recall) < 30 * len(recall)
    assert [line["bytes"] for line in frozen_run.metrics("server")] == [line["bytes"] for line in lines]


def test_the_server_goes_on_learning(frozen_run: Run) -> None:
    losses = np.array([line["loss"] for line in frozen_run.metrics("server")])
    stored, recalled = losses[PER_EPOCH : 3 * PER_EPOCH], losses[3 * PER_EPOCH :]
    assert recalled[-PER_EPOCH:].mean() < 0.8 * stored[:PER_EPOCH].mean()
    assert frozen_run.summary("device")["accuracy"] > 0.9


def test_a_frozen_head_is_the_one_it_started_as(tmp_path: Path) -> None:
    """And where nothing is recalled nothing is kept: this is six times what the server may keep."""
    text = recipe_text(
        "fixed", bottleneck='kind = "linear"', schedule="phases = [{ width = 0, epochs = 0.5, views = 0.5 }]"
    )
    run = train(tmp_path, text, server=("--store-limit", 1))
    trained = safetensors.torch.load_file(run.path / "device" / "head.safetensors")
    for name, value in halves.build(parse(text)).head.state_dict().items():
        assert torch.equal(trained[name], value), name


def test_leaving_a_recall_forgets_nothing(few: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimiser remembers is of no phase: with AdamW the loss tripled where it was lost."""
    remembered: list[tuple[int, int]] = []
    switch = Training.switch

    def watched(training: Training, phase: Phase) -> None:
        before = len(training._optimiser.state)
        switch(training, phase)
        remembered.append((before, len(training._optimiser.state)))

    monkeypatch.setattr(Training, "switch", watched)
    phases = "phases = [{ width = 0, epochs = 2, views = 1 }, [0, 0.5]]"
    inprocess.train(recipe_text("fixed", schedule=phases), few)
    assert len(remembered) == 3 and remembered[-1][0] > 0
    assert all(before == after for before, after in remembered)


def test_a_frozen_head_stays_in_its_mode_when_it_has_been_judged() -> None:
    """Else its batch norm would go on learning, and every later step send something else."""
    data, modes = load("digits", (1, 16, 16), 3, 0.2, limit=160), set()

    def watch(_step: int, phase: Phase, trainer: Trainer, _training: Training) -> None:
        modes.add((phase.kind, trainer.head.training))

    phases = "phases = [{ width = 0, epochs = 3, views = 2 }]"
    inprocess.train(recipe_text("fixed", data="batch = 16\nvalidation = 0.2", schedule=phases), data, watch=watch)
    assert modes == {("store", False), ("recall", False)}


def test_a_view_has_each_picture_once_wherever_its_phase_begins() -> None:
    part = Part(np.zeros((100, 1, 16, 16), np.uint8), np.arange(100))
    phase = Phase(1, 23, 0, "fp32", "fp32", 0.1, 0, 100, kind=schedule.STORE)
    drawn = [training_batch(parse(recipe_text()), part, step, 10, phase)[1] for step in range(23, 43)]
    first, second = np.concatenate(drawn[:10]), np.concatenate(drawn[10:])
    assert sorted(first) == sorted(second) == list(range(100)) and list(first) != list(second)


def test_what_an_entry_comes_to() -> None:
    parsed = parse(
        recipe_text(
            "deprune",
            codec='activation = "step:10"\ngradient = "step:5"',
            schedule="phases = [[0, 1], { width = 0, epochs = 3, views = 1, activation = 'step:15', lr = 0.01 }]",
            optimiser="lr = 0.05\nrestart = true",
        )
    )
    plan, steps = schedule.planned(parsed, 32, 10)
    assert steps == 40
    shown = [
        (p.kind, p.from_step, p.activation_codec, p.gradient_codec, p.lr, p.decay_from, p.decay_until) for p in plan
    ]
    assert shown == [
        ("learn", 0, "step:10", "step:5", 0.05, 0, 10),
        ("store", 10, "step:15", "step:5", 0.01, 10, 40),
        ("recall", 20, "step:15", "step:5", 0.01, 10, 40),
    ]


def test_as_many_views_as_epochs_leave_nothing_to_recall() -> None:
    """However the steps of the phase before are rounded: the server would keep all pictures for one step."""
    phases = "phases = [[8, 0.5], { width = 8, epochs = 1, views = 1 }]"
    parsed = parse(recipe_text("deprune", bottleneck='kind = "linear"', schedule=phases))
    plan, steps = schedule.planned(parsed, 32, 45)
    assert [(phase.kind, phase.from_step) for phase in plan] == [("learn", 0), ("store", 22)] and steps == 68


def _store(folder: Path, steps: int, limit: int = 1 << 20) -> Store:
    store = Store(folder, Phase(0, 0, 2, "fp32", "fp32", 0.1, 0, 1), SHAPE, 7, limit)
    for step in range(steps):
        labels = np.arange(4) + 4 * step
        tensor = np.broadcast_to(labels[:, None, None, None], SHAPE).astype(np.float32)
        store.add(codec("fp32").encode(tensor), labels)
    return store


@pytest.mark.parametrize("steps", [1, 3, 4, 10])
def test_every_kept_picture_comes_once_a_cycle(steps: int, tmp_path: Path) -> None:
    store = _store(tmp_path, steps)
    orders = []
    for cycle in range(2):
        drawn = [store.draw(cycle * steps + number) for number in range(steps)]
        labels = np.concatenate([labels for _, labels in drawn])
        assert Counter(labels.tolist()) == Counter(range(4 * steps))
        for sent, batch in drawn:
            assert sent.shape == SHAPE and np.array_equal(sent[:, 0, 0, 0], batch), "pictures keep their labels"
        orders.append(labels)
    assert steps == 1 or not np.array_equal(*orders)
    if steps > 4:  # what came together is drawn apart
        assert len(set(orders[0][:4] // 4)) > 1
        mixed = [set(order[:16] // 4) for order in orders]
        assert mixed[0] != mixed[1], "and with others in the next cycle"
    again = _store(tmp_path, steps)
    assert np.array_equal(again.draw(2 * steps - 1)[1], store.draw(2 * steps - 1)[1])


def test_a_store_goes_on_from_its_index(tmp_path: Path) -> None:
    store = _store(tmp_path, 5)
    index = {name: value.clone() for name, value in store.index().items()}
    expected = store.draw(7)
    store.add(bytes(store._places[0][1]), np.zeros(4, int))  # after the checkpoint: dropped when it is gone back to
    store.close()
    again = Store(tmp_path, store.phase, SHAPE, 7, store.limit, index)
    assert again.steps == 5 and again.path.stat().st_size == again.size
    assert all(np.array_equal(left, right) for left, right in zip(again.draw(7), expected, strict=True))
    again.close()
    whole = bytearray(again.path.read_bytes())
    whole[again.size // 2] ^= 1
    again.path.write_bytes(whole)
    with pytest.raises(StoreError, match="is damaged: what step 2 of its phase brought"):
        Store(tmp_path, store.phase, SHAPE, 7, store.limit, index)
    again.path.write_bytes(b"short")
    with pytest.raises(StoreError, match="shorter than the checkpoint says"):
        Store(tmp_path, store.phase, SHAPE, 7, store.limit, index)


def test_a_store_stays_within_its_limit(tmp_path: Path) -> None:
    size = 4 * int(np.prod(SHAPE))
    store = _store(tmp_path, 2, limit=2 * size)
    assert store.size == 2 * size
    with pytest.raises(StoreError, match="--store-limit"):
        store.add(bytes(size), np.zeros(4, int))
    assert store.steps == 2


def test_a_full_disk_is_said_once(tmp_path: Path) -> None:
    """What could not be written is not tried again by whoever closes the store."""
    store = _store(tmp_path, 0)
    store.close()
    store.path.unlink()
    store.path.symlink_to("/dev/full")
    store._open("r+b")
    with pytest.raises(StoreError, match="cannot be kept on the server's disk: No space left"):
        store.add(b"1234", np.zeros(4, int))
    assert store.steps == 0
    store.close()


def test_frames_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    """Recall where a tensor was expected, a tensor where Recall was, and a Recall of nothing."""
    from benchmarks import pair

    text = recipe_text("fixed", schedule="phases = [{ width = 0, epochs = 2, views = 1 }]")
    text = text.replace("batch = 32", "batch = 2")
    (tmp_path / "recipe.toml").write_text(text)
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "server", "--threads", 1)
    pictures, labels = np.ones((2, 32, 8, 8), np.float32), np.array([1, 2])
    label = Place(pb.LABEL, 0, 0)

    def frames(step: int, phase: int) -> list[pb.Frame]:
        return [
            *wire.pack_labels(dataclasses.replace(label, step=step, phase=phase), labels, 10),
            *wire.pack_raw(Place(pb.ACTIVATION, step, phase), pictures),
        ]

    def recall(step: int, phase: int, steps: int) -> list[pb.Frame]:
        return [wire.seal(Place(pb.CONTROL, step, phase).frame(recall=pb.Recall(steps=steps)))]

    with pair.server(*arguments, log=tmp_path / "log") as (_, address):
        remote = RemoteTail(address)
        remote.open(trains=True)

        def answer(sent: list[pb.Frame], step: int) -> pb.Frame:
            remote._lose()
            remote.begin(2, tuple("0123456789"), step)
            for frame in sent:
                remote._stream.send(frame)
            return remote._stream.receive(Draft(remote.meter))

        with pytest.raises(FrameError, match="kind store"):
            answer(recall(0, 0, 1), 0)
        assert phase_of_message(answer(frames(0, 0), 0).done.next).kind == "recall"
        for wrong in (frames(1, 1), recall(1, 1, 0)):
            with pytest.raises(FrameError, match="Recall"):
                answer(wrong, 1)
        assert answer(recall(1, 1, 1000), 1).done.then == pb.FINISH, "however many were asked for"
        remote.close()


def test_recalled_maps_are_flipped_and_shifted_the_same_each_time(tmp_path: Path) -> None:
    store = Store(tmp_path, Phase(0, 0, 2, "fp32", "fp32", 0.1, 0, 1), (32, 1, 4, 4), 7, 1 << 20)
    ramp = np.broadcast_to(np.arange(4, dtype=np.float32), (32, 1, 4, 4))
    store.add(codec("fp32").encode(np.ascontiguousarray(ramp)), np.zeros(32, int))
    flipped, _ = store.draw(0, flip=True)
    falls = flipped[:, 0, 0, 0] > flipped[:, 0, 0, 1]
    assert 0 < falls.sum() < 32, "some are mirrored, some are not"
    assert np.array_equal(flipped, store.draw(0, flip=True)[0])
    assert not np.array_equal(flipped, store.draw(1, flip=True)[0]), "others in the next batch"
    moved = store.draw(1, shift=1)[0][:, 0, 0]
    assert {tuple(row) for row in moved} <= {(0, 1, 2, 3), (1, 0, 1, 2), (1, 2, 3, 2)}
    assert len({tuple(row) for row in moved}) > 1


def test_a_cut_without_maps_cannot_be_flipped(tmp_path: Path) -> None:
    for cut, table, words in (
        ("flatten", "flip = true", "the schedule flips what was kept, which"),
        ("stage1_relu2", "shift = 8", "the schedule shifts what was kept by 8 places, which"),
    ):
        text = recipe_text("fixed", schedule=f"phases = [{{ width = 0, epochs = 2, views = 1, {table} }}]")
        text = text.replace("stage1_relu2", cut)
        with pytest.raises(ModelError, match=words):
            Host.to_train(parse(text), text, RunFolder(tmp_path), Console(), (), False)


def view_then(inplace: bool) -> Callable[[tuple[int, ...], int], nn.Module]:
    def net(shape: tuple[int, ...], classes: int) -> nn.Module:
        size = 8 * shape[1] * shape[2]
        return nn.Sequential(
            nn.Conv2d(shape[0], 8, 3, padding=1), nn.Flatten(), nn.SiLU(inplace=inplace), nn.Linear(size, classes)
        )

    return net


in_place, apart = view_then(True), view_then(False)


def test_what_is_kept_is_what_came_though_the_tail_works_in_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """fp32 is decoded to a view of the payload itself."""
    data, build, losses = load("digits", (1, 16, 16), 3, 0.0, limit=160), models.build, []
    monkeypatch.setattr(models, "build", lambda name, *rest: build(name, *rest[:2], (name,)))
    for factory in ("in_place", "apart"):
        model = f'name = "tests.test_frozen:{factory}"\ninput = [1, 16, 16]\nclasses = 10\ncut = "_0"'
        schedule = "phases = [{ width = 0, epochs = 2, views = 1 }]"
        text = recipe_text("fixed", model=model, codec='activation = "fp32"\ngradient = "fp32"', schedule=schedule)
        inprocess.train(text, data, folder=tmp_path / factory)
        lines = (tmp_path / factory / "device" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        assert not (tmp_path / factory / "server" / "checkpoints").exists(), "what was kept is gone with the run's end"
    assert losses[0] == losses[1] and len(losses[0]) == 10
