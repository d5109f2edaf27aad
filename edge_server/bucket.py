"""A token bucket: so much a second, and for a moment some more. For callers, and for lines of a log."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable


class Bucket:
    """Holds up to `burst`, filled with `rate` a second; it starts full. Safe to use from several threads."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst = rate, burst
        self._clock, self._lock = clock, threading.Lock()
        self._level, self._filled = burst, clock()

    def take(self, amount: float) -> float:
        """Take `amount`, on credit where there is less: seconds after which the rate has been kept."""
        if math.isinf(self.rate):
            return 0.0
        with self._lock:
            self._fill()
            self._level -= amount
            return max(0.0, -self._level / self.rate)

    def spare(self, amount: float) -> bool:
        """Take `amount` only if it is there; whether it was."""
        if math.isinf(self.rate):
            return True
        with self._lock:
            self._fill()
            if self._level < amount:
                return False
            self._level -= amount
            return True

    @property
    def full(self) -> bool:
        """Whether it is as a new one."""
        with self._lock:
            self._fill()
            return self._level >= self.burst

    def _fill(self) -> None:
        now = self._clock()
        if not math.isinf(self.rate):
            self._level = min(self.burst, self._level + (now - self._filled) * self.rate)
        self._filled = now
