"""Files written whole or not at all: what was there before stays until the new one is safe on the disk."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from common.errors import RunFolderError


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Temporary file, fsync, rename, fsync of the folder; RunFolderError, and nothing changed, where that fails."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(mode)
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be written: {error.strerror}; what was there before is unchanged"
        ) from error
