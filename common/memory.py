"""Hands memory that was freed back to the system. Called by common/checkpoint.py, now and then in a long run.

Two things make a long run creep up though nothing is lost. Objects that hold each other in a circle, as the traceback
of a broken stream does, stay until Python collects everything, which with two hundred thousand objects of libraries
about it does once in many minutes; so those are set aside whenever more libraries were loaded, and a collection then
takes milliseconds. And glibc keeps what lies free between blocks that are still in use: a run makes and drops buffers
of many sizes in several threads. On a small device that is memory another program could use. Other C libraries give it
back by themselves or have no such call.
"""

from __future__ import annotations

import ctypes
import gc
import sys

_loaded = 0  # modules whose objects are set aside
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None


def give_back() -> None:
    """Some milliseconds; some tenths of a second the first time and after libraries were loaded."""
    global _loaded
    gc.collect()
    if len(sys.modules) > _loaded:
        gc.freeze()
        _loaded = len(sys.modules)
    if _trim:
        _trim(0)
