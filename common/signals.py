"""The signals that ask a process to stop, on both sides: heard by one handler, unless they are ignored."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

# The last comes where a terminal is closed or its connection is lost; Windows has none.
_STOPPING = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]


def hear(handler: Callable[[int, FrameType | None], None]) -> Mapping[int, Any]:
    """Have `handler` called with the number of each; those heard, and what they did before.

    One that is ignored, as Ctrl-C is in a script's background and the terminal's end under nohup, stays so.
    """
    heard = [number for number in _STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}
