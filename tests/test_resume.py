"""A run that loses both processes at any step goes on to the same weights, whatever its phases are made of.

In one process and without sockets, so that many kinds of runs and steps can be tried; tests/test_resume_faults.py does
it with real ones.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import inprocess
from common.checkpoint import Checkpoints
from common.errors import FaultError, RunFolderError
from common.meter import UP
from common.rpc import split_pb2 as pb
from common.run import HEAD, TAIL, RunFolder
from common.schedule import Phase
from common.wire import Place
from device_client.data import Dataset, Part, load
from device_client.remote_tail import RemoteTail
from device_client.state import fingerprint
from device_client.trainer import Trainer
from edge_server.coordinator import Decision
from edge_server.live import LiveRun
from edge_server.training import Training
from tests.legs import CASES, Cut, Killed, assert_same_end, leg, lose_before_the_first_step, outcome, server_of

SIDES = ("device", "server")
FP32 = Phase(0, 0, 2, "fp32", "fp32", 0.05, 0, 1)


class _Stopped(Killed, KeyboardInterrupt):
    """At once: the step that is under way is put back."""


@pytest.mark.parametrize("name", CASES)
def test_a_device_that_has_not_had_the_last_answer_goes_on_where_it_stands(
    name: str, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped at once, and its server after it: the server's checkpoint is of the step after, and has it."""
    text = CASES[name]
    data = load("digits", (1, 16, 16), 3, 0.2, limit=320) if "validation" in text else few
    whole = leg(tmp_path / "whole", text, data)
    assert whole
    steps = len(outcome(tmp_path / "whole")[1])
    broken, result = tmp_path / "broken", RemoteTail._result
    for at in (5, 10, steps - 2):

        def stopped(remote: RemoteTail, step: int, *arguments: Any) -> Any:
            if step == at:  # noqa: B023 -- called at once
                raise _Stopped
            return result(remote, step, *arguments)

        host = server_of(broken, text)
        with monkeypatch.context() as patched:
            patched.setattr(RemoteTail, "_result", stopped)
            assert leg(broken, text, data, lives=host) is None
        host.close()
        ahead = [max(int(path.stem[5:]) for path in (broken / side / "checkpoints").glob("step-*")) for side in SIDES]
        # In one process a recall is made as its answer is asked for.
        assert ahead == [at, at if (name, at) == ("frozen head", 10) else at + 1], ahead
    summary = leg(broken, text, data)
    assert summary and summary["faults"]["resumed"] == 3 and summary["faults"]["steps_again"] == 0
    assert_same_end(broken, tmp_path / "whole")
    for way in ("up", "down"):
        assert summary["bytes"][way]["by_role"] == whole["bytes"][way]["by_role"]


@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_step_it_ends_with_the_same_weights(name: str, few: Dataset, tmp_path: Path) -> None:
    text = CASES[name]
    data = load("digits", (1, 16, 16), 3, 0.2, limit=320) if "validation" in text else few
    whole = leg(tmp_path / "whole", text, data)
    assert whole
    steps = len(outcome(tmp_path / "whole")[1])
    # One run that is killed again and again: right after checkpoints, right before, and in between.
    broken, again = tmp_path / "broken", 0
    for until in (1, 3, 4, 9, 10, 15, steps - 1):
        assert leg(broken, text, data, until) is None
    summary = leg(broken, text, data)
    assert summary
    assert_same_end(broken, tmp_path / "whole")
    for way in ("up", "down"):
        assert summary["bytes"][way]["by_role"] == whole["bytes"][way]["by_role"]
        assert summary["bytes"][way]["again"] > again
    assert summary["faults"]["resumed"] == 7 and summary["faults"]["steps_again"] > 0
    server = json.loads((broken / "server" / "summary.json").read_text())
    assert server["faults"]["resumed"] == 7, "each is known after the next, also with no checkpoint of a step between"
    assert not (broken / "device" / "checkpoints").exists() and not (broken / "server" / "checkpoints").exists()


def test_both_sides_hear_which_checkpoints_the_other_has(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, confirm = set(), Checkpoints.confirm

    def confirmed(checkpoints: Checkpoints, step: int) -> None:
        told.add((checkpoints.folder.parent.name, step))
        confirm(checkpoints, step)

    monkeypatch.setattr(Checkpoints, "confirm", confirmed)
    assert leg(tmp_path, CASES["nested widths"], few, 10) is None
    assert {(side, step) for side in ("device", "server") for step in (4, 8)} <= told


@pytest.mark.parametrize("name", ["nested widths", "frozen head"])
def test_stopped_while_it_waits_for_an_answer_it_goes_on_from_before_that_step(
    name: str, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass has moved batch norm's statistics by then, and the books have what was sent."""
    text = CASES[name]
    whole = leg(tmp_path / "whole", text, few)
    learn, recall, broken = RemoteTail.learn, RemoteTail.recall, tmp_path / "broken"
    stops, trainers, prepare = [3, 7, 14], [], Trainer.prepare

    def stopped(remote: RemoteTail, step: int, *arguments: Any) -> Any:
        if stops and step == stops[0]:
            stops.pop(0)
            remote.meter.frame(UP, next(iter(remote._pack(Place(pb.ACTIVATION, 0, 0), np.ones((1, 2), "f4"), FP32))))
            raise KeyboardInterrupt
        return (recall if len(arguments) == 2 else learn)(remote, step, *arguments)

    def prepared(trainer: Trainer, *arguments: Any) -> None:
        trainers.append(trainer)
        prepare(trainer, *arguments)

    for owner, method, new in ((RemoteTail, "learn", stopped), (RemoteTail, "recall", stopped)):
        monkeypatch.setattr(owner, method, new)
    monkeypatch.setattr(Trainer, "prepare", prepared)
    for step in (3, 7, 14):
        host = server_of(broken, text)
        with pytest.raises(KeyboardInterrupt):
            leg(broken, text, few, None, host)
        assert max(trainers[-1].checkpoints.written) == step
        assert host.run
        host.run.keep()
        host.folder.close()
    summary = leg(broken, text, few)
    assert whole and summary
    assert_same_end(broken, tmp_path / "whole")
    for way in ("up", "down"):
        assert summary["bytes"][way]["by_role"] == whole["bytes"][way]["by_role"]


def test_a_device_that_dies_right_after_a_validation_judges_again(tmp_path: Path) -> None:
    """Its checkpoint is of the moment before; the server, which lives, has applied the step after it."""
    text, data = CASES["plateau"], load("digits", (1, 16, 16), 3, 0.2, limit=320)
    epoch = len(data.train) // 16
    whole = leg(tmp_path / "whole", text, data)
    host = server_of(tmp_path / "broken", text)
    for until in (epoch, 2 * epoch):
        assert leg(tmp_path / "broken", text, data, until, host) is None
    summary = leg(tmp_path / "broken", text, data, None, host)
    assert whole and summary
    assert_same_end(tmp_path / "broken", tmp_path / "whole")
    for way in ("up", "down"):
        assert summary["bytes"][way]["by_role"] == whole["bytes"][way]["by_role"]


@pytest.mark.parametrize("lost", ["device", "device and server", "device with its disk, and server"])
@pytest.mark.parametrize("name", ["principal components, adamw", "nested widths"])
def test_lost_before_the_first_step(name: str, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_before_the_first_step(CASES[name], lost, tmp_path, monkeypatch)


def test_a_basis_that_was_lost_on_the_way_is_sent_again(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = CASES["principal components, adamw"]
    whole = inprocess.train(text, few, folder=tmp_path / "whole")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    cut = inprocess.train(text, few, remote_class=Cut, folder=tmp_path / "cut")
    assert cut["faults"]["reconnects"] == 1
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    for way in ("up", "down"):
        assert cut["bytes"][way]["by_role"] == whole["bytes"][way]["by_role"]


def test_other_pictures_are_not_gone_on_with(few: Dataset, tmp_path: Path) -> None:
    from common.errors import DataError, MismatchError

    text = CASES["nested widths"]
    leg(tmp_path, text, few, 6)
    relabelled = Part(few.train.pictures, few.train.labels[::-1].copy())
    assert fingerprint(few.train) != fingerprint(relabelled)
    other = load("digits", (1, 16, 16), 4, 0.0, limit=320)
    with pytest.raises(DataError, match="not the 320 pictures that the run began with"):
        leg(tmp_path, text, other)
    # Another server, which has nothing of this run.
    (tmp_path / "server").rename(tmp_path / "away")
    with pytest.raises(MismatchError, match="this server has a new run, which no device has begun"):
        leg(tmp_path, text, few)
    (tmp_path / "away").rename(tmp_path / "server")
    for side, others in (("server", HEAD), ("device", TAIL)):
        with pytest.raises(RunFolderError, match=f"{side} is the folder of the {side} of a run"):
            RunFolder(tmp_path / side).left_by(others)
    assert leg(tmp_path, text, few)


def test_a_step_that_fails_half_way_is_made_again_from_a_checkpoint(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had moved by then is in no weights: here the optimiser fails when it has moved some of them."""
    text = CASES["frozen head"]
    assert leg(tmp_path / "whole", text, few)
    apply, failing = Training.apply, [7, 12]

    def halfway(training: Training) -> Decision:
        if failing and training.step == failing[0]:
            failing.pop(0)
            training._optimiser.step()
            raise RuntimeError("no more memory")
        return apply(training)

    host = server_of(tmp_path / "broken", text)
    monkeypatch.setattr(Training, "apply", halfway)
    for _ in range(2):
        with pytest.raises(FaultError):
            leg(tmp_path / "broken", text, few, None, host)
        assert host.run and host.run.training and host.run.training.spoiled
    assert leg(tmp_path / "broken", text, few, None, host)
    assert_same_end(tmp_path / "broken", tmp_path / "whole")


def test_no_checkpoint_has_the_outcome_of_an_evaluation_without_its_bytes(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training stream may be taking one while the device is judged already; nobody would count the bytes again."""
    judged, runs, order = Training.judged, [], []
    keep, begin = LiveRun.keep, LiveRun.begin

    def begun(run: LiveRun, *arguments: Any) -> None:
        runs.append(run)
        begin(run, *arguments)

    def kept(run: LiveRun, anew: bool = False) -> None:
        keep(run, anew)
        order.append("by the evaluation" if anew else "by another")

    def slowly(training: Training, *arguments: Any) -> Decision:
        decision = judged(training, *arguments)
        order.clear()
        threads.append(threading.Thread(target=runs[0].pause))
        threads[-1].start()
        threads[-1].join(0.2)
        assert not order
        return decision

    threads: list[threading.Thread] = []
    for owner, name, new in ((LiveRun, "begin", begun), (LiveRun, "keep", kept), (Training, "judged", slowly)):
        monkeypatch.setattr(owner, name, new)
    leg(tmp_path, CASES["plateau"], few)
    for thread in threads:
        thread.join(30)
    assert threads and {"by another", "by the evaluation"} == set(order)
