"""One stream to the server, and how long a device tries to get one back: backoff with jitter, and an end to it."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from common import wire
from common.errors import (
    AuthError,
    BusyError,
    DepruneError,
    FaultError,
    FrameError,
    LinkError,
    SessionError,
    StoppedError,
    VersionError,
)
from common.meter import DOWN, Draft
from common.pulse import STALLED_S, Pulse
from common.rpc import split_pb2 as pb
from common.rpc_errors import from_rpc
from common.tcp_info import TcpSocket, find_server
from common.words import duration, gives_up, several

# What a new connection may cure: a lost link, a server that is being replaced or is still busy with the old stream,
# certificates that are being exchanged, a fault of the server's own, and bytes that were damaged on the way, which may
# look like any wrong frame and even like another service.
CURABLE = (LinkError, AuthError, StoppedError, BusyError, SessionError, FaultError, FrameError, VersionError)
# A server that answers, and refuses the same thing so often in a row, will not change its mind.
_REFUSALS = 6
_FIRST_S, _MOST_S, _DOUBLED = 0.2, 15.0, 7  # the first pause, the longest, and how often it doubles
# How often the patience begins anew because some of an answer came before the link broke again.
_RENEWED = 10
_LOOK_S = 1.0  # between two looks at the connection


@dataclass
class Came:
    """How many frames have come on a stream.

    An object of its own, so that whoever looks at it later does not keep the stream, and all that hangs on it, alive.
    """

    frames: int = 0


class Stream:
    """One stream of frames, of both ways or down alone; `wait_s` adds up the time spent waiting for the server."""

    def __init__(
        self, call: Callable[[Iterator[pb.Frame]], Any], server: str, stalled_s: float = STALLED_S, *, watched: bool
    ) -> None:
        """`watched`, where there is a link: broken off when it is dead, or has nothing to show for `stalled_s`."""
        self._server, self._stalled_s = server, stalled_s
        self._outgoing: queue.SimpleQueue[pb.Frame | None] = queue.SimpleQueue()
        self._incoming = call(iter(self._outgoing.get, None))
        self.wait_s = 0.0
        self.came = Came()
        self._due: float | None = None  # since when the server is waited for
        self._lost = ""  # why we broke it off ourselves
        if watched:
            threading.Thread(target=self._watch, name="pulse", daemon=True).start()

    def send(self, frame: pb.Frame) -> None:
        self._outgoing.put(frame)

    def receive(self, draft: Draft) -> pb.Frame:
        """The next frame, whole; counted in `draft`."""
        started = time.perf_counter()
        self._due = time.monotonic()
        try:
            frame = next(self._incoming)
        except StopIteration as error:
            raise LinkError(f"the server at {self._server} closed the stream early") from error
        except grpc.RpcError as error:
            # gRPC raises the call itself, which would then hold its own traceback, and through that all that functions
            # up to the trainer hold (a batch, its graph), until Python's next full collection: hours, in a long run.
            error.with_traceback(None)
            raise LinkError(self._lost) if self._lost else from_rpc(error, self._server) from error
        finally:
            self._due = None
            self.wait_s += time.perf_counter() - started
        whole = wire.unsealed(draft.frame(DOWN, frame))
        self.came.frames += 1
        return whole

    def _watch(self) -> None:
        """Look at the connection until the stream has ended, and end it where it gets nowhere; a thread of its own."""
        ended = threading.Event()
        if not self._incoming.add_callback(ended.set):
            return
        link: tuple[TcpSocket, Pulse] | None = None
        try:
            while not ended.wait(_LOOK_S):
                now = time.monotonic()
                if link is None:
                    if found := find_server(self._server):
                        link = found, Pulse(now, stalled_s=self._stalled_s)
                elif wrong := link[1].look(now, link[0].moved(), self._due):
                    self._lost = wrong
                    self._incoming.cancel()
                    return
        finally:
            if link:
                link[0].close()

    def close(self) -> None:
        """End our side; the server has said its last."""
        self._outgoing.put(None)

    def drain(self, timeout_s: float) -> None:
        """Wait until the server has ended its side, for then it has read all of ours; not longer than `timeout_s`."""
        ended = threading.Event()
        if self._incoming.add_callback(ended.set):
            ended.wait(timeout_s)


@dataclass
class Backoff:
    """The failed attempts at one thing. They are given up after `give_up_s` seconds in which nothing has moved."""

    give_up_s: float

    def __post_init__(self) -> None:
        self._since = time.monotonic()
        self._attempts = self._refusals = self._renewed = 0
        self._told = ""

    def wait(self, error: DepruneError, say: Callable[[str], None], moved: bool = False) -> None:
        """Sleep before the next attempt, longer each time; raise where there is to be none.

        `error`: what the last one ended with. `moved`: some of the answer came in it before the link broke again.
        """
        if moved and self._renewed < _RENEWED:
            self._since, self._attempts = time.monotonic(), 0
            self._renewed += 1
        self._attempts += 1
        # Only an answer can be a refusal; that there is none, or no room, is a matter of time alone.
        unanswered = isinstance(error, LinkError | AuthError | StoppedError | BusyError)
        self._refusals = 0 if unanswered else self._refusals + 1
        spent = time.monotonic() - self._since
        if self._refusals >= _REFUSALS:
            raise error
        if spent >= self.give_up_s:
            raise LinkError(
                f"{error}; gave up after {duration(spent)} and {several(self._attempts, 'attempt')}"
            ) from error
        # Jitter, so that devices which lost their server together do not come back together.
        pause = min(_MOST_S, _FIRST_S * 2 ** min(self._attempts - 1, _DOUBLED)) * random.uniform(0.5, 1.5)
        if isinstance(error, BusyError) and error.retry_after_s:
            pause = max(pause, error.retry_after_s)
        # The whole error is told once; where it is the same again, without the advice behind its semicolon.
        reason = str(error).partition(";")[0] if str(error) == self._told else str(error)
        self._told = str(error)
        say(f"reconnecting, attempt {self._attempts} ({reason}); {gives_up(self.give_up_s - spent)}")
        time.sleep(min(pause, max(0.0, self.give_up_s - spent)))
