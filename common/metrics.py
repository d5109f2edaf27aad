"""metrics.jsonl: what each step came to, and what the file does where the disk is full or the run goes back a while.

Both sides write one in their run folder, which opens it (common/run.py).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import RunFolderError
from common.meter import DOWN, UP
from common.schedule import Phase


class MetricsLog:
    """metrics.jsonl, a line a step. A line that doesn't fit on the disk is taken back whole and the run goes on."""

    def __init__(self, path: Path, resume: bool = False) -> None:
        """Begin the file anew, or go on with it; `rewind` then says where."""
        self.dropped = 0
        self._path = path
        try:
            self._file = path.open("r+b" if resume and path.exists() else "w+b", buffering=0)
        except OSError as error:
            raise RunFolderError(f"{path} cannot be written: {error.strerror}") from error

    def append(self, line: dict[str, Any]) -> str | None:
        """Write one line; the warning to show, once, where it could not be written."""
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        position = self._file.tell()
        try:
            if self._file.write(data) == len(data):
                return None
            reason = "the disk is full"
        except OSError as error:
            reason = error.strerror or str(error)
        with contextlib.suppress(OSError):  # not on a device file, and there is nothing half-written there
            self._file.truncate(position)
            self._file.seek(position)
        self.dropped += 1
        return f"{self._path} cannot be written ({reason}); training goes on without it" if self.dropped == 1 else None

    def sync(self) -> None:
        """Make sure that what was written outlasts a loss of power."""
        with contextlib.suppress(OSError):  # not every place can
            os.fsync(self._file.fileno())

    def rewind(self, step: int) -> dict[str, int]:
        """Drop the lines of `step` and later, which are made again: how many "steps", and their bytes "up", "down"."""
        lost, end = {UP: 0, DOWN: 0, "steps": 0}, 0
        with self._path.open("rb") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                except ValueError:  # half a line: the process died over it
                    break
                if entry["step"] < step:
                    end += len(line)
                    continue
                lost["steps"] += 1
                for way in (UP, DOWN):
                    lost[way] += entry["bytes"][way]
        with contextlib.suppress(OSError):  # a device file has no length
            self._file.truncate(end)
        self._file.seek(end)
        return lost

    def close(self) -> None:
        self._file.close()


def metrics_line(
    step: int, phase: Phase, width: int, loss: float, accuracy: float, crossed: Mapping[str, int],
    seconds: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """A line of metrics.jsonl. `crossed`: bytes of the step's messages up and down; `seconds` by what they went for."""
    return {
        "step": step, "phase": phase.index, "width": width, "loss": loss, "accuracy": accuracy, "bytes": crossed,
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
    }  # fmt: skip
