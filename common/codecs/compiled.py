"""How loops are compiled that numpy has no operation for: once a machine, by numba, and kept beside the file."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

Function = Callable[..., Any]


def kept(signature: str, **options: Any) -> Callable[[Function], Function]:
    """Compiled as the file is loaded, or what was compiled before is loaded: with all that it calls.

    numba compiles again what has changed in a file, but not what it calls in another: so a file calls its own alone.
    """

    def compiled(function: Function) -> Function:
        # What is kept is named after the source. numba writes that it has it before it does, over what an older source
        # has left under the same name: without this a full disk in between would have that run for ever.
        source = Path(inspect.getfile(function)).read_bytes()
        function.__qualname__ += "_" + hashlib.sha256(source).hexdigest()[:8]
        try:
            return numba.njit(signature, nogil=True, cache=True, **options)(function)
        except Exception:  # noqa: BLE001 - no place to keep it in, a full disk, or a file there that is damaged
            return numba.njit(signature, nogil=True, **options)(function)

    return compiled
