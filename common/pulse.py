"""Whether a connection still gets anywhere, by what the kernel says has moved on it. Pure; the clock is given.

gRPC's own keepalive goes by the answer to a ping alone. On a slow link that waits behind a whole frame, so its patience
cannot be short; and it is answered also where a damaged HTTP/2 frame has left a stream waiting for ever. The device
looks at its streams with this (link.py), the server at those of its devices (watch.py).
"""

from __future__ import annotations

from common.tcp_info import Moved

# Two of our pings (channel.py) and no answer to either, nor anything else.
SILENT_S = 20.0
# Pings go on, but nothing that could be a frame moves, and an answer is due. A step takes the server that long only
# where its processor is far too slow; then it costs a reconnect, which gets the answer once there is one.
STALLED_S = 120.0
# More than what comes of our own pings where something on the way confirms them and hands nothing on: bytes confirmed,
# and segments. These count too, for where TCP has sent a long queue twice, nothing new is confirmed for a while.
_PINGS, _SEGMENTS = 200, 5
# More than pings and their answers come to in STALLED_S, TLS records included; less than any activation.
_BABBLE = 2000


class Pulse:
    """One connection's, from now on. `look` is to be called about once a second."""

    def __init__(self, now: float, silent_s: float = SILENT_S, stalled_s: float = STALLED_S) -> None:
        self._silent_s, self._stalled_s = silent_s, stalled_s
        self._alive = self._fed = now
        self._at_life: Moved | None = None
        self._at_food = Moved(0, 0)

    def look(self, now: float, moved: Moved | None, due: float | None = None) -> str:
        """What is wrong, or "". `due`: since when something has been waited for, which pings are not."""
        if moved is None:
            return ""
        if self._at_life is None:
            self._at_life = self._at_food = moved
        before = self._at_life
        more = moved.confirmed - before.confirmed >= _PINGS or moved.segments - before.segments >= _SEGMENTS
        if more or moved.received != before.received:
            self._alive, self._at_life = now, moved
        if _most(moved, self._at_food) >= _BABBLE:
            self._fed, self._at_food = now, moved
        if now - self._alive >= self._silent_s:
            return f"the link is dead: nothing came for {self._silent_s:.0f} s, and no ping was answered"
        if due is not None and now - max(self._fed, due) >= self._stalled_s:
            return f"the link is stuck: pings are answered, but nothing else has moved for {self._stalled_s:.0f} s"
        return ""


def _most(now: Moved, before: Moved) -> int:
    return max(now.received - before.received, now.confirmed - before.confirmed)
