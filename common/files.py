"""Files written whole or not at all: what was there before stays until the new one is safe on the disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from uuid import uuid4

from common.errors import RunFolderError


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Temporary file, fsync, rename, fsync of the folder; RunFolderError, and nothing changed, where that fails.

    `mode`: of the file, less what the user's umask takes off.
    """
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be written: {error.strerror}; what was there before is unchanged"
        ) from error
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise RunFolderError(f"{path} is written, but may not outlast a power cut: {error.strerror}") from error
