"""The signals that ask a process to stop, on both sides: heard by one handler, unless they are ignored."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

_GONE = signal.SIGHUP  # a terminal was closed or its connection lost
_STOPPING = (signal.SIGINT, signal.SIGTERM, _GONE)


def hear(handler: Callable[[int, FrameType | None], None]) -> Mapping[int, Any]:
    """Have `handler` called with the number of each; those heard, and what they did before.

    One that is ignored, as Ctrl-C is in a script's background and the terminal's end under nohup, stays so. The end of
    a terminal is told by its kernel and by its shell: as no more than the first signal, for nobody is impatient.
    """
    heard = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    asked = False

    def once(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not (asked and number == _GONE):
            asked = True
            handler(number, frame)

    return {number: signal.signal(number, once) for number in heard}


def ignore() -> None:
    """Have none of them end the process: it is ending, and whoever asks for that once more changes nothing."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)
