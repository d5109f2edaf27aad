"""Pictures in folders, a folder a class: `folder:PATH`; called by sources.py."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from common.errors import DataError, printable
from common.words import some
from device_client.listing import Listing, Source
from device_client.pictures import Shape, bombs_are_errors, decode, in_colour, require_channels, size_of

_THREADS_FROM = 8_192  # bytes of a file, about 150x150 pixels; see _threads
_BYTES_A_PIXEL = 8  # while a picture is decoded: four channels, and what is made of them
_NOT_PICTURES = {".eps", ".ps", ".pdf"}  # Pillow hands EPS to Ghostscript, a program of its own; PDF it only writes


def check_folder(root: Path) -> None:
    """DataError where `root` cannot be a folder of pictures, by what lies in it at first sight."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give one that has train/CLASS/ and test/CLASS/ with pictures")
    if root.name in ("train", "test") and not (root / root.name).is_dir() and (root.parent / "train").is_dir():
        raise DataError(f"{root} is one of the parts; give the folder that holds both: folder:{root.parent}")
    if not any((root / name).is_dir() for name in ("train", "test")):
        raise DataError(f"{root} has no folders train and test; put pictures into train/CLASS/ and test/CLASS/ there")


def folder(root: Path, shape: Shape, wants_train: bool, wants_test: bool, known: Sequence[str]) -> Source:
    """`root`/train/CLASS/* and `root`/test/CLASS/*; the classes are train's folders, sorted by code point."""
    require_channels(shape)
    check_folder(root)
    # Without train/, a folder that is only evaluated still has classes: the run's, where its test/ has no others.
    trains = wants_train or (root / "train").is_dir()
    classes = _class_names(root / ("train" if trains else "test"))
    if not trains and known:
        if unknown := [folder for folder in classes if folder not in known]:
            raise DataError(
                f"{root / 'test'} has classes that the run does not have: {some(unknown)}; it has {some(known)}: "
                f"rename or remove them"
            )
        classes = tuple(known)
    listings: dict[str, Listing] = {}
    unused: list[str] = []
    left_out: list[str] = []
    for name, wanted in (("train", wants_train), ("test", wants_test)):
        if wanted:
            folders = _class_names(root / name)
            if unknown := [folder for folder in folders if folder not in classes]:
                raise DataError(
                    f"{root / 'test'} has classes that {root / 'train'} does not have: {some(unknown)};"
                    " rename or remove them, or add training pictures"
                )
            if untested := [folder for folder in classes if folder not in folders]:
                left_out.append(f"no {name} pictures of {len(untested)} of {len(classes)} classes: {some(untested)}")
            listings[name] = _folder_listing(root, [root / name / folder for folder in folders], classes, shape, unused)
    if unused:
        left_out.append(
            f"not used, since a class's pictures lie directly in its folder and have a picture's ending: {some(unused)}"
        )
    return Source(classes, listings.get("train"), listings.get("test"), tuple(left_out))


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; make it, with a folder of pictures for each class")
    names = sorted(entry.name for entry in _scan(folder) if _is_dir(entry) and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no classes; put the pictures of each class into a folder of its own there")
    if foreign := [name for name in names if not _is_unicode(name)]:
        shown = some([printable(name) for name in foreign])
        raise DataError(f"{folder} has classes whose names are not UTF-8 ({shown}); rename those folders")
    return tuple(names)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _folder_listing(
    root: Path, folders: list[Path], classes: tuple[str, ...], shape: Shape, unused: list[str]
) -> Listing:  # fmt: skip
    """`unused` takes what else lies in the folders."""
    suffixes = set(Image.registered_extensions()) - _NOT_PICTURES
    files: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        # Not is_file(): a dangling link is a picture that cannot be read, and must not vanish without a word.
        names: list[str] = []
        for entry in sorted(_scan(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if Path(entry.name).suffix.lower() in suffixes and not _is_dir(entry):
                names.append(entry.name)
            else:
                unused.append(str((folder / entry.name).relative_to(root)) + "/" * _is_dir(entry))
        if not names:
            raise DataError(f"{folder} has no pictures; add some (*.jpg, *.png, ...) or remove the folder")
        files += [folder / name for name in names]
        labels += [classes.index(folder.name)] * len(names)
    sample = files[:: len(files) // 64 + 1]
    return Listing(
        np.array(labels, dtype=np.int64),
        read=lambda index: decode(files[index], shape),
        name=lambda index: str(files[index].relative_to(root)),
        threads=_threads(sample),
        loses_colour=shape[0] == 1 and any(map(in_colour, sample)),
    )


def _threads(some: list[Path]) -> int:
    """How many may read pictures like these at once.

    Pillow decodes without the GIL, but threads fight over it to parse small files: with two, 32x32 JPEGs took half as
    long again. Large ones are whole in memory, each in its thread.
    """
    sizes, pixels = [0], 1
    for file in some:
        with contextlib.suppress(Exception), bombs_are_errors():  # told where it is read
            sizes.append(file.stat().st_size)
            pixels = max(pixels, math.prod(size_of(file)))
    if sum(sizes) / len(sizes) < _THREADS_FROM:
        return 1
    room = psutil.virtual_memory().available // 4 // (_BYTES_A_PIXEL * pixels)
    return max(1, min(os.cpu_count() or 1, room))


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether it is, or leads to, a folder; a link that leads in circles is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({error.strerror}); check its permissions") from error
