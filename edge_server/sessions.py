"""The sessions that are open: each one device's visit, and the room that there is for them.

Called by edge_server/host.py; every stream asks for its session here.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from common.errors import BusyError, SessionError
from common.meter import DOWN, UP, Meter
from common.rpc import split_pb2 as pb
from common.tcp_info import Kernel, find_peer
from common.words import several
from edge_server.limits import Limits
from edge_server.live import LiveRun

# Between the handshake and the first stream a device reads its data; it keeps its place so long at least.
_GRACE_S = 60.0


@dataclass
class Session:
    """One device's visit: its books, its connections, and the run where it trains one."""

    name: str
    trains: bool
    identity: str = ""  # of the caller who opened it, and who alone may use it
    caller: str = ""  # whose share of the server it takes: the identity, or an address where none is asked for
    meter: Meter = field(default_factory=Meter)
    kernel: Kernel = field(default_factory=Kernel)
    peer: str = ""  # gRPC's name of the device's end of the connection
    run: LiveRun | None = None  # which it has begun, or comes back to
    run_id: str = ""  # the run's id when this session got it; at step 0 another device may begin it anew, with a new id
    back_to: int | None = None  # the step that the handshake told it to go on from; None once it has, or has none
    streams: int = 0  # open at the moment
    begun: bool = False  # it has had a stream, of any kind
    head_sent: bool = False
    joined: bool = False  # it has had a stream that trains the run: another one is a reconnect
    touched: float = field(default_factory=time.monotonic)

    def seen(self, peer: str) -> None:
        """The device calls from `peer`: a connection that is new is counted too, where it trains."""
        if self.trains and peer != self.peer:
            self.peer = peer
            self.kernel.add(find_peer(peer))

    @contextmanager
    def streaming(self) -> Iterator[None]:
        self.streams += 1
        self.begun = True
        try:
            yield
        finally:
            self.streams -= 1

    def book_head(self, frames: Iterable[pb.Frame]) -> None:
        """Count the head's first weights and the request for them: as sent again where they were sent before."""
        self.meter.control(UP, pb.HeadRequest(session=self.name), self.head_sent)
        for frame in frames:
            self.meter.frame(DOWN, frame, again=self.head_sent)
        self.head_sent = True

    def take_up(self, run: LiveRun) -> None:
        """Go on with a run: its books are this visit's."""
        self.run, self.run_id, self.meter, self.kernel = run, run.run_id, run.meter, run.kernel


class Sessions:
    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._open: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def add(self, session: Session) -> None:
        """Give a new one its place; BusyError where there is none."""
        with self._lock:
            self._make_room(session.caller)
            self._open[session.name] = session

    def get(self, name: str, identity: str) -> Session:
        """The session that `identity` opened. Another's is not known either: nothing tells that there is one."""
        with self._lock:
            session = self._open.get(name)
        if session is None or session.identity != identity:
            raise SessionError(
                "this session is not known here: the server was started anew, or it was idle too long; a device opens "
                "another by itself"
            )
        session.touched = time.monotonic()
        return session

    def tend(self, now: float) -> None:
        """Forget those that were left behind."""
        with self._lock:
            self._forget_idle(now)

    def leave(self, session: Session) -> None:
        """Forget a session that its device needs no more, unless another stream of it is open."""
        with self._lock:
            if not session.streams:
                self._forget(session)

    def close(self) -> None:
        with self._lock:
            for session in list(self._open.values()):
                self._forget(session)

    def _make_room(self, caller: str) -> None:
        """A place for one more session of `caller`'s, another's if need be; BusyError where there is none.

        A place is only taken from sessions without an open stream: from one that is idle, or from one of the caller who
        has the most, so that nobody keeps others out by opening many.
        """
        now, limits = time.monotonic(), self._limits
        self._forget_idle(now)
        held = Counter(session.caller for session in self._open.values())
        own = [session for session in self._open.values() if session.caller == caller]
        if len(own) >= limits.sessions_each:
            if not self._give_way(own, now - _GRACE_S):
                raise BusyError(
                    f"this device already has {several(limits.sessions_each, 'session')} here; try again in a minute",
                    limits.retry_s,
                )
        elif len(self._open) >= limits.sessions and not self._give_way(self._open.values(), now - _GRACE_S):
            greedy, most = held.most_common(1)[0]
            theirs = [session for session in self._open.values() if session.caller == greedy]
            if most <= held[caller] + 1 or not self._give_way(theirs, now):
                raise BusyError(
                    f"the server already has {several(limits.sessions, 'session')}; try again in a minute",
                    limits.retry_s,
                )

    def _forget_idle(self, now: float) -> None:
        for session in [s for s in self._open.values() if not s.streams and now - s.touched > self._limits.idle_s]:
            self._forget(session)

    def _give_way(self, sessions: Iterable[Session], before: float) -> bool:
        """Forget one of `sessions` that was not heard since `before`; first those that never had a stream, then the
        oldest. Whether there was any."""
        idle = [session for session in sessions if not session.streams and session.touched <= before]
        if idle:
            self._forget(min(idle, key=lambda session: (session.begun, session.touched)))
        return bool(idle)

    def _forget(self, session: Session) -> None:
        if self._open.pop(session.name, None) is not None and not session.run:
            session.kernel.close()  # a run's own outlives its sessions
