"""What was made of some files, made anew when they change: certificates and tokens rotate while a server runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Generic, TypeVar

from common.errors import DepruneError

T = TypeVar("T")


class Reloaded(Generic[T]):
    """`load()` raises a DepruneError where the files cannot be used: at first to the caller, later it is told once.

    `tell` is given a sentence whenever the files have changed: that they are in force, or why the old ones stay so.
    """

    def __init__(self, paths: Collection[Path], load: Callable[[], T], tell: Callable[[str], None]) -> None:
        self._paths, self._load, self._tell = tuple(paths), load, tell
        self._lock = threading.Lock()
        # Looked at before they are read: what is written in between is seen the next time.
        self._seen = self._look()
        self._value = load()

    def _look(self) -> list[tuple[int, int, int] | None]:
        seen: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = path.stat()
                seen.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except OSError:
                seen.append(None)
        return seen

    def __call__(self) -> T:
        """The newest that could be used."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                self._seen = seen
                try:
                    self._value = self._load()
                    self._tell(f"{', '.join(map(str, self._paths))} changed: in force from now on")
                except DepruneError as error:
                    self._tell(f"{error}; what was there before stays in force")
            return self._value
