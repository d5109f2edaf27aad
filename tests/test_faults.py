"""The fault injector itself: each fault does what it says, at the byte that it was told, and a run is judged rightly.

What the two processes make of faults is in test_resume_faults.py.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.counters import certificate
from benchmarks.faults import compare, points, proxy
from benchmarks.faults.proxy import Fault, Proxy
from common import channel
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc

TEXT = b"0123456789" * 10


class Echo:
    """A server that sends back what it gets, and keeps it by connection; `ends` says how each connection ended."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.heard: list[bytearray] = []
        self.ends: list[str] = []
        self.changed = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                end, _ = self._listener.accept()
                with self.changed:
                    self.heard.append(bytearray())
                    self.ends.append("")
                    number = len(self.heard) - 1
                threading.Thread(target=self._serve, args=(end, number), daemon=True).start()

    def _serve(self, end: socket.socket, number: int) -> None:
        how = "end"
        with end:
            try:
                while data := end.recv(4096):
                    with self.changed:
                        self.heard[number] += data
                        self.changed.notify_all()
                    end.sendall(data)
            except ConnectionResetError:
                how = "reset"
        with self.changed:
            self.ends[number] = how
            self.changed.notify_all()

    def wait(self, condition: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 20), (self.heard, self.ends)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def between(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.address) as middle:
        yield middle


def dial(middle: Proxy) -> socket.socket:
    host, _, port = middle.address.rpartition(":")
    end = socket.create_connection((host, int(port)), timeout=20)
    end.sendall(b"hello")
    assert receive(end, 5) == b"hello"
    return end


def receive(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = end.recv(count - len(data))
        assert more, f"the end came after {data!r}"
        data += more
    return data


def heard_up(chunk: proxy.Chunk) -> proxy.Span | None:
    return proxy.Span(0, len(chunk.data)) if chunk.way == "up" else None


def test_without_a_fault_all_passes_and_ends_are_handed_on(echo: Echo, between: Proxy) -> None:
    data = np.random.default_rng(0).bytes(3_000_000)
    with dial(between) as end:
        sender = threading.Thread(target=end.sendall, args=(data,))
        sender.start()
        assert receive(end, len(data)) == data
        sender.join()
        end.shutdown(socket.SHUT_WR)
        assert end.recv(1) == b""
    echo.wait(lambda: echo.ends == ["end"])
    assert bytes(echo.heard[0]) == b"hello" + data


def test_cut_resets_both_ends(echo: Echo, between: Proxy) -> None:
    with dial(between) as end:
        fault = between.arm(Fault(proxy.CUT, heard_up))
        end.sendall(TEXT)
        with pytest.raises(ConnectionResetError):
            end.recv(1)
        echo.wait(lambda: echo.ends == ["reset"])
    assert fault.fired.wait(20) and echo.heard == [b"hello"]
    with dial(between):  # it happens once
        assert between.connections == 2


@pytest.mark.parametrize(("kind", "part", "passed"), [(proxy.CLOSE, 1.0, 100), (proxy.TRUNCATE, 0.25, 25)])
def test_an_orderly_end_comes_after_the_part_that_passes(
    echo: Echo, between: Proxy, kind: str, part: float, passed: int
) -> None:
    with dial(between) as end:
        between.arm(Fault(kind, heard_up, part))
        end.sendall(TEXT)
        echo.wait(lambda: echo.ends == ["end"])
        assert bytes(echo.heard[0]) == b"hello" + TEXT[:passed]
        assert end.recv(4096) == b""


def test_nobody_hears_of_a_black_hole(echo: Echo, between: Proxy) -> None:
    end = dial(between)
    fault = between.arm(Fault(proxy.HOLE, heard_up))
    end.sendall(TEXT)
    assert fault.fired.wait(20)
    end.sendall(TEXT)
    end.close()
    with dial(between):  # other connections pass, and so this one's bytes have had their time too
        assert echo.ends == ["", ""] and echo.heard == [b"hello", b"hello"]


def test_a_dark_path_swallows_new_connections_too_and_ends_in_resets(echo: Echo, between: Proxy) -> None:
    with dial(between) as end:
        between.arm(Fault(proxy.HOLE, heard_up, seconds=2.0))
        end.sendall(TEXT)
        host, _, port = between.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as other, pytest.raises(ConnectionResetError):
            other.sendall(b"anyone?")
            other.recv(1)
        with pytest.raises(ConnectionResetError):
            end.recv(1)
        echo.wait(lambda: echo.ends == ["reset"])
    assert echo.heard == [b"hello"]
    dial(between).close()  # light again


def test_delay_holds_the_rest_back(echo: Echo, between: Proxy) -> None:
    with dial(between) as end:
        between.arm(Fault(proxy.DELAY, heard_up, 0.5, seconds=0.3))
        sent = time.monotonic()
        end.sendall(TEXT)
        assert receive(end, 100) == TEXT
        assert time.monotonic() - sent >= 0.3


def test_duplicate_says_it_all_again_on_a_second_connection(echo: Echo, between: Proxy) -> None:
    with dial(between) as end:
        between.arm(Fault(proxy.DUPLICATE, heard_up, 1.0))
        end.sendall(TEXT)
        assert receive(end, 100) == TEXT  # the first goes on
        echo.wait(lambda: len(echo.heard) == 2 and echo.heard[0] == echo.heard[1] == b"hello" + TEXT)
        # Placed where bytes come down, it repeats all that went up.
        between.arm(Fault(proxy.DUPLICATE, lambda chunk: proxy.Span(0, 0) if chunk.way == "down" else None))
        end.sendall(b"x")
        echo.wait(lambda: len(echo.heard) == 3 and echo.heard[2] == b"hello" + TEXT + b"x")


def test_flip_changes_one_bit(echo: Echo, between: Proxy) -> None:
    with dial(between) as end:
        between.arm(Fault(proxy.FLIP, lambda chunk: proxy.Span(10, 20) if chunk.way == "up" else None, bit=0.999))
        end.sendall(TEXT)
        echo.wait(lambda: len(echo.heard[0]) == 105)
    came = bytes(echo.heard[0])[5:]
    assert [index for index in range(100) if came[index] != TEXT[index]] == [19]
    assert bin(came[19] ^ TEXT[19]).count("1") == 1


@pytest.mark.parametrize("lossy", [False, True])
def test_call_acts_between_two_bytes(echo: Echo, between: Proxy, lossy: bool) -> None:
    called = threading.Event()
    with dial(between) as end:
        between.arm(Fault(proxy.CALL, heard_up, 0.5, act=called.set, lossy=lossy))
        end.sendall(TEXT)
        assert called.wait(20)
        if lossy:
            echo.wait(lambda: echo.ends == ["reset"])
        else:
            assert receive(end, 100) == TEXT


def test_without_a_server_connections_are_reset(between: Proxy) -> None:
    between.target = ""
    host, _, port = between.address.rpartition(":")
    with pytest.raises(ConnectionResetError), socket.create_connection((host, int(port)), timeout=20) as end:
        end.recv(1)


# Where in the protocol: real gRPC, our frames, a server that only answers


class Answering(split_pb2_grpc.SplitServicer):
    """Answers each activation with a gradient and a StepDone; step 2 brings the next phase."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def Open(self, request: pb.OpenRequest, context: Any) -> pb.OpenReply:
        return pb.OpenReply(protocol_version=4, session="a" * 32, digest="0" * 64)

    def Train(self, frames: Iterator[pb.Frame], context: Any) -> Iterator[pb.Frame]:
        for frame in frames:
            self.seen.append(frame.step)
            tensor = pb.Tensor(shape=[4], payload=50_000)
            part = pb.Part(tensor=tensor, data=b"\1" * 50_000)
            yield pb.Frame(role=pb.GRADIENT, step=frame.step, part=part)
            done = pb.StepDone(loss=1.0, next=pb.Phase(index=1) if frame.step == 2 else None)
            yield pb.Frame(role=pb.CONTROL, step=frame.step, done=done)


@pytest.fixture
def answering(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Answering, Proxy, Any]]:
    servicer = Answering()
    server = grpc.server(ThreadPoolExecutor(4))
    split_pb2_grpc.add_SplitServicer_to_server(servicer, server)
    tls = certificate(tmp_path, "127.0.0.1") if getattr(request, "param", False) else None
    if tls:
        port = server.add_secure_port("127.0.0.1:0", channel.server_credentials(channel.ServerTls(*tls), print))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with (
        Proxy(f"127.0.0.1:{port}") as middle,
        channel.connect(middle.address, channel.Access(tls[0] if tls else None)) as link,
    ):
        yield servicer, middle, split_pb2_grpc.SplitStub(link)
    server.stop(0)


def activation(step: int) -> pb.Frame:
    data = bytes([step]) * 40_000
    return pb.Frame(role=pb.ACTIVATION, step=step, part=pb.Part(tensor=pb.Tensor(shape=[4]), data=data))


def exchange(stub: Any, steps: range) -> list[str]:
    """What came back before the stream broke, if it did: "gradient 0", "done 0" and so on."""
    came = []
    answers = stub.Train(activation(step) for step in steps)
    with contextlib.suppress(grpc.RpcError):
        came += [f"{'done' if frame.HasField('done') else 'gradient'} {frame.step}" for frame in answers]
    return came


def answers_up_to(stub: Any, steps: range) -> list[str]:
    """The same, but each step is sent only when the one before was answered, as a device does."""
    came: list[str] = []
    go = threading.Semaphore(1)

    def outgoing() -> Iterator[pb.Frame]:
        for step in steps:
            go.acquire()
            yield activation(step)

    with contextlib.suppress(grpc.RpcError):
        for frame in stub.Train(outgoing()):
            came.append(f"{'done' if frame.HasField('done') else 'gradient'} {frame.step}")
            if frame.HasField("done"):
                go.release()
    go.release()
    return came


ALL = [f"{what} {step}" for step in range(4) for what in ("gradient", "done")]


def test_the_tap_counts_steps_and_replays(answering: tuple[Answering, Proxy, Any]) -> None:
    _, middle, stub = answering
    assert answers_up_to(stub, range(4)) == ALL
    assert (middle.step, middle.replayed) == (3, 0)
    assert len(exchange(stub, range(2, 5))) == 6
    assert (middle.step, middle.replayed) == (4, 2)


@pytest.mark.parametrize(
    ("point", "seen", "came"),
    [
        (points.FORWARD, [0, 1, 2], ALL[:4]),
        (points.BACKWARD, [0, 1, 2], ALL[:4]),
        (points.REPLY, [0, 1, 2], ALL[:5]),  # the gradient came, StepDone did not
        (points.SWITCH, [0, 1, 2], ALL[:5]),
    ],
)
def test_a_fault_is_at_its_point(
    answering: tuple[Answering, Proxy, Any], point: str, seen: list[int], came: list[str]
) -> None:
    servicer, middle, stub = answering
    fault = middle.arm(Fault(proxy.CLOSE, points.moment(point, 1), points.part_of(point)))
    assert answers_up_to(stub, range(4)) == came
    assert fault.fired.wait(20)
    # A server that hears of the end together with the message may take in both or only the end.
    assert servicer.seen == seen or (point == points.FORWARD and servicer.seen == seen[:-1])


def test_the_handshake_is_known_by_its_place(answering: tuple[Answering, Proxy, Any]) -> None:
    _, middle, stub = answering
    middle.arm(Fault(proxy.CUT, points.moment(points.HANDSHAKE)))
    with pytest.raises(grpc.RpcError):
        stub.Open(pb.OpenRequest(protocol_version=4, purpose=pb.TRAIN), timeout=20)
    # gRPC may hand the next call to the connection that is gone before it has noticed.
    for _ in range(5):
        with contextlib.suppress(grpc.RpcError):
            reply = stub.Open(pb.OpenRequest(protocol_version=4), timeout=20, wait_for_ready=True)
            break
    assert reply.session == "a" * 32


@pytest.mark.parametrize("answering", [True], indirect=True)
def test_under_tls_only_amounts_are_known(answering: tuple[Answering, Proxy, Any]) -> None:
    servicer, middle, stub = answering
    assert answers_up_to(stub, range(2)) == ALL[:4]
    assert middle.step == -1
    middle.arm(Fault(proxy.FLIP, points.bulk("up", 10_000)))
    assert answers_up_to(stub, range(2, 4)) == []  # a damaged record is never handed on
    assert servicer.seen == [0, 1]


# The judgement


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
