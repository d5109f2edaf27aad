"""Finds streams that wait for a device which says and reads nothing, or is behind a dead link, and ends them.

Every stream of the servicer's is a Watched; the server's main loop calls `tend` a few times a second.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

from common.pulse import Pulse
from common.rpc import split_pb2 as pb
from common.tcp_info import TcpSocket, find_peer
from common.words import duration
from edge_server.limits import Limits

_LOOK_S = 1.0  # between two looks at a link


class _Session(Protocol):
    touched: float


class Watched:
    """One stream, with the gRPC `context` that can end it. `waits` is None while the server itself is at work on it."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.session: _Session | None = None  # once the device has said which
        self.waits: float | None = None  # since when for the device, on the clock of time.monotonic()
        self.ended = False  # by us: what is computed for it may go on for a while

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For the device to send something, or to take what is sent."""
        self.waits = time.monotonic()
        try:
            yield
        finally:
            self.waits = None
            if self.session:
                self.session.touched = time.monotonic()

    def sending(self, frames: Generator[pb.Frame, None, None]) -> Iterator[pb.Frame]:
        """The frames, to be handed to gRPC, which asks for the next when it has room for it."""
        with contextlib.closing(frames):
            for frame in frames:
                with self.waiting():
                    yield frame


class Watch:
    """All streams that are open."""

    def __init__(self, limits: Limits, say: Callable[[str], None]) -> None:
        self._limits, self._say = limits, say
        self._lock = threading.Lock()
        self._streams: set[Watched] = set()
        self._links: dict[Watched, tuple[TcpSocket, Pulse]] = {}  # of those that have begun; the main loop's alone
        self._looked = 0.0

    @contextlib.contextmanager
    def over(self, context: Any) -> Iterator[Watched]:
        stream = Watched(context)
        with self._lock:
            self._streams.add(stream)
        try:
            yield stream
        finally:
            with self._lock:
                self._streams.discard(stream)

    @property
    def at_work(self) -> bool:
        """Whether the server itself is at work on a stream."""
        with self._lock:
            return any(stream.session and stream.waits is None for stream in self._streams)

    def tend(self, now: float) -> None:
        """End the streams whose device has been silent for too long.

        A device is heard on all streams of its session: one that has pictures judged says nothing of training.
        """
        with self._lock:
            streams = list(self._streams)
        busy = {id(stream.session) for stream in streams if stream.session and stream.waits is None}
        for stream in streams:
            since, session = stream.waits, stream.session
            if since is None or id(session) in busy:
                continue
            allowed = self._limits.idle_s if session else min(self._limits.first_frame_s, self._limits.idle_s)
            if now - max(since, session.touched if session else 0.0) > allowed:
                peer = stream.context.peer()
                self._end(
                    stream,
                    f"nothing was heard for {duration(allowed)} from the device at {peer}; its stream is ended, and a "
                    f"run that it trains can be gone on with",
                )
        if now - self._looked >= _LOOK_S:
            self._looked = now
            self._feel(now, {stream for stream in streams if stream.session})

    def _end(self, stream: Watched, why: str) -> None:
        if not stream.ended:
            stream.ended = True
            self._say(why)
            stream.context.cancel()

    def _feel(self, now: float, streams: set[Watched]) -> None:
        """End the streams of dead links."""
        for stream in self._links.keys() - streams:
            self._links.pop(stream)[0].close()
        for stream in streams:
            if stream in self._links:
                connection, pulse = self._links[stream]
                if wrong := pulse.look(now, connection.moved()):
                    self._end(stream, f"{wrong}; the stream of the device at {stream.context.peer()} is ended")
            elif found := find_peer(stream.context.peer()):
                self._links[stream] = found, Pulse(now)
