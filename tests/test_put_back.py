"""Where a run that both sides know is gone on from: what moves it back, and what must not."""

from __future__ import annotations

import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks.recipes import BATCH, CLASSES, recipe_text
from common.errors import FrameError, MismatchError, SessionError
from common.recipe import parse
from common.rpc import split_pb2 as pb
from common.run import RunFolder
from edge_server.host import Host
from edge_server.live import LiveRun
from edge_server.sessions import Session


def begun(host: Host, step: int = 0, run_id: str = "", kept: tuple[int, ...] = ()) -> tuple[Session, Mock]:
    """A session that trains, and its stream."""
    assert host.run
    session, _ = host.open(True, run_id, kept, "", "")
    stream = Mock()
    stream.cancel.side_effect = lambda part=host.run.part: threading.Thread(target=part, args=(stream,)).start()
    host.begin(session, pb.Begin(samples=64, classes=CLASSES, step=step), stream)
    return session, stream


def applied(run: LiveRun) -> None:
    """Apply the step that was learnt, and keep a checkpoint where one is due after it."""
    assert run.training
    if snapshot := run.snapshot_after(run.training.apply()):
        run.write(snapshot)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """Of a run of twenty steps, at step 8, with checkpoints of steps 0 and 5."""
    text = recipe_text("plain", schedule="phases = [[0, 10]]")
    host = Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(quiet=True), (), False)
    assert host.run
    host.run.every = 5
    begun(host)
    host.run.keep()
    training = host.run.training
    assert training
    for _ in range(8):
        training.learn(*BATCH)
        applied(host.run)
    return host


def test_an_evaluation_waits_while_the_run_is_put_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would tell the device an outcome that the server's books don't have, and that nobody asks for again."""
    run = host.run
    assert run and run.training
    before = run.training
    session, _ = begun(host, 8, run.run_id, (8,))
    putting_back, judging = threading.Event(), threading.Event()
    put_back, found = run.put_back, []

    def slowly(step: int) -> None:
        putting_back.set()
        found.append(judging.wait(2))
        put_back(step)

    def judge() -> None:
        with host.judging(session, Mock()) as training:
            judging.set()
            found.append(training is not before)

    monkeypatch.setattr(run, "put_back", slowly)
    threads = [threading.Thread(target=begun, args=(host, 5, run.run_id, (0, 5))), threading.Thread(target=judge)]
    threads[0].start()
    assert putting_back.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert found == [False, True]
    assert run.step == 5


def test_a_handshake_that_is_played_once_more_disturbs_nothing(host: Host) -> None:
    run = host.run
    assert run and run.training
    training = run.training
    _, stream = begun(host, 8, run.run_id, (5, 8))
    # As a device of long ago sent it: what it was told then is not known to whoever plays it now.
    stranger, told = host.open(True, run.run_id, (0, 5), "", "")
    assert told == 5 and run.training is training and run.step == 8 and run.attended
    stream.cancel.assert_not_called()
    with pytest.raises(FrameError, match="Evaluate came before Begin"), host.judging(stranger, Mock()):
        pass
    with pytest.raises(FrameError, match="the handshake told this device to go on at 5"):
        host.begin(stranger, pb.Begin(samples=64, classes=CLASSES, step=0), Mock())
    assert run.training is training
    stream.cancel.assert_not_called()


def test_a_run_that_went_on_meanwhile_is_not_put_where_it_cannot_be(host: Host) -> None:
    run = host.run
    assert run and run.training
    late, told = host.open(True, run.run_id, (0,), "", "")
    assert told == 0
    for _ in range(7):  # checkpoints of steps 10 and 15 take the place of the first
        run.training.learn(*BATCH)
        applied(run)
    with pytest.raises(SessionError, match="the run has gone on from step 0 meanwhile; open another session"):
        host.begin(late, pb.Begin(samples=64, classes=CLASSES, step=0), Mock())


def test_a_device_that_stayed_while_its_server_was_replaced_can_still_be_replaced_itself(
    host: Host, tmp_path: Path
) -> None:
    """The server kept a checkpoint of where it was stopped; the device stood there too, without one of its own."""
    assert host.run
    host.run.pause()
    host.close()
    text = (tmp_path / "run" / "recipe.toml").read_text()
    other = Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(quiet=True), (), False)
    run = other.run
    assert run
    run.every = 5
    session, told = other.open(True, run.run_id, (0, 5, 8), "", "")
    assert told == 8
    other.begin(session, pb.Begin(samples=64, classes=CLASSES, step=8), Mock())
    assert run.training
    for _ in range(3):
        run.training.learn(*BATCH)
        applied(run)
    assert run.step == 11 and run.checkpoints.written >= {5, 8, 10}
    # The device died before it kept one of step 10.
    assert other.open(True, run.run_id, (0, 5), "", "")[1] == 5
    # It tells of one after all: then the older ones may go.
    run.checkpoints.confirm(10)
    assert run.checkpoints.written == {8, 10}


def test_what_failed_half_way_is_neither_kept_nor_judged(host: Host) -> None:
    run = host.run
    assert run and run.training
    session, _ = begun(host, 8, run.run_id, (8,))
    run.training.spoiled = True
    before = sorted(run.checkpoints.written)
    run.keep()
    assert sorted(run.checkpoints.written) == before and run.step not in before
    with pytest.raises(SessionError, match="failed half-way"), host.judging(session, Mock()):
        pass


def test_what_was_taken_for_a_checkpoint_does_not_change(host: Host) -> None:
    """It is written while the next thing may happen to the network already."""
    run = host.run
    assert run and run.training
    taken = run.snapshot()
    assert taken
    before = {name: value.clone() for name, value in taken.tensors.items()}
    run.training.learn(*BATCH)
    run.training.apply()
    for name, value in taken.tensors.items():
        assert torch.equal(value, before[name]), name


def test_a_run_that_another_device_began_since_is_not_the_first_ones(tmp_path: Path) -> None:
    """Both stand at step 0, so the step alone does not tell them apart: the second's half would train with the first's
    data, and be judged on it."""
    text = recipe_text("plain", schedule="phases = [[0, 10]]")
    host = Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(quiet=True), (), False)
    assert host.run and not host.run_id
    first, stream = begun(host)
    was = host.run_id
    host.run.part(stream)
    again, _ = host.open(True, was, (0,), "", "")
    begun(host)
    assert was and host.run_id not in ("", was)
    for session in (first, again):
        with pytest.raises(SessionError, match="another device has begun this run since"):
            host.begin(session, pb.Begin(samples=64, classes=CLASSES), Mock())
        with pytest.raises((SessionError, FrameError)), host.judging(session, Mock()):
            pass
    with pytest.raises(MismatchError, match=f"holds run {was}, this server trains run {host.run_id}"):
        host.open(True, was, (0,), "", "")


class Detaching(nn.Module):
    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(shape[0], 4, 3), nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)).detach().mean((2, 3)))


def test_a_tail_that_detaches_what_it_is_given_has_a_gradient_of_zeros(tmp_path: Path) -> None:
    """None at all would be waited for by the device."""
    name = "tests.test_put_back:Detaching"
    text = recipe_text(model=f'name = "{name}"\ninput = [1, 16, 16]\nclasses = 10\ncut = "relu"')
    host = Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(quiet=True), (name,), False)
    begun(host)
    assert host.run and host.run.training
    gradient, _, _ = host.run.training.learn(np.ones((64, 4, 14, 14), np.float32), np.zeros(64, np.int64))
    assert gradient is not None and gradient.shape == (64, 4, 14, 14) and not gradient.any()


def test_a_class_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    """Devices that predict print it: it would be one device's word to another's terminal."""
    text = recipe_text("plain", schedule="phases = [[0, 10]]")
    host = Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(quiet=True), (), False)
    session, _ = host.open(True, "", (), "", "")
    classes = (*CLASSES[:-1], "cat\x1b[2J")
    with pytest.raises(MismatchError, match="characters in its name that no terminal shows"):
        host.begin(session, pb.Begin(samples=64, classes=classes), Mock())
    begun(host)


def test_a_beginning_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """And leaves the run to whoever begins it next."""
    text = recipe_text()
    host = Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(quiet=True), (), False)
    for wrong in ({"samples": 0}, {"samples": 2**41}, {"samples": 64, "test": 2**41}):
        session, _ = host.open(True, "", (), "", "")
        with pytest.raises(FrameError, match="Begin says"):
            host.begin(session, pb.Begin(classes=CLASSES, **wrong), Mock())
    begun(host)


def test_a_head_for_which_a_budget_has_set_nothing_aside_is_refused(tmp_path: Path) -> None:
    """Of a device that publishes only when it comes back."""
    text = recipe_text("deprune", bottleneck='kind = "linear"', schedule="phases = [[2, 10]]\nbudget_mb = 5")
    host = Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(quiet=True), (), False)
    session, _ = begun(host)
    with pytest.raises(MismatchError, match="began without --publish-head"):
        host.begin(session, pb.Begin(samples=64, classes=CLASSES, head=1), Mock())
    unbounded = text.replace("budget_mb = 5", "")
    host = Host.to_train(parse(unbounded), unbounded, RunFolder(tmp_path / "other"), Console(quiet=True), (), False)
    session, stream = begun(host)
    host.begin(session, pb.Begin(samples=64, classes=CLASSES, head=1), stream)
