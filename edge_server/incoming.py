"""What a device sends on one stream: frames that are whole, of a session of its own, counted once they are used."""

from __future__ import annotations

import time
from collections.abc import Iterator

from common import wire
from common.errors import FrameError, StoppedError
from common.meter import UP, Draft
from common.rpc import split_pb2 as pb
from edge_server.host import Host, Session

STOPPED = "the server was stopped by its operator; the run is not finished and goes on when the server is back"


class Incoming:
    """The frames that a device sends on one stream; `wait_s` adds up the time spent waiting for them.

    They wait in `draft` until what they belong to is done, and the caller says so.
    """

    def __init__(self, frames: Iterator[pb.Frame], host: Host, peer: str, identity: str) -> None:
        self._frames, self._host = frames, host
        self.wait_s = 0.0
        first = next(frames, None)
        if first is None or not wire.opened(first).HasField("begin"):
            raise FrameError("a stream starts with Begin")
        self.first, self.begin = first, first.begin
        self.session: Session = host.session(self.begin.session, identity)
        self.session.seen(peer)
        self.draft = Draft(self.session.meter)

    def __call__(self) -> pb.Frame:
        started = time.perf_counter()
        frame = next(self._frames, None)
        self.wait_s += time.perf_counter() - started
        if frame is None:
            raise StoppedError("the device closed the stream without a Leave")
        if self._host.stopping and not frame.HasField("leave"):
            raise StoppedError(STOPPED)
        return self.draft.frame(UP, wire.opened(frame))

    def drained(self) -> bool:
        """Wait until the device has closed its side, having read all of ours; whether it has."""
        return next(self._frames, None) is None
