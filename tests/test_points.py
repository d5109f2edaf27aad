"""Where in the protocol a fault comes: real gRPC and our frames, past the proxy to a server that only answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from benchmarks.faults import points, proxy
from benchmarks.faults.proxy import Fault, Proxy
from common import channel
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from common.tls import Access, ServerTls, server_credentials
from edge_server import certs


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
    access = Access()
    if getattr(request, "param", False):
        certs.make(tmp_path, ["127.0.0.1"], [], renew=False)
        access = Access(tmp_path / "ca.pem")
        tls = ServerTls(tmp_path / "server.pem", tmp_path / "server.key")
        port = server.add_secure_port("127.0.0.1:0", server_credentials(tls, print))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with Proxy(f"127.0.0.1:{port}") as middle, channel.connect(middle.address, access) as link:
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
    deadline, session = time.monotonic() + 20, ""
    while not session and time.monotonic() < deadline:
        with contextlib.suppress(grpc.RpcError):
            session = stub.Open(pb.OpenRequest(protocol_version=4), timeout=20, wait_for_ready=True).session
    assert session == "a" * 32


@pytest.mark.parametrize("answering", [True], indirect=True)
def test_under_tls_only_amounts_are_known(answering: tuple[Answering, Proxy, Any]) -> None:
    servicer, middle, stub = answering
    assert answers_up_to(stub, range(2)) == ALL[:4]
    assert middle.step == -1
    middle.arm(Fault(proxy.FLIP, points.bulk("up", 10_000)))
    assert answers_up_to(stub, range(2, 4)) == []  # a damaged record is never handed on
    assert servicer.seen == [0, 1]
