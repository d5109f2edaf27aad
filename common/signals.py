"""The signals that ask a process to stop, on both sides: heard by one handler, unless they are ignored."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

_GONE = signal.SIGHUP  # a terminal was closed or its connection lost
_STOPPING = (signal.SIGINT, signal.SIGTERM, _GONE)
# Within this time of one that was heard, another is the same: `timeout`, a shell or a service sends it to the process
# and to all of its group. A person who is impatient takes longer.
_SAME_S = 0.25


def hear(handler: Callable[[int, FrameType | None], None]) -> Mapping[int, Any]:
    """Have `handler` called with the number of each; those heard, and what they did before.

    One that is ignored, as Ctrl-C is in a script's background and the terminal's end under nohup, stays so. The end of
    a terminal is told by its kernel and by its shell: as no more than the first signal, for nobody is impatient.
    """
    heard = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    last: float | None = None

    def once(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if last is not None and (number == _GONE or now - last < _SAME_S):
            return
        last = now
        handler(number, frame)

    return {number: signal.signal(number, once) for number in heard}


def ignore() -> None:
    """Have none of them end the process: it is ending, and whoever asks for that once more changes nothing."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
