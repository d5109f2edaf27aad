"""Limits of a server in a process of its own; and that no device stalls it for others, or makes it grow."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from benchmarks import inprocess, pair
from benchmarks import limits as bench_limits
from benchmarks.recipes import BATCH, CLASSES, PHASE, recipe_text
from common import channel, wire
from common.errors import BusyError, FrameError, StoppedError, TooLargeError
from common.meter import Draft
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from common.rpc_errors import from_rpc
from common.wire import Place
from device_client.data import load
from device_client.remote_tail import RemoteTail
from edge_server.limits import Limits


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that waits to train, and for a silent device no longer than two seconds."""
    path = tmp_path_factory.mktemp("limits")
    (path / "recipe.toml").write_text(recipe_text(schedule="phases = [[0, 1000]]"))
    arguments = (path / "recipe.toml", "--run", path / "run", "--threads", 1, "--idle-time", 2)
    arguments = (*arguments, "--max-sessions-each", 4, "--max-calls", 1e6)
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
    """One with a finished run and eight places for evaluations, two for each caller."""
    log = tmp_path_factory.mktemp("serving") / "log"
    arguments = ("--run", finished / "server", "--threads", 1, "--max-queue", 8, "--max-calls", 1e6)
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
        with Draft(remote.meter) as draft, remote._evaluation(0, pb.TEST, CLASSES, phase, draft) as stream:
            yield stream
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


def test_an_evaluation_of_more_pictures_than_were_told_of(serving: str) -> None:
    def judged(told: int) -> int:
        remote = RemoteTail(serving)
        try:
            phase = remote.open(trains=False).phase
            assert phase
            batch = np.zeros((3, phase.width or 32, 8, 8), np.float32), np.zeros(3, np.int64)
            return remote.evaluate(lambda: [batch, batch], told, pb.TEST, phase, CLASSES).count
        finally:
            remote.close()

    assert judged(6) == 6
    with pytest.raises(FrameError, match="more than the 5 pictures came"):
        judged(5)


def test_a_silent_stream_is_ended_and_its_run_goes_on(server: str) -> None:
    remote = RemoteTail(server, give_up_s=60)
    remote.open(trains=True)
    try:
        remote.begin(1438, CLASSES)
        for step in range(4):
            remote.learn(step, PHASE, *BATCH)
            time.sleep(1)  # a pause that is allowed
        assert remote.faults.reconnects == 0
        with pytest.raises(StoppedError, match="it was silent for longer than --idle-time"):
            remote._stream.receive(Draft(remote.meter))
        remote._lose()
        _, result, _ = remote.learn(4, PHASE, *BATCH)
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


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("grpc.health.v1.Health/Check", "stream_unary"),
        ("deprune.v1.Split/Open", "stream_unary"),
        ("deprune.v1.Split/Head", "stream_stream"),
        ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "stream_stream"),
    ],
)
def test_a_call_whose_message_never_comes_is_counted_and_ended(server: str, method: str, kind: str) -> None:
    """gRPC waits for the one message of a call for ever, in a thread, and would before anybody has counted the caller:
    some connections that say nothing would have all of the server's threads."""
    most, release = Limits(sessions_each=4).calls_each, threading.Event()

    def nothing() -> Iterator[bytes]:
        release.wait(60)
        yield from ()

    with grpc.insecure_channel(server) as link:
        grpc.channel_ready_future(link).result(30)
        call = getattr(link, kind)(f"/{method}")
        begin = call.future if kind == "stream_unary" else call
        calls = [begin(nothing()) for _ in range(2 * most)]
        # Those too many are refused at once, the others are ended when they have said nothing for long.
        assert comes(lambda: all(call.done() for call in calls))
        codes = {call.code().name for call in calls}
        assert "RESOURCE_EXHAUSTED" in codes and "OK" not in codes, codes
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
        with (
            evaluation(serving) as third,
            pytest.raises(BusyError, match="already judging for 2 devices of yours") as refused,
        ):
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
    assert device.returncode == 0 and "classified correctly" in told[-1], told


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
    found = bench_limits.beside(tmp_path, rounds=4)
    assert found["steps"] == 2 * 20 + 2 * 4 * 25 and found["reconnects"] == 0
    sizes = found["server_sizes"][1:]
    # What it is sent without end would come to hundreds of MB.
    assert sizes[-1][0] - sizes[0][0] < 32 << 20 and sizes[-1][1] <= Limits().calls + 40, sizes
    assert len(found["hostile"]) == 5 and all(found["hostile"].values()), found["hostile"]
    assert found["log_bytes"] < 100_000, "a flood of refusals is not one of lines"
