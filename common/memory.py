"""Hands memory that was freed back to the system. Called by common/checkpoint.py, now and then in a long run.

glibc keeps what lies free between blocks that are still in use. A run makes and drops buffers of many sizes in several
threads, so what is kept creeps up for hours though nothing is lost: on a small device that is memory another program
could use. Other C libraries give it back by themselves or have no such call; there this does nothing.
"""

from __future__ import annotations

import ctypes
import sys

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


def give_back() -> None:
    """Some milliseconds."""
    if _trim:
        _trim(0)
