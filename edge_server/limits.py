"""All that a server allows, with the reason beside each number. The command line fills it in; the host holds it.

What each does when it is reached, and which option sets it: docs/limits.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    # A session is some kB, so this bounds threads more than memory: each may hold two.
    sessions: int = 64
    # A quarter of the places: three greedy callers leave room for others. A network of devices behind one address,
    # where identities are not asked for, still gets along with it.
    sessions_each: int = 16
    # A run, an evaluation or a reconnect is two or three calls; those of thirty devices at one address pass at once.
    calls_a_second: float = 20.0
    calls_in_a_burst: int = 100
    # 256 MB as float32: thirty times a batch of 128 at ResNet-20's first cut. Decoding takes a few times as much.
    elements: int = 1 << 26
    # No limit: only the operator knows the uplink. Bytes a second that are read from one caller.
    rate: float = math.inf
    # One frame of 1 MiB takes so long at 14 kbit/s, and a slow device needs a minute or two for a batch or to read its
    # pictures. A dead link is found in 20 s (pulse.py): this is for devices that live and say nothing.
    idle_s: float = 600.0
    # A caller that has its stream has Begin ready: the deadline of the handshake.
    first_frame_s: float = 30.0
    # Each holds a thread and a batch, up to some ten MB; they compute in turn, so more of them finish no sooner.
    queue: int = 16
    # An evaluation of some thousand pictures takes seconds.
    retry_s: float = 5.0
    # Sixteen times what our device asks for; each answer of some 60 bytes is kept until the next request.
    recall: int = 1024
    # Bytes on disk that one phase of a run may keep of what its device sent while the head was frozen.
    store: int = 4096 * 1_000_000

    @property
    def queue_each(self) -> int:
        """Evaluations and predictions at once of one caller: a quarter, as of the sessions."""
        return max(1, self.queue // 4)

    @property
    def calls(self) -> int:
        """RPCs at once, each with a thread: two for each session, and some for handshakes."""
        return 2 * self.sessions + 8

    @property
    def calls_each(self) -> int:
        """RPCs at once of one caller."""
        return 2 * self.sessions_each + 4
