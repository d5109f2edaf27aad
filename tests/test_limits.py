"""Every limit of a server, at it and past it; and that no device stalls the server for others, or makes it grow."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import grpc
import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks import inprocess, pair
from benchmarks import limits as bench_limits
from common import channel, wire
from common.errors import BusyError, FrameError, ModelError, StoppedError, StoreError, TooLargeError, from_rpc
from common.meter import Draft
from common.recipe import parse
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from common.run import RunFolder
from common.schedule import Phase
from common.wire import Place
from device_client import remote_tail, use
from device_client.data import load
from device_client.remote_tail import RemoteTail
from edge_server import incoming, limit_options
from edge_server.host import _GRACE_S, Host, Session
from edge_server.limits import Limits
from edge_server.store import Store
from tests.conftest import recipe_text

CLASSES = tuple("0123456789")
PLAIN = Phase(0, 0, 32, "fp32", "fp32", 0.05, 0, 1)
STEP = np.ones((32, 32, 8, 8), np.float32), np.zeros(32, np.int64)


def quiet_host(path: Path, **limits: Any) -> Host:
    text = recipe_text()
    return Host.to_train(parse(text), text, RunFolder(path), Console(file=io.StringIO()), (), False, Limits(**limits))


def opened(host: Host, caller: str, age: float = 0.0, begun: bool = False) -> Session:
    session, _ = host.open(True, "", (), "", caller)
    session.touched -= age
    session.begun = begun
    return session


def knows(host: Host, session: Session) -> bool:
    return session.name in host._sessions


# Sessions


def test_sessions_of_one_caller(tmp_path: Path) -> None:
    host = quiet_host(tmp_path, sessions=8, sessions_each=2)
    opened(host, "pi")
    opened(host, "pi")
    with pytest.raises(BusyError, match="already has 2 sessions") as refused:
        opened(host, "pi")
    assert refused.value.retry_after_s
    opened(host, "hut")


def test_sessions_at_once(tmp_path: Path) -> None:
    host = quiet_host(tmp_path, sessions=3, sessions_each=2)
    for caller in ("pi", "hut", "shed"):
        opened(host, caller)
    with pytest.raises(BusyError, match="already has 3 sessions"):
        opened(host, "barn")


def test_a_caller_with_many_sessions_keeps_no_one_out(tmp_path: Path) -> None:
    host = quiet_host(tmp_path, sessions=4, sessions_each=3)
    greedy = [opened(host, "greedy") for _ in range(3)]
    streaming = opened(host, "pi")
    streaming.streams = 1
    opened(host, "hut")
    assert [knows(host, session) for session in greedy] == [False, True, True] and knows(host, streaming)


def test_those_that_never_began_give_way_first_and_idle_ones_are_forgotten(tmp_path: Path) -> None:
    host = quiet_host(tmp_path, sessions=3, sessions_each=3, idle_s=1000)
    begun = opened(host, "pi", age=_GRACE_S + 50, begun=True)
    never = opened(host, "pi", age=_GRACE_S + 1)
    fresh = opened(host, "pi")
    opened(host, "pi")
    assert [knows(host, session) for session in (begun, never, fresh)] == [True, False, True]
    fresh.touched -= 999
    host.tend()
    assert knows(host, fresh)
    fresh.touched -= 2
    host.tend()
    assert not knows(host, fresh)


def test_thousands_of_opens_leave_no_more_than_the_limit(tmp_path: Path) -> None:
    host = quiet_host(tmp_path)
    refused = 0
    for number in range(5000):
        try:
            opened(host, f"address {number % 50}", age=number % 7 * 20)
        except BusyError:
            refused += 1
        assert len(host._sessions) <= host.limits.sessions
    assert 0 < refused < 5000


# What is sent


def test_elements_on_both_sides(tmp_path: Path) -> None:
    """A server does not start on a recipe past its limit, and a device sends nothing past what the server announced."""
    largest = 256 * 32 * 8 * 8  # an evaluation batch of the recipe
    quiet_host(tmp_path / "at", elements=largest)
    with pytest.raises(ModelError, match=f"an activation of {largest:,} elements would cross.*--max-elements"):
        quiet_host(tmp_path / "past", elements=largest - 1)

    class Announced(RemoteTail):
        most = 32 * 32 * 8 * 8

        def open(self, *arguments: Any, **options: Any) -> Any:
            self.opened = replace(super().open(*arguments, **options), max_elements=self.most)
            return self.opened

    pictures = load("digits", (1, 16, 16), 3, 0.0, limit=64)
    text = recipe_text(data="batch = 32\nevaluation_batch = 32", schedule="phases = [[0, 1]]")
    inprocess.train(text, pictures, Announced)
    Announced.most -= 1
    with pytest.raises(TooLargeError, match=r"65,536 elements are to be sent, and the server takes up to 65,535"):
        inprocess.train(text, pictures, Announced)


def test_the_server_announces_its_limit(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text())
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "run", "--max-elements", 256 * 32 * 8 * 8)
    with pair.server(*arguments, log=tmp_path / "log") as (_, address):
        remote = RemoteTail(address)
        assert remote.open(trains=True).max_elements == 256 * 32 * 8 * 8
        remote.close()


def test_labels() -> None:
    for classes in (10, 256, 300):
        place = Place(pb.LABEL, 0, 0)
        (frame,) = wire.pack_labels(place, np.array([0, classes - 1]), classes)
        assert list(wire.unpack_labels(frame, pb.Frame, place, 2, classes)) == [0, classes - 1]
    (frame,) = wire.pack_labels(place, np.array([0, 10]), 10)
    with pytest.raises(FrameError, match="label 10 came; the recipe has classes 0 to 9"):
        wire.unpack_labels(frame, pb.Frame, place, 2, 10)


@pytest.mark.parametrize(("over", "error"), [(0, FrameError), (64 << 10, TooLargeError)])
def test_message_size(server: str, over: int, error: type[Exception]) -> None:
    """A frame's worth is read, and refused as a first frame; more is refused unread."""
    large = Place(pb.ACTIVATION, 0, 0).frame(part=pb.Part(data=bytes(wire.FRAME_BYTES + over)))
    with grpc.insecure_channel(server) as link, pytest.raises(grpc.RpcError) as refused:
        list(split_pb2_grpc.SplitStub(link).Train(iter([large])))
    came = from_rpc(refused.value, server)
    assert type(came) is error, came


def test_an_evaluation_batch(serving: str) -> None:
    """Labels past the batch's size are refused by what they announce, not once they have come."""
    for count, words in ((256, "classes 0 to 9"), (257, "evaluation batch of 257"), (1 << 30, "of 1,073,741,824")):
        with evaluation(serving) as stream:
            frames = list(wire.pack_labels(Place(pb.EVALUATION, 0, 0), np.full(min(count, 257), 10), 10))
            frames[0].part.tensor.shape[0] = count
            stream.send(frames[0])
            with pytest.raises(FrameError, match=words):
                stream.receive(Draft(RemoteTail("127.0.0.1:1", stub=object()).meter))


def test_recalled_steps_and_cached_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of one step are kept, or one for each step of a single Recall: no more, however long the run."""
    kept: list[tuple[str, int, int]] = []

    def watch(step: int, phase: Phase, trainer: Any, training: Any) -> None:
        size = sum(frame.ByteSize() for answer in training.answers for frame in answer)
        kept.append((phase.kind, len(training.answers), size))

    text = recipe_text("fixed", schedule="phases = [[0, 2], { width = 0, epochs = 8, views = 1 }]")
    pictures = load("digits", (1, 16, 16), 3, 0.0, limit=160)
    monkeypatch.setattr(remote_tail, "_RECALLED", 16)
    inprocess.train(text, pictures, watch=watch, limits=Limits(recall=16))
    recalled = [(count, size) for kind, count, size in kept if kind == "recall"]
    assert len(recalled) > 20 and max(count for count, _ in recalled) == 16
    assert max(size for _, size in recalled) < 16 * 100
    assert {count for kind, count, _ in kept if kind != "recall"} == {1}
    assert max(size for _, _, size in kept) < 4 * 32 * 32 * 8 * 8 + 500
    monkeypatch.setattr(remote_tail, "_RECALLED", 17)
    with pytest.raises(FrameError, match="Recall of 17 steps came; the server makes 16 at once"):
        inprocess.train(text, pictures, limits=Limits(recall=16))


def test_store(tmp_path: Path) -> None:
    store = Store(tmp_path, PLAIN, (1, 1), 0, limit=10)
    store.add(bytes(10), np.zeros(1, int))
    with pytest.raises(StoreError, match="--store-limit"):
        store.add(bytes(1), np.zeros(1, int))
    store.close()


def test_bytes_a_second_are_held_up_and_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delays that are asked for are those of the rate, and the run is the same."""
    delays: list[float] = []
    monkeypatch.setattr(incoming, "hold_up", lambda seconds, *_: delays.append(seconds))
    pictures = load("digits", (1, 16, 16), 3, 0.0, limit=320)
    free = inprocess.train(recipe_text(schedule="phases = [[0, 1]]"), pictures)
    assert set(delays) == {0.0}
    delays.clear()
    slow = inprocess.train(recipe_text(schedule="phases = [[0, 1]]"), pictures, limits=Limits(rate=1000.0))
    assert slow["loss"] == free["loss"] and slow["steps"] == 10
    sent = sum(slow["bytes"]["up"]["by_role"][role]["message"] for role in ("activation", "label", "evaluation"))
    assert delays[0] == 0 and delays[len(delays) // 2] > 0, "a burst, then a debt"
    # The test takes seconds, in which some of it is paid.
    assert 0.8 * sent < 1000.0 * max(delays) + wire.FRAME_BYTES < 1.01 * sent


def test_a_device_that_is_held_up_is_let_go_where_its_stream_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(incoming, "time", clock)
    host: Any = SimpleNamespace(stopping=False)
    incoming.hold_up(7.1, SimpleNamespace(is_active=lambda: True), host)
    assert clock.now == pytest.approx(7.1)
    incoming.hold_up(7.1, SimpleNamespace(is_active=lambda: clock.now < 9), host)
    assert 9 <= clock.now < 9.5
    host.stopping = True
    incoming.hold_up(7.1, SimpleNamespace(is_active=lambda: True), host)
    assert clock.now < 9.5


def test_options_fill_in_the_limits() -> None:
    made: list[Limits] = []

    @click.command(cls=limit_options.Grouped)
    @limit_options.limits
    def serve(**limits: Any) -> None:
        made.append(Limits(**limits))

    run = CliRunner().invoke
    assert run(serve, []).exit_code == 0 and made == [Limits()]
    given = {
        "--max-rate": 0.5, "--store-limit": 10, "--max-sessions": 5, "--max-sessions-each": 2, "--max-calls": 0.1,
        "--max-queue": 3, "--max-elements": 7, "--max-recall": 8, "--idle-time": 9.5,
    }  # fmt: skip
    assert run(serve, [str(word) for pair_of in given.items() for word in pair_of]).exit_code == 0
    expected = Limits(
        rate=500_000, store=10_000_000, sessions=5, sessions_each=2, calls_a_second=0.1, queue=3, elements=7, recall=8,
        idle_s=9.5,
    )  # fmt: skip
    assert made[-1] == expected
    assert run(serve, ["--max-queue", "0"]).exit_code == 2
    page = (Path(__file__).parent.parent / "docs" / "limits.md").read_text()
    for option in serve.params:
        assert f"`{option.opts[0]}`" in page, "every option is on the page"


# Servers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that waits to train, and for a silent device no longer than two seconds."""
    path = tmp_path_factory.mktemp("limits")
    (path / "recipe.toml").write_text(recipe_text(schedule="phases = [[0, 1000]]"))
    arguments = (path / "recipe.toml", "--run", path / "run", "--threads", 1, "--idle-time", 2)
    with pair.server(*arguments, log=path / "log") as (process, address):
        yield address
        assert process.poll() is None and "Traceback" not in (path / "log").read_text(), (path / "log").read_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps: the folders `device` and `server`."""
    path = tmp_path_factory.mktemp("finished")
    pictures = load("digits", (1, 16, 16), 3, 0.0, limit=64)
    inprocess.train(recipe_text(schedule="phases = [[0, 1]]"), pictures, folder=path)
    shutil.copy(path / "device" / "head.safetensors", path / "server")  # published
    return path


@pytest.fixture(scope="module")
def serving(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One with a finished run and two places for evaluations."""
    log = tmp_path_factory.mktemp("serving") / "log"
    arguments = ("--run", finished / "server", "--threads", 1, "--max-queue", 2, "--max-calls", 1e6)
    with pair.server(*arguments, "--max-sessions-each", 4, log=log) as (_, address):
        yield address
        assert "Traceback" not in log.read_text(), log.read_text()


@contextlib.contextmanager
def evaluation(address: str) -> Iterator[Any]:
    """An Evaluate stream of a session of its own, after Begin."""
    remote = RemoteTail(address)
    try:
        phase = remote.open(trains=False).phase
        assert phase
        draft = Draft(remote.meter)
        stream = remote._begin_evaluation(0, pb.TEST, CLASSES, phase, draft)
        yield stream  # which ends when it is let go
    finally:
        remote.close()


def process_at(address: str) -> psutil.Process:
    """The process that listens there."""
    port = channel.parse_address(address)[1]
    for process in psutil.Process().children(recursive=True):
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections()):
            return process
    raise AssertionError(address)


def comes(what: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether it becomes true; for waiting, not for measuring."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_silent_stream_is_ended_and_its_run_goes_on(server: str) -> None:
    remote = RemoteTail(server, give_up_s=60)
    remote.open(trains=True)
    try:
        remote.begin(1438, CLASSES)
        for step in range(4):
            remote.learn(step, PLAIN, *STEP, None)
            time.sleep(1)  # a pause that is allowed
        assert remote.faults.reconnects == 0
        with pytest.raises(StoppedError, match="heard nothing for longer than its --idle-time"):
            remote._stream.receive(Draft(remote.meter))
        remote._lose()
        _, result, _ = remote.learn(4, PLAIN, *STEP, None)
        assert result.loss > 0, "at the step where it stood"
    finally:
        remote.close()


def test_a_stream_that_never_begins_is_ended(server: str) -> None:
    release = threading.Event()

    def nothing() -> Iterator[pb.Frame]:
        release.wait(60)
        yield from ()

    with grpc.insecure_channel(server) as link:
        call = split_pb2_grpc.SplitStub(link).Train(nothing())
        assert call.exception(timeout=30).code() == grpc.StatusCode.CANCELLED
        release.set()


def test_calls_of_one_caller(serving: str) -> None:
    """Streams that say nothing take up the places of who opened them, and those alone."""
    most, release = Limits(sessions_each=4).calls_each, threading.Event()

    def nothing() -> Iterator[pb.Frame]:
        release.wait(60)
        yield from ()

    with grpc.insecure_channel(serving) as link:
        stub = split_pb2_grpc.SplitStub(link)
        calls = [stub.Evaluate(nothing()) for _ in range(most)]
        time.sleep(0.5)
        assert not any(call.done() for call in calls)
        with pytest.raises(grpc.RpcError) as refused:
            list(stub.Evaluate(iter([])))
        error = from_rpc(refused.value, serving)
        assert isinstance(error, BusyError) and f"{most} calls open" in str(error) and error.retry_after_s
        release.set()
        for call in calls:
            call.exception()
        assert comes(lambda: not _busy(stub))


def _busy(stub: split_pb2_grpc.SplitStub) -> bool:
    try:
        list(stub.Evaluate(iter([])))
    except grpc.RpcError as error:
        return error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    return False


def test_the_queue_of_evaluations(serving: str, finished: Path) -> None:
    taken = contextlib.ExitStack()
    for _ in range(2):
        taken.enter_context(evaluation(serving))
    with taken:
        time.sleep(0.3)  # both have begun
        with evaluation(serving) as third, pytest.raises(BusyError, match="already judging for 2") as refused:
            third.receive(Draft(RemoteTail("127.0.0.1:1", stub=object()).meter))
        assert refused.value.retry_after_s == Limits().retry_s
        line = pair.command("device-client", "evaluate", serving, "--data", "digits", "--run", finished / "device")
        told: list[str] = []
        with subprocess.Popen(line, stdout=-1, stderr=subprocess.STDOUT, text=True, env=pair.environment()) as device:
            assert device.stdout
            for text in device.stdout:
                told.append(text)
                if "more tries" in text:
                    taken.close()
    assert device.returncode == 0 and "named rightly" in told[-1], told


def test_a_device_tries_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(use.time, "sleep", waits.append)

    def never() -> None:
        raise BusyError("no room", 5.0)

    with pytest.raises(BusyError):
        use.patiently(never, lambda text: None)
    assert len(waits) == use.TRIES - 1 and all(5.0 <= wait <= 7.5 for wait in waits)

    def at_once() -> None:
        raise BusyError("this run is already being trained by another device")

    with pytest.raises(BusyError):
        use.patiently(at_once, lambda text: None)
    assert len(waits) == use.TRIES - 1, "where the server does not say when, there is no use in waiting"


def test_what_is_sent_without_reading_stays_with_the_device(serving: str) -> None:
    """Evaluation batches without end whose answers are not read: the server takes in a bounded number."""
    process, sent = process_at(serving), 0
    remote = RemoteTail(serving)
    phase = remote.open(trains=False).phase
    assert phase
    batch = np.ones((256, phase.width, 8, 8), np.float32)

    def endless() -> Iterator[pb.Frame]:
        nonlocal sent
        begin = pb.Begin(session=remote.opened.session, samples=1, classes=CLASSES)
        yield wire.seal(Place(pb.EVALUATION, 0, phase.index).frame(begin=begin))
        for number in range(3000):
            for frame in remote._pack(Place(pb.EVALUATION, number, phase.index), batch, phase):
                sent += 1
                yield frame

    before = process.memory_info().rss
    call = remote._stub.Evaluate(endless())
    try:
        seen = -1
        while seen != sent:  # still taking some
            seen = sent
            time.sleep(1)
        assert 1 < sent < 3000
        assert process.memory_info().rss - before < 64 << 20
    finally:
        call.cancel()
        remote.close()


def test_opens_do_not_make_a_server_grow(serving: str) -> None:
    process = process_at(serving)
    request = wire.seal(pb.OpenRequest(protocol_version=wire.PROTOCOL_VERSION, purpose=pb.USE))
    sizes = []
    with grpc.insecure_channel(serving) as link:
        stub = split_pb2_grpc.SplitStub(link)
        for _ in range(2):
            for _ in range(1500):
                with contextlib.suppress(grpc.RpcError):
                    stub.Open(request)
            sizes.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
    (first, threads, files), (last, more_threads, more_files) = sizes
    assert last - first < 4 << 20 and more_threads <= threads and more_files <= files


@pytest.mark.timeout(300)
def test_a_hostile_device_neither_stalls_nor_grows_the_server(tmp_path: Path) -> None:
    """Steps of a well-behaved device, in turn alone and beside one that does all that is forbidden at once.

    How long they take is for `make bench-limits` to say.
    """
    found = bench_limits.beside(tmp_path, rounds=6)
    assert found["steps"] == 2 * 20 + 2 * 6 * 25 and found["reconnects"] == 0
    sizes = found["server_sizes"][1:]
    # What it is sent without end would come to hundreds of MB.
    assert sizes[-1][0] - sizes[0][0] < 32 << 20 and sizes[-1][1] <= Limits().calls + 40, sizes
    assert len(found["hostile"]) == 5 and all(found["hostile"].values()), found["hostile"]
    assert found["log_bytes"] < 100_000, "a flood of refusals is not one of lines"
