"""Each caller's share of the server: calls and evaluations at once, calls and bytes a second. Knows nothing of gRPC.

A caller is an identity, or the address of the device's end where identities are not asked for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from common.errors import BusyError
from common.wire import FRAME_BYTES
from edge_server.bucket import Bucket
from edge_server.limits import Limits

# So many are remembered before those that do nothing are looked for and forgotten.
_REMEMBERED = 256


class Caller:
    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.calls = 0  # open at the moment
        self.evaluations = 0  # of them, streams that use the finished run
        self.often = Bucket(limits.calls_a_second, limits.calls_in_a_burst, clock)
        # A second's worth, and no less than one whole frame.
        self.bytes = Bucket(limits.rate, max(limits.rate, FRAME_BYTES), clock)

    @property
    def forgettable(self) -> bool:
        return not self.calls and not self.evaluations and self.often.full and self.bytes.full


class Callers:
    """All callers that have something to be remembered for."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._lock = threading.Lock()
        self._known: dict[str, Caller] = {}
        self._evaluations = 0  # of all callers

    def __len__(self) -> int:
        return len(self._known)

    def __getitem__(self, name: str) -> Caller:
        with self._lock:
            return self._get(name)

    def _get(self, name: str) -> Caller:
        if name not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known = {name: caller for name, caller in self._known.items() if not caller.forgettable}
            self._known[name] = Caller(self._limits, self._clock)
        return self._known[name]

    @contextlib.contextmanager
    def call(self, name: str) -> Iterator[Caller]:
        """One RPC of this caller, from its first moment to its last; BusyError where it has too many already."""
        most = self._limits.calls_each
        with self._lock:
            caller = self._get(name)
            if caller.calls >= most:
                raise BusyError(
                    f"this device has {most} calls open on the server, and may have no more; end some of them",
                    self._limits.retry_s,
                )
            caller.calls += 1
        try:
            yield caller
        finally:
            with self._lock:
                caller.calls -= 1

    @contextlib.contextmanager
    def evaluation(self, name: str) -> Iterator[None]:
        """A place among the streams that use the finished run; BusyError where there is none for this caller."""
        limits, again = self._limits, f"try again in {self._limits.retry_s:g} s"
        with self._lock:
            caller = self._get(name)
            if self._evaluations >= limits.queue:
                raise BusyError(
                    f"the server is already judging for {self._evaluations} devices; {again}", limits.retry_s
                )
            if caller.evaluations >= limits.queue_each:
                raise BusyError(
                    f"the server is already judging for {caller.evaluations} devices of yours; {again}", limits.retry_s
                )
            self._evaluations += 1
            caller.evaluations += 1
        try:
            yield
        finally:
            with self._lock:
                self._evaluations -= 1
                caller.evaluations -= 1
