"""How loops are compiled that numpy has no operation for: once a machine, by numba, and kept beside the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

Function = Callable[..., Any]


def kept(signature: str, **options: Any) -> Callable[[Function], Function]:
    """Compiled as the file is loaded, or what was compiled before is loaded: with all that it calls.

    numba compiles again what has changed in a file, but not what it calls in another: so a file calls its own alone.
    """

    def kept(function: Function) -> Function:
        try:
            return numba.njit(signature, nogil=True, cache=True, **options)(function)
        except RuntimeError:  # there is no place to keep it in: each process compiles anew
            return numba.njit(signature, nogil=True, **options)(function)

    return kept
