"""The byte counters, proven from outside: against an interface that counts, and a proxy that counts and cuts."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from benchmarks import counters, pair
from benchmarks.recipes import recipe_text
from common import tcp_info
from common.meter import DOWN, UP, Draft, Meter
from common.rpc import split_pb2 as pb
from common.tcp_info import Kernel, find, find_server
from device_client.remote_tail import RemoteTail
from tests.conftest import needs_link


@needs_link
def test_kernel_bytes_explain_the_interface(tmp_path: Path) -> None:
    """A few hundred steps across a veth pair: what the interface counted is kernel bytes and headers, to 1 %."""
    for way, counts in counters.measure(tmp_path, "step:15", 5, tls=True).items():
        assert counts["steps"] == 220
        assert counts["payload"] < counts["message"] < counts["kernel"] < counts["interface"], way
        assert abs(counters.unexplained(counts)) < 0.01 * counts["interface"], (way, counts)
        # Protobuf, HTTP/2 and TLS cost little: a payload travels whole, and compression stays ours.
        assert counts["kernel"] < 1.03 * counts["payload"]


@needs_link
def test_what_is_sent_again_is_counted_and_shown(tmp_path: Path) -> None:
    """A narrow link with a queue of a few packets drops some of them."""
    ways = counters.measure(tmp_path, "fp32", 0.3, rate="40mbit", limit="20kb")
    assert ways["up"]["retransmitted"] > 1000
    assert ways["up"]["kernel"] - ways["up"]["retransmitted"] > ways["up"]["message"]
    assert "of it retransmitted by TCP" in (tmp_path / "output").read_text()


class Proxy:
    """Hands bytes on between a device and a server, counts them, and cuts the connection when told."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.up = self.down = self.connections = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                device, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self.connections += 1
            self._open += [device, server]
            for name, source, sink in (("up", device, server), ("down", server, device)):
                threading.Thread(target=self._hand_on, args=(name, source, sink), daemon=True).start()

    def _hand_on(self, way: str, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def cut(self) -> None:
        for end in self._open:
            with_linger = b"\1\0\0\0\0\0\0\0"
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, with_linger)
            end.close()
        self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    (tmp_path / "recipe.toml").write_text(recipe_text())
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "run", "--threads", 1)
    with pair.server(*arguments, log=tmp_path / "log") as (_, address):
        made = Proxy(address)
        yield made
        made.close()


def test_a_reconnect_adds_up(proxy: Proxy) -> None:
    """The link is lost between two calls of one session; the device makes a new one, and both are in the books."""
    remote = RemoteTail(proxy.address)
    remote.open(trains=True)
    before = remote.kernel.read()
    assert before and before.sent > 0
    proxy.cut()
    assert len(remote.head_weights()) == remote.opened.head_size
    remote.begin(1438, tuple("0123456789"))
    # TLS is off and loopback loses nothing: the kernel's books are the proxy's, but for what is on its way.
    for _ in range(50):
        seen = remote.kernel.read()
        assert proxy.connections == 2 and seen
        off = max(abs(seen.sent - proxy.up), abs(seen.received - proxy.down))
        if off < 200:
            break
        time.sleep(0.1)
    assert seen.sent > before.sent and seen.received > before.received and off < 200
    remote.close()


def test_what_a_fault_cost_stands_apart_also_in_a_new_process() -> None:
    """Whatever was counted since the checkpoint, and by a process before: the books are those of a run without it."""

    def frame() -> pb.Frame:
        return pb.Frame(role=pb.CONTROL, step=5, phase=1)

    size, meter = frame().ByteSize(), Meter()
    meter.frame(UP, frame())
    meter.frame(UP, frame(), again=True)
    state = meter.state()
    meter.lap()
    meter.frame(UP, frame())
    meter.restore(state)
    assert meter.total(UP).message == size and meter.report(0, 0)["up"]["again"] == 2 * size
    meter.frame(UP, frame())
    assert meter.lap()["up"] == size, "a step's bytes are counted from where the run stands now"
    new = Meter()
    new.restore(state, {"up": 1000, "down": 7})
    assert new.report(0, 0)["up"]["again"] == size + 1000 and new.report(0, 0)["down"]["again"] == 7
    new.frame(UP, frame())
    assert new.lap()["up"] == size
    draft = Draft(new)
    draft.frame(DOWN, frame())
    draft.drop()
    assert new.report(0, 0)["down"]["again"] == 7 + size and not new.total(DOWN).message


@pytest.mark.parametrize("wrong", [OSError(errno.EMFILE, "Too many open files"), psutil.NoSuchProcess(1)])
def test_where_connections_cannot_be_looked_at_bytes_are_not_known(
    wrong: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose descriptors have run out must live on; one without /proc must not count zero bytes."""
    monkeypatch.setattr(psutil.Process, "net_connections", Mock(side_effect=wrong))
    kernel = Kernel()
    kernel.add(find_server("127.0.0.1:9"))
    assert kernel.read() is None


def test_a_kernel_that_tells_less_is_not_taken_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            assert (found := find_server(f"127.0.0.1:{port}"))
            found.close()
            monkeypatch.setattr(tcp_info.TcpSocket, "_info", lambda self: bytes(tcp_info._SIZE))
            assert find_server(f"127.0.0.1:{port}") is None


def test_connections_that_ended_are_settled_and_let_go() -> None:
    kernel = Kernel()
    assert kernel.read() is None and kernel.flow() is None
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    for count in range(1, 4):
        with socket.create_connection(("127.0.0.1", port)) as near, listener.accept()[0] as far:
            kernel.add(find(port))
            kernel.add(find(port))  # the same again is counted once
            near.sendall(bytes(1000))
            assert far.recv(1000, socket.MSG_WAITALL)
            far.sendall(bytes(10))
            assert near.recv(10, socket.MSG_WAITALL)
            near.shutdown(socket.SHUT_RDWR)
        seen = kernel.read()
        assert seen and seen.sent == 1000 * count
        assert 10 * count <= seen.received <= 11 * count  # TCP counts the end of a connection as one byte
        assert len(kernel._connections) == 1
    kernel.close()
    seen = kernel.read()
    assert seen and seen.sent == 3000
    listener.close()
