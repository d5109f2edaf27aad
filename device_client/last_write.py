"""The trained head is written at the end of a run, also where the disk has no room for it yet; for the trainer."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from rich.console import Console

from common.errors import RunFolderError
from common.progress import warn
from common.words import gives_up, size

_ROOM_S, _TOLD_EVERY_S = 10.0, 60.0  # between two attempts, and two words about that


def write_with_patience(
    write: Callable[[], None], needed: Callable[[], int], give_up_s: float, stopping: Callable[[], bool],
    console: Console,
) -> None:  # fmt: skip
    """`write`, tried again for up to `give_up_s` where it raises RunFolderError: there may be no checkpoint either, and
    all would be lost. `needed`: bytes that it takes. KeyboardInterrupt where the user is `stopping` the run meanwhile.
    """
    until, tell = time.monotonic() + give_up_s, 0.0
    while True:
        try:
            return write()
        except RunFolderError as error:
            if stopping():
                raise KeyboardInterrupt from error
            left = until - time.monotonic()
            if left <= 0:
                raise RunFolderError(
                    f"{error}; the run has made all its steps and is not finished: make room, and start it again with "
                    f"the same --run to go on from its newest checkpoint"
                ) from error
            if time.monotonic() >= tell:
                tell = time.monotonic() + _TOLD_EVERY_S
                full = getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
                what = f": make room for {size(needed())}" if full else ""
                warn(
                    console,
                    f"{error}; the trained head is in this process alone{what}; trying again, {gives_up(left)}",
                )
            again = time.monotonic() + min(_ROOM_S, left)
            while time.monotonic() < again and not stopping():
                time.sleep(0.1)
