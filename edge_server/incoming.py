"""What a device sends on one stream: frames that are whole, of a session of its own, counted once they are used."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from common import wire
from common.errors import FrameError, StoppedError
from common.meter import UP, Draft
from common.rpc import split_pb2 as pb
from edge_server.callers import Caller
from edge_server.host import Host
from edge_server.sessions import Session
from edge_server.watch import Watched

# While a device that sends too fast is held up, it is looked so often whether the stream has ended.
_NAP_S = 0.25

LOST = "the connection to the device was lost; what it trains waits for it to come back"
LEFT = "a device that used the finished run ended its connection before it was done"
STOPPED = "the server was stopped by its operator; the run is not finished and goes on when the server is back"


class Incoming:
    """The frames that a device sends on one stream; `wait_s` adds up the time spent waiting for them.

    They are counted in `draft`, which the caller keeps once what they belong to is done.
    """

    def __init__(self, frames: Iterator[pb.Frame], host: Host, stream: Watched, identity: str, caller: Caller) -> None:
        self._frames, self._host, self._stream, self._caller = frames, host, stream, caller
        self.wait_s = 0.0
        first = self._next()
        if first is None or not wire.unsealed(first).HasField("begin"):
            raise FrameError("a stream starts with Begin")
        self.first, self.begin = first, first.begin
        self.session: Session = host.sessions.get(self.begin.session, identity)
        stream.session = self.session
        self.session.seen(stream.context.peer())
        self.draft = Draft(self.session.meter)

    def __call__(self) -> pb.Frame:
        started = time.perf_counter()
        frame = self._next()
        if frame is not None:
            hold_up(self._caller.bytes.take(frame.ByteSize()), self._stream.context, self._host)
        self.wait_s += time.perf_counter() - started
        if frame is None:
            raise StoppedError(LOST if self.session.trains else LEFT)
        if self._host.stopping and not frame.HasField("leave"):
            raise StoppedError(STOPPED)
        return self.draft.frame(UP, wire.unsealed(frame))

    def _next(self) -> pb.Frame | None:
        with self._stream.waiting():
            return next(self._frames, None)

    def drained(self) -> bool:
        """Wait until the device closes its side, having read all of ours; False where it sends more instead."""
        return self._next() is None


def hold_up(seconds: float, context: Any, host: Host) -> None:
    """Wait on behalf of a caller that is over its rate; gRPC's flow control then keeps what it sends on its side."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and context.is_active() and not host.stopping:
        time.sleep(min(left, _NAP_S))
