"""Where pictures come from: `digits`, `folder:PATH` or `npz:PATH`, listed but not read; called by data.py.

A source only lists what it has and how to read one picture.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from common.draw import SPLIT, generator
from common.errors import DataError, printable
from device_client.batches import Pictures
from device_client.pictures import MODES, Shape, bombs_are_errors, decode, fit, size_of

# The test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak; UCI Machine Learning Repository,
# doi 10.24432/C50P49, CC BY 4.0), which is also what scikit-learn has.
_DIGITS = Path(__file__).with_name("digits.npz")
_NAMED = 5  # how many names an error lists
_THREADS_FROM = 8_192  # bytes of a file, about 150x150 pixels; see _threads
_BYTES_A_PIXEL = 8  # while a picture is decoded: four channels, and what is made of them
_NOT_PICTURES = {".eps", ".ps", ".pdf"}  # Pillow hands EPS to Ghostscript, a program of its own; PDF it only writes


@dataclass(frozen=True)
class Side:
    """The train or test half of a source, listed but not read; `read` and `name` take a picture's index."""

    labels: NDArray[np.int64]
    read: Callable[[int], tuple[Pictures, tuple[int, int]]]  # and width and height before they were the model's
    name: Callable[[int], str]
    threads: int = 1  # that may read at once


@dataclass(frozen=True)
class Source:
    classes: tuple[str, ...]
    train: Side | None
    test: Side | None
    left_out: tuple[str, ...] = ()  # what of it is not used though it may have been meant to be, in words


def check_source(source: str) -> None:
    """Raise DataError where SOURCE is none, or what it names is not there: before anyone is kept waiting for it."""
    kind, _, path = source.partition(":")
    if source == "digits":
        return
    if kind not in ("folder", "npz") or not path:
        raise DataError(f"{source!r} is not a source of pictures; give digits, folder:PATH or npz:PATH")
    place = Path(path).expanduser()
    if not (place.is_dir() if kind == "folder" else place.is_file()):
        raise DataError(f"there is no {'folder' if kind == 'folder' else 'file'} {place}; check the path after {kind}:")


def open_source(
    source: str, shape: Shape, wants_train: bool, wants_test: bool, known: Sequence[str] = ()
) -> Source:  # fmt: skip
    """`known`: the classes of the run, of which a test part alone may lack some."""
    kind, _, path = source.partition(":")
    if source == "digits":
        return _digits(shape, wants_train, wants_test)
    if kind == "folder" and path:
        return _folder(Path(path).expanduser(), shape, wants_train, wants_test, known)
    if kind == "npz" and path:
        return _npz(Path(path).expanduser(), shape, wants_train, wants_test, known)
    raise DataError(f"{source!r} is not a source of pictures; give digits, folder:PATH or npz:PATH")


def _digits(shape: Shape, wants_train: bool, wants_test: bool) -> Source:
    """1,797 handwritten digits that come with the package; a fifth of each class is the test part, for every seed."""
    with np.load(_DIGITS, allow_pickle=False) as archive:
        pictures = np.rint(archive["images"] * (255 / 16)).astype(np.uint8)  # [1797,8,8], of 0..16
        labels = archive["labels"]
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = generator(0, SPLIT, digit).permutation(np.flatnonzero(labels == digit))
        test[members[: round(len(members) / 5)]] = True
    return Source(
        tuple("0123456789"),
        _array_side("train", pictures[~test], labels[~test], shape) if wants_train else None,
        _array_side("test", pictures[test], labels[test], shape) if wants_test else None,
    )


def _folder(root: Path, shape: Shape, wants_train: bool, wants_test: bool, known: Sequence[str]) -> Source:
    """`root`/train/CLASS/* and `root`/test/CLASS/*; the classes are train's folders, sorted by code point."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give one that has train/CLASS/ and test/CLASS/ with pictures")
    if root.name in ("train", "test") and not (root / root.name).is_dir() and (root.parent / "train").is_dir():
        raise DataError(f"{root} is one of the parts; give the folder that holds both: folder:{root.parent}")
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
    sides: dict[str, Side] = {}
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
            sides[name] = _folder_side(root, [root / name / folder for folder in folders], classes, shape, unused)
    if unused:
        left_out.append(
            f"not used, since a class's pictures lie directly in its folder and have a picture's ending: {some(unused)}"
        )
    return Source(classes, sides.get("train"), sides.get("test"), tuple(left_out))


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; make it, with a folder of pictures for each class")
    names = sorted(entry.name for entry in _scan(folder) if _is_dir(entry) and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no classes; put the pictures of each class into a folder of its own there")
    if foreign := [name for name in names if not _is_unicode(name)]:
        shown = some([printable(name, len(name)) for name in foreign])
        raise DataError(f"{folder} has classes whose names are not UTF-8 ({shown}); rename those folders")
    return tuple(names)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _folder_side(
    root: Path, folders: list[Path], classes: tuple[str, ...], shape: Shape, unused: list[str]
) -> Side:  # fmt: skip
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
    return Side(
        np.array(labels, dtype=np.int64),
        read=lambda index: decode(files[index], shape),
        name=lambda index: str(files[index].relative_to(root)),
        threads=_threads(files[:: len(files) // 64 + 1]),
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


def _npz(path: Path, shape: Shape, wants_train: bool, wants_test: bool, known: Sequence[str]) -> Source:
    """Arrays train_x, train_y, test_x, test_y and, optionally, the class names `classes`, in one numpy file."""
    if not path.is_file():
        raise DataError(f"there is no file {path}; give one that numpy.savez wrote")
    keys = [f"{side}_{half}" for side, on in (("train", wants_train), ("test", wants_test)) if on for half in "xy"]
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist()}
            if missing := [key for key in keys if key not in found]:
                raise DataError(
                    f"{path} has no array {' or '.join(missing)}; save train_x, train_y, test_x and test_y in it"
                )
            # train_y as well, where there is one: it says how many classes the labels of test_y are about.
            keys += [key for key in ("train_y", "classes") if key in found and key not in keys]
            check_memory(
                sum(_announced_bytes(archive, key, path) for key in keys),
                f"the arrays in {path}",
                "save fewer pictures in it, or save them as files for folder:PATH, which --limit applies to",
            )
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in keys}
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 zipfile, zlib and numpy raise half a dozen kinds for a broken file
        raise DataError(
            f"{path} cannot be read as a numpy .npz file ({error}); save it again with numpy.savez"
        ) from error
    for key in keys:
        if key.endswith("_y"):
            _check_labels(path, key, arrays[key])
    alone = known and "train_y" not in arrays and "classes" not in arrays
    classes = tuple(known) if alone else _npz_classes(path, arrays)
    sides = {}
    for side, wanted in (("train", wants_train), ("test", wants_test)):
        if wanted:
            pictures, labels = _channels_last(path, f"{side}_x", arrays[f"{side}_x"], shape), arrays[f"{side}_y"]
            if len(pictures) != len(labels) or not len(labels):
                raise DataError(
                    f"{path} has {len(pictures):,} pictures in {side}_x and {len(labels):,} labels in {side}_y;"
                    " save one label for each picture, and at least one"
                )
            if labels.max() >= len(classes):
                raise DataError(
                    f"{path} has label {labels.max()} in {side}_y and only {len(classes)} classes (labels 0 to"
                    f" {len(classes) - 1}); correct the labels, or name every class in `classes`"
                )
            sides[side] = _array_side(side, pictures, labels, shape)
    return Source(classes, sides.get("train"), sides.get("test"))


def _announced_bytes(archive: zipfile.ZipFile, key: str, path: Path) -> int:
    """What an array takes in memory, from its header alone: a few kilobytes of zip can unpack to gigabytes."""
    with archive.open(f"{key}.npy") as file:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
    if dtype.hasobject:
        raise DataError(
            f"{key} in {path} holds Python objects, which are not read; save numbers as such, and names as text:"
            " .astype(str)"
        )
    if key.endswith("_x") and (dtype != np.uint8 or len(shape) not in (3, 4)):
        raise DataError(
            f"{key} in {path} is {dtype} of shape {list(shape)}; save pictures as uint8 (0..255) of shape"
            " [N,H,W], [N,H,W,C] or [N,C,H,W]"
        )
    return math.prod(shape) * int(dtype.itemsize)


def _check_labels(path: Path, key: str, labels: NDArray[Any]) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (labels < 0).any():
        raise DataError(
            f"{key} in {path} is {labels.dtype} of shape {list(labels.shape)}, or has values below 0;"
            " save labels as integers from 0, of shape [N]"
        )


def _npz_classes(path: Path, arrays: dict[str, NDArray[Any]]) -> tuple[str, ...]:
    if "classes" in arrays:
        names = arrays["classes"]
        if names.ndim != 1 or names.dtype.kind != "U" or not len(names) or len(set(names.tolist())) != len(names):
            raise DataError(f"classes in {path} is not a list of different names; save one string for each class")
        return tuple(names.tolist())
    found = np.unique(arrays["train_y"] if "train_y" in arrays else arrays["test_y"])
    if not np.array_equal(found, np.arange(len(found))):  # also keeps a stray label of 10**9 from naming 10**9 classes
        raise DataError(
            f"the labels in {path} go up to {found[-1]}, but only {len(found)} different ones occur;"
            " number the classes from 0 without gaps, or name every class in `classes`"
        )
    return tuple(str(label) for label in range(len(found)))


def _channels_last(path: Path, key: str, pictures: NDArray[np.uint8], shape: Shape) -> Pictures:
    """[N,H,W,C] or [N,H,W] from either layout; what could be both is what matches the model's input."""
    if pictures.ndim == 3:
        return pictures
    channels, height, width = shape
    last, first = pictures.shape[3] in MODES, pictures.shape[1] in MODES
    if last and first:
        last, first = pictures.shape[1:] == (height, width, channels), pictures.shape[1:] == shape
    if last == first:
        raise DataError(
            f"{key} in {path} has shape {list(pictures.shape)}, which does not show where its 1 or 3 channels are;"
            " save it as [N,H,W,C] or [N,C,H,W] at the model's input size"
        )
    return pictures if last else pictures.transpose(0, 2, 3, 1)


def _array_side(name: str, pictures: Pictures, labels: NDArray[Any], shape: Shape) -> Side:
    """A side over pictures in memory, [N,H,W] or [N,H,W,C] with 1 or 3 channels."""
    if pictures.ndim == 4 and pictures.shape[3] == 1:
        pictures = pictures[..., 0]
    if 0 in pictures.shape[1:]:
        raise DataError(f"the {name} pictures have shape {list(pictures.shape)}, without a pixel; save them again")

    height, width = pictures.shape[1:3]

    def read(index: int) -> tuple[Pictures, tuple[int, int]]:
        return fit(Image.fromarray(np.ascontiguousarray(pictures[index])), shape), (width, height)

    return Side(labels.astype(np.int64), read, lambda index: f"{name}_x[{index}]")


# --- sizes and words ---


def check_memory(needed: int, what: str, remedy: str) -> None:
    """DataError if `needed` bytes are over half of the free memory; the rest is for the model, and for one copy."""
    free = psutil.virtual_memory().available
    if needed > free / 2:
        raise DataError(
            f"{what} need {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free, of which half may be used;"
            f" {remedy}"
        )


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
