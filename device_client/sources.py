"""Where pictures come from: `digits`, `folder:PATH` or `npz:PATH`; called by data.py, and early by the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from common.errors import DataError
from device_client.arrays import digits, npz
from device_client.folders import check_folder, folder
from device_client.listing import Source
from device_client.pictures import Shape


def check_source(source: str) -> None:
    """Raise DataError where SOURCE is none, or what it names is not there: before anyone is kept waiting for it."""
    kind, place = _parse(source)
    if kind != "digits" and not (place.is_dir() if kind == "folder" else place.is_file()):
        raise DataError(f"there is no {'folder' if kind == 'folder' else 'file'} {place}; check the path after {kind}:")
    if kind == "folder":
        check_folder(place)


def open_source(source: str, shape: Shape, wants_train: bool, wants_test: bool, known: Sequence[str] = ()) -> Source:
    """`known`: the classes of the run, of which a test part alone may lack some."""
    kind, place = _parse(source)
    if kind == "digits":
        return digits(shape, wants_train, wants_test)
    return (folder if kind == "folder" else npz)(place, shape, wants_train, wants_test, known)


def _parse(source: str) -> tuple[str, Path]:
    """ "digits", "folder" or "npz", and the path of the latter two."""
    kind, _, path = source.partition(":")
    if source == "digits" or (kind in ("folder", "npz") and path):
        with contextlib.suppress(RuntimeError):  # of a user that is not there: then that is no path either
            return kind, Path(path).expanduser()
        return kind, Path(path)
    raise DataError(f"{source!r} is not a source of pictures; give digits, folder:PATH or npz:PATH")
