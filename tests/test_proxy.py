"""The fault injector itself: each fault does what it says, at the byte that it was told.

Where in the protocol faults come is in test_points.py, what the two processes make of them in test_resume_faults.py.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from benchmarks.faults import proxy
from benchmarks.faults.proxy import Fault, Proxy

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
