"""Faults where little is left to do, or little was known: over the last word, among recalled steps, by a stranger."""

from __future__ import annotations

import errno
import io
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from benchmarks.recipes import recipe_text
from common import run
from common.errors import (
    BusyError,
    DataError,
    LinkError,
    MismatchError,
    RolledBackError,
    RunFolderError,
    SessionError,
    StoppedError,
)
from common.halves import CPU
from common.rpc import split_pb2 as pb
from common.run import HEAD, TAIL, RunFolder
from device_client import trainer
from device_client.data import Dataset, Part, load
from device_client.last_write import write_with_patience
from device_client.link import Backoff, Stream
from device_client.remote_tail import RemoteTail
from device_client.trainer import Trainer
from edge_server.host import Host
from edge_server.limits import Limits
from edge_server.live import LiveRun
from edge_server.server import Server
from edge_server.train_stream import TrainStream
from tests.legs import CASES, Killed, assert_same_end, leg, server_of


@pytest.mark.parametrize("name", ["plateau", "nested widths"])
def test_a_device_that_dies_over_the_last_word_comes_back_to_hear_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is finished on the server, by a validation or by its schedule; a server with --once waits for it."""
    text, data = CASES[name], load("digits", (1, 16, 16), 3, 0.2, limit=320)
    whole = leg(tmp_path / "whole", text, data)
    leave = RemoteTail.leave

    def killed(*arguments: Any) -> None:
        leave(*arguments)
        raise Killed

    host = server_of(tmp_path / "broken", text)
    with monkeypatch.context() as patched:
        patched.setattr(RemoteTail, "leave", killed)
        assert leg(tmp_path / "broken", text, data, lives=host) is None
    assert host.served and host.finished_at
    host.ended.clear()
    opened = Host.open

    def watched(*arguments: Any) -> Any:
        result = opened(*arguments)
        assert not host.ended.is_set(), "it has the test part to judge yet"
        return result

    close = Stream.close

    def to_the_end(self: Stream) -> None:
        close(self)
        self.drain(0)  # gRPC runs what answers a stream to its end; in process whoever reads does

    monkeypatch.setattr(Host, "open", watched)
    monkeypatch.setattr(Stream, "close", to_the_end)
    summary = leg(tmp_path / "broken", text, data, lives=host)
    assert host.ended.is_set()
    assert whole and summary and summary["accuracy"] == whole["accuracy"]
    assert_same_end(tmp_path / "broken", tmp_path / "whole")


def test_only_a_server_that_trained_the_run_waits_for_its_device(few: Dataset, tmp_path: Path) -> None:
    """One that has served from its start has nothing to announce; and a device that is judging for the last time is not
    given a new minute, nor let go, by another visit of its own."""
    trained = server_of(tmp_path, CASES["nested widths"])
    late, _ = trained.open(True, "", (), "", "")  # a second device's, which begins too late
    assert leg(tmp_path, CASES["nested widths"], few, lives=trained)
    assert trained.finished_at
    with trained.telling():
        trained.open(True, trained.run_id, (), "", "")
        assert trained.finished_at == math.inf
    since = trained.finished_at
    trained.open(True, trained.run_id, (), "", "")
    assert since <= trained.finished_at < math.inf
    with pytest.raises(SessionError, match="is finished; open another to hear of it"):
        trained.begin(late, pb.Begin(), Mock())
    served = Host.to_serve(RunFolder(tmp_path / "server"), Console(file=io.StringIO()), (), Limits(), CPU)
    served.open(True, served.run_id, (), "", "")
    with served.telling():
        pass
    assert served.finished_at is None


def test_a_full_disk_at_the_end_is_waited_for(few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no checkpoint either: what was trained would be lost."""
    write, tried = RunFolder.write_half, []

    def full(self: RunFolder, half: str, *arguments: Any) -> None:
        tried.append(half)
        if tried.count(HEAD) < 3 and half == HEAD:
            raise RunFolderError("the disk is full")
        write(self, half, *arguments)

    monkeypatch.setattr(RunFolder, "write_half", full)
    monkeypatch.setattr("device_client.last_write._ROOM_S", 0.01)
    assert leg(tmp_path, CASES["nested widths"], few)
    assert tried == [HEAD] * 3 + [TAIL] and (tmp_path / "device" / "head.safetensors").is_file()


def test_who_waits_for_room_can_be_stopped() -> None:
    """At once, and as any stop: what starts a device again tells that from a failure by its exit code."""
    stops, tried, console = iter([False, True, True]), [], Console(file=io.StringIO(), width=300)

    def full() -> None:
        tried.append(1)
        raise RunFolderError("no head") from OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(KeyboardInterrupt):
        write_with_patience(full, lambda: 86_200, 600.0, lambda: next(stops), console)
    assert len(tried) == 2
    assert "in this process alone: make room for 86.2 kB; trying again" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_device_that_dies_while_steps_are_recalled_books_their_request_once(few: Dataset, tmp_path: Path) -> None:
    """The server made them for a process that heard of none, or of some: both sides' books agree at the end."""
    text = CASES["frozen head"]
    for until in (14, 15, 19):  # recalled from 14 on
        host = server_of(tmp_path / str(until), text)
        assert host.run
        assert leg(tmp_path / str(until), text, few, until, host) is None
        summary = leg(tmp_path / str(until), text, few, None, host)
        theirs = json.loads((tmp_path / str(until) / "server" / "summary.json").read_text())
        assert summary
        for way in ("up", "down"):
            assert summary["bytes"][way]["by_role"] == theirs["bytes"][way]["by_role"], (until, way)


def test_a_device_with_other_pictures_takes_nothing_from_the_run(few: Dataset, tmp_path: Path) -> None:
    """It is refused before the run is put back for it, also where another has begun the run anew meanwhile."""
    text, host = CASES["nested widths"], server_of(tmp_path, CASES["nested widths"])
    run = host.run
    assert run
    assert leg(tmp_path, text, few, 0, host) is None
    stands = run.training, sorted(run.checkpoints.written)
    session, step = host.open(True, run.run_id, [0], "", "")
    stream = Mock()
    with pytest.raises(MismatchError, match="came back with 300 pictures of 10 classes; the run began with 320 of 10"):
        host.begin(session, pb.Begin(samples=300, classes=few.classes, step=step), stream)
    assert (run.training, sorted(run.checkpoints.written)) == stands
    assert leg(tmp_path, text, few, None, host)


def test_a_store_that_no_checkpoint_needs_is_removed_by_a_server_that_came_back(few: Dataset, tmp_path: Path) -> None:
    text = recipe_text(
        "deprune", data="batch = 16\ncrop = 1\nflip = true", bottleneck='kind = "linear"',
        schedule="phases = [{ width = 4, epochs = 0.6, views = 0.3 }, [8, 2]]",
    )  # fmt: skip
    assert leg(tmp_path, text, few, 14) is None  # the frozen phase is over at step 12
    left: list[int] = []
    host = server_of(tmp_path, text)
    assert host.run
    write = host.run.write

    def watched(*arguments: Any) -> None:
        write(*arguments)
        left.append(len(list((tmp_path / "server" / "checkpoints").glob("store-*"))))

    host.run.write = watched  # type: ignore[method-assign]
    assert leg(tmp_path, text, few, None, host)
    assert left[0] == 1 and left[-1] == 0, "an older checkpoint still needed it at first"


def test_a_stop_between_a_request_and_its_first_step_counts_for_both_sides_alike(few: Dataset, tmp_path: Path) -> None:
    text = recipe_text(
        "fixed", data="batch = 16", bottleneck='kind = "linear"',
        schedule="phases = [{ width = 4, epochs = 6, views = 0.3 }]",
    )  # fmt: skip
    host = server_of(tmp_path, text)
    requests = 0
    recall = TrainStream._recall

    def stopped(self: TrainStream, *arguments: Any) -> Iterator[pb.Frame]:
        nonlocal requests
        requests += 1
        host.stopping = requests == 2
        return recall(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStream, "_recall", stopped)
        patch.setattr(Backoff, "wait", lambda _self, error, _say: _raise(error))
        with pytest.raises(StoppedError):
            leg(tmp_path, text, few, None, host)
    assert host.run
    host.close()
    summary = leg(tmp_path, text, few)
    theirs = json.loads((tmp_path / "server" / "summary.json").read_text())
    assert summary and requests == 2
    for way in ("up", "down"):
        assert summary["bytes"][way]["by_role"] == theirs["bytes"][way]["by_role"]


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("file", ["tail.safetensors", "summary.json"])
def test_a_server_whose_disk_is_full_at_the_end_waits_for_room(
    file: str, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device asks again, and the books have the farewell once."""
    text, left, write = CASES["nested widths"], [2], run.write_atomically
    whole = leg(tmp_path / "whole", text, few)

    def full(path: Path, *rest: Any) -> None:
        if path.parent.name == "server" and path.name == file and left[0]:
            left[0] -= 1
            raise RunFolderError(f"{path} cannot be written: No space left on device")
        write(path, *rest)

    monkeypatch.setattr(run, "write_atomically", full)
    host = server_of(tmp_path / "full", text)
    for _ in range(2):
        with pytest.raises(
            BusyError, match="cannot keep the trained network .*No space left.*; it tries again until it can"
        ):
            leg(tmp_path / "full", text, few, lives=host)
    summary = leg(tmp_path / "full", text, few, lives=host)
    assert whole and summary
    assert_same_end(tmp_path / "full", tmp_path / "whole")
    books = [
        json.loads((tmp_path / name / "server" / "summary.json").read_text())["bytes"] for name in ("full", "whole")
    ]
    for way in ("up", "down"):
        assert books[0][way]["by_role"] == books[1][way]["by_role"]


def test_a_link_that_breaks_while_the_run_is_finished_finishes_it_once(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is back, and waits for its older stream, while that writes the end to a slow disk."""
    text, finished, back = CASES["nested widths"], [], threading.Event()
    host = server_of(tmp_path, text)
    server = Server(host, "127.0.0.1:0", None, False, None)
    server.start()
    remote = RemoteTail(f"127.0.0.1:{server.port}")
    write, take_over = RunFolder.write_summary, LiveRun.take_over

    def slowly(folder: RunFolder, summary: dict[str, Any]) -> None:
        if folder.path.name == "server":
            finished.append(folder)
            if len(finished) == 1:
                remote._train._incoming.cancel()
                assert back.wait(60)
        write(folder, summary)

    def coming(live: LiveRun, *context: Any) -> None:
        if finished:
            back.set()
        take_over(live, *context)

    monkeypatch.setattr(RunFolder, "write_summary", slowly)
    monkeypatch.setattr(LiveRun, "take_over", coming)
    remote.open(trains=True)
    device = Trainer(remote, few, RunFolder(tmp_path / "device"), Console(file=io.StringIO()))
    device.prepare((), None)
    device.folder.start(text)
    summary = device.run(publish=True)
    remote.close()
    server.stop(lambda: True)
    assert len(finished) == 1
    told = json.loads((tmp_path / "server" / "summary.json").read_text())
    for way in ("up", "down"):
        assert told["bytes"][way]["by_role"] == summary["bytes"][way]["by_role"]


@pytest.mark.parametrize("phase", ["{ width = 4, epochs = 1, views = 0.5 }", "{ width = 4, epochs = 1 }"])
def test_a_stop_in_the_last_step_leaves_the_test_part_for_the_next_start(
    phase: str, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may take long to send. A recall is asked for to the end of the run at once."""
    text = recipe_text("fixed", bottleneck='kind = "linear"', schedule=f"phases = [{phase}]")
    assert leg(tmp_path / "whole", text, few)
    after = Trainer._after

    def stopped(self: Trainer, *arguments: Any) -> dict[str, Any]:
        self.stopping = self.stopping or self.step == 6
        return after(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_after", stopped)
        if "views" not in phase:
            patched.setattr(Trainer, "_may_rest", lambda self: self.then == pb.FINISH)
        patched.setattr(Trainer, "_judge", lambda *_: pytest.fail("it was told to stop"))
        with pytest.raises(KeyboardInterrupt):
            leg(tmp_path / "stopped", text, few)
    assert RunFolder(tmp_path / "stopped" / "device").unfinished()["step"] == 10  # type: ignore[index]
    assert leg(tmp_path / "stopped", text, few)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_a_run_does_not_go_on_with_another_test_part(few: Dataset, tmp_path: Path) -> None:
    text = CASES["nested widths"]
    assert leg(tmp_path, text, few, 6) is None
    other = replace(few, test=Part(few.test.pictures[:50], few.test.labels[:50]))
    with pytest.raises(DataError, match="test or validation pictures are not those that the run began with"):
        leg(tmp_path, text, other)
    assert leg(tmp_path, text, few)


def test_a_server_that_dies_twice_before_new_ground_is_waited_for(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making 200 steps again can take longer than --give-up-after; what kills its server each time ends too."""
    text, backs, now = CASES["nested widths"], [0], [0.0]
    assert leg(tmp_path, text, few, 6) is None
    fit, furthest = trainer.Trainer.fit, 5

    def falls(self: trainer.Trainer, publish: bool) -> None:
        now[0] += 1000
        if backs[0]:
            backs[0] -= 1
            self.step = furthest
            raise RolledBackError("the server was put back to step 4", 4)
        fit(self, publish)

    monkeypatch.setattr(trainer.Trainer, "fit", falls)
    monkeypatch.setattr(trainer, "time", Mock(wraps=time, monotonic=lambda: now[0]))
    backs[0] = 100
    with pytest.raises(LinkError, match="step 5 was not passed in .*gave up"):
        leg(tmp_path, text, few)
    assert backs[0] > 85
    backs[0] = 3
    assert leg(tmp_path, text, few)
