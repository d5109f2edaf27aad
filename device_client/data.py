"""Reads the device's own pictures into memory: `digits`, `folder:PATH` or `npz:PATH`, as uint8 at the model's size.

The command line calls `load` once before a run and `load_picture` for a prediction. A source only lists what it has
and how to read one picture; which pictures are wanted, whether they fit in memory and which cannot be read is decided
for all sources alike.
"""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import DataError
from device_client.batches import SPLIT, Pictures, generator

Shape = tuple[int, int, int]
Progress = Callable[[int, int], None]

_MODES = {1: "L", 3: "RGB"}
_CHUNK = 256  # pictures a thread reads before it reports; a future for each would cost as much as a small JPEG
_NAMED = 5  # how many names an error lists
_THREADS_FROM = 8_192  # bytes of a file, about 150x150 pixels; see _bytes_each
_NOT_PICTURES = {".eps", ".ps", ".pdf"}  # Pillow hands EPS to Ghostscript, a program of its own; PDF it only writes


@dataclass(frozen=True)
class Part:
    """Pictures uint8 [N,C,H,W] and labels int64 [N], each label an index into the data set's classes."""

    pictures: Pictures
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """What `load` read; a part that was not asked for is empty."""

    classes: tuple[str, ...]
    train: Part
    validation: Part
    test: Part
    skipped: tuple[str, ...]  # "train/cat/a.jpg (empty file)", only with skip_unreadable


@dataclass(frozen=True)
class _Side:
    """The train or test half of a source, listed but not read; `read` and `name` take a picture's index."""

    labels: NDArray[np.int64]
    read: Callable[[int], Pictures]
    name: Callable[[int], str]
    threads: int | None = 1  # None: as many as the machine is good for


@dataclass(frozen=True)
class _Source:
    classes: tuple[str, ...]
    train: _Side | None
    test: _Side | None


def load(
    source: str,
    input_shape: Shape,
    seed: int,
    validation: float,
    *,
    parts: Sequence[str] = ("train", "validation", "test"),
    skip_unreadable: bool = False,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """The pictures of SOURCE, resized (not cropped) to `input_shape` = (C,H,W), and their labels.

    `limit` keeps that many training pictures, drawn by `seed` from all classes; `validation` (0 up to 1) is the
    fraction of those that is held out, by `seed` too. Test pictures are never limited. Only `parts` are read: for
    "test" alone the training pictures are not touched. `progress` is called with (pictures read, pictures in all).

    Raises DataError, in one sentence with what to do, for a source that is missing, malformed or larger than half
    of the free memory, and for pictures that cannot be read, unless `skip_unreadable` leaves those out.
    """
    if input_shape[0] not in _MODES:
        raise DataError(f"pictures have 1 or 3 channels and the model wants {input_shape[0]}; choose another model")
    if not 0 <= validation < 1:
        raise DataError(f"validation is the fraction of pictures to hold out, from 0 up to 1, not {validation}")
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} training pictures leaves nothing; give 1 or more")

    wants_train, wants_test = "train" in parts or "validation" in parts, "test" in parts
    opened = _open(source, input_shape, wants_train, wants_test)
    wanted: dict[str, tuple[_Side, NDArray[np.int64]]] = {}
    if opened.train:
        train, held_out = _split(len(opened.train.labels), seed, validation, limit)
        if "train" in parts:
            wanted["train"] = (opened.train, train)
        if "validation" in parts:
            wanted["validation"] = (opened.train, held_out)
    if opened.test:
        wanted["test"] = (opened.test, np.arange(len(opened.test.labels)))

    total = sum(len(chosen) for _, chosen in wanted.values())
    _check_memory(
        total * math.prod(input_shape),
        f"{total:,} pictures of {'x'.join(map(str, input_shape))}",
        "pass --limit to train on fewer pictures, or choose a model with a smaller input",
    )

    read: dict[str, Part] = {}
    unreadable: list[str] = []
    done = 0
    for name, (side, chosen) in wanted.items():
        report = (lambda count, before=done: progress(before + count, total)) if progress else None
        read[name], bad = _read(side, chosen, input_shape, report)
        unreadable += bad
        done += len(chosen)

    if unreadable and not skip_unreadable:
        raise DataError(
            f"{len(unreadable):,} of {total:,} pictures under {source.partition(':')[2]} cannot be read:"
            f" {_some(unreadable)}; delete them or pass --skip-unreadable"
        )
    for name, (_, chosen) in wanted.items():
        if len(chosen) and not len(read[name]):
            raise DataError(f"none of the {len(chosen):,} {name} pictures of {source} can be read: {_some(unreadable)}")
    empty = Part(np.empty((0, *input_shape), dtype=np.uint8), np.empty(0, dtype=np.int64))
    train_part, validation_part, test_part = (read.get(name, empty) for name in ("train", "validation", "test"))
    return Dataset(opened.classes, train_part, validation_part, test_part, tuple(unreadable))


def load_picture(path: str | os.PathLike[str], input_shape: Shape) -> Pictures:
    """One picture file as uint8 [C,H,W], treated as `load` treats those of a folder; raises DataError."""
    if input_shape[0] not in _MODES:
        raise DataError(f"pictures have 1 or 3 channels and the model wants {input_shape[0]}; choose another model")
    try:
        with _bombs_are_errors():
            return _decode(Path(path), input_shape)
    except Exception as error:  # noqa: BLE001 as in _read
        raise DataError(f"the picture {path} cannot be read ({_reason(error)}); give another file") from error


def _split(
    samples: int, seed: int, validation: float, limit: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices to train on and to hold out, each sorted so that files are read in the order they were listed."""
    kept = generator(seed, SPLIT).permutation(samples)[:limit]
    held_out = max(1, round(len(kept) * validation)) if validation else 0
    if held_out >= len(kept):
        raise DataError(
            f"holding out {validation:g} of {len(kept)} training pictures leaves none to train on;"
            " give more pictures, raise --limit or lower the validation fraction"
        )
    return np.sort(kept[held_out:]), np.sort(kept[:held_out])


def _read(
    side: _Side, chosen: NDArray[np.int64], shape: Shape, report: Callable[[int], None] | None
) -> tuple[Part, list[str]]:
    """The chosen pictures, without those that cannot be read, and "name (reason)" of each of those."""
    pictures = np.empty((len(chosen), *shape), dtype=np.uint8)
    failed: dict[int, str] = {}

    def read_chunk(start: int) -> int:
        stop = min(start + _CHUNK, len(chosen))
        for row in range(start, stop):
            try:
                pictures[row] = side.read(int(chosen[row]))
            # Pillow's plugins raise whatever a broken file provokes, not only OSError.
            except Exception as error:  # noqa: BLE001
                failed[row] = f"{side.name(int(chosen[row]))} ({_reason(error)})"
        return stop - start

    pool = ThreadPoolExecutor(side.threads)  # each writes rows that no other does
    try:
        with _bombs_are_errors():
            done = 0
            for count in pool.map(read_chunk, range(0, len(chosen), _CHUNK)):
                done += count
                if report:
                    report(done)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, only the chunks in hand are finished
    labels = side.labels[chosen]
    if failed:
        readable = np.setdiff1d(np.arange(len(chosen)), list(failed))
        pictures, labels = pictures[readable], labels[readable]
    return Part(pictures, labels), [failed[row] for row in sorted(failed)]


# --- one picture ---


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's formats without EPS, the usual two first: trying 40 others before JPEG took a third of the time."""
    Image.init()
    return ("JPEG", "PNG", *(name for name in Image.ID if name not in {"JPEG", "PNG", "EPS"}))


def _decode(path: Path, shape: Shape) -> Pictures:
    """A picture file as uint8 [C,H,W], turned upright as its EXIF says; of an animation, the first frame."""
    try:
        opened = Image.open(path, formats=_formats())
    except UnidentifiedImageError as error:
        raise ValueError("empty file" if path.stat().st_size == 0 else "not a picture") from error
    with opened as image:
        # Lets a large JPEG decode at a fraction of its size; twice what is needed keeps the resize sharp.
        side = 2 * max(shape[1:])
        if min(image.size) >= 2 * side:
            image.draft(_MODES[shape[0]], (side, side))
        image.load()
        upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
        return _fit(upright, shape)


def _fit(image: Image.Image, shape: Shape) -> Pictures:
    """The image with the channels and size of `shape`, as uint8 [C,H,W]; transparency is dropped."""
    channels, height, width = shape
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit gray at 255, which turns nearly every picture white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, whose range is unknown; save it with 8 bits")
    elif "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow prints a warning for each palette picture
    if image.mode != _MODES[channels]:
        image = image.convert(_MODES[channels])
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


@contextmanager
def _bombs_are_errors() -> Iterator[None]:
    """Pillow only warns of a picture that unpacks to gigabytes, up to twice its limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()  # without the path, which str(error) repeats
    return str(error) or type(error).__name__


# --- sources ---


def _open(source: str, shape: Shape, wants_train: bool, wants_test: bool) -> _Source:
    kind, _, path = source.partition(":")
    if source == "digits":
        return _digits(shape, wants_train, wants_test)
    if kind == "folder" and path:
        return _folder(Path(path).expanduser(), shape, wants_train, wants_test)
    if kind == "npz" and path:
        return _npz(Path(path).expanduser(), shape, wants_train, wants_test)
    raise DataError(f"{source!r} is not a source of pictures; give digits, folder:PATH or npz:PATH")


def _digits(shape: Shape, wants_train: bool, wants_test: bool) -> _Source:
    """scikit-learn's 1,797 handwritten digits; a fifth of each class is the test part, the same for every seed."""
    try:
        from sklearn.datasets import load_digits  # here, because it takes a second that other sources need not wait
    except ImportError as error:
        raise DataError("digits needs scikit-learn; install it with: pip install 'deprune[digits]'") from error
    images, labels = load_digits(return_X_y=True)
    pictures = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = generator(0, SPLIT, digit).permutation(np.flatnonzero(labels == digit))
        test[members[: round(len(members) / 5)]] = True
    return _Source(
        tuple("0123456789"),
        _array_side("train", pictures[~test], labels[~test], shape) if wants_train else None,
        _array_side("test", pictures[test], labels[test], shape) if wants_test else None,
    )


def _folder(root: Path, shape: Shape, wants_train: bool, wants_test: bool) -> _Source:
    """`root`/train/CLASS/* and `root`/test/CLASS/*; the classes are train's folders, sorted by code point."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; give one that has train/CLASS/ and test/CLASS/ with pictures")
    # Without train/, a folder that is only evaluated still has classes: those of its test/.
    classes = _class_names(root / ("train" if wants_train or (root / "train").is_dir() else "test"))
    sides = {}
    for name, wanted in (("train", wants_train), ("test", wants_test)):
        if wanted:
            folders = _class_names(root / name)
            if unknown := [folder for folder in folders if folder not in classes]:
                raise DataError(
                    f"{root / 'test'} has classes that {root / 'train'} does not have: {_some(unknown)};"
                    " rename or remove them, or add training pictures"
                )
            sides[name] = _folder_side(root, [root / name / folder for folder in folders], classes, shape)
    return _Source(classes, sides.get("train"), sides.get("test"))


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; make it, with a folder of pictures for each class")
    names = sorted(entry.name for entry in _scan(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no classes; put the pictures of each class into a folder of its own there")
    return tuple(names)


def _folder_side(root: Path, folders: list[Path], classes: tuple[str, ...], shape: Shape) -> _Side:
    suffixes = set(Image.registered_extensions()) - _NOT_PICTURES
    files: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        # Not is_file(): a dangling link is a picture that cannot be read, and must not vanish without a word.
        names = sorted(
            entry.name
            for entry in _scan(folder)
            if Path(entry.name).suffix.lower() in suffixes and not entry.name.startswith(".") and not entry.is_dir()
        )
        if not names:
            raise DataError(f"{folder} has no pictures; add some (*.jpg, *.png, ...) or remove the folder")
        files += [folder / name for name in names]
        labels += [classes.index(folder.name)] * len(names)
    return _Side(
        np.array(labels, dtype=np.int64),
        read=lambda index: _decode(files[index], shape),
        name=lambda index: str(files[index].relative_to(root)),
        threads=None if _bytes_each(files) >= _THREADS_FROM else 1,
    )


def _bytes_each(files: list[Path]) -> float:
    """Mean file size of a few. Pillow decodes without the GIL, but threads fight over it to parse small files:
    with two, 32x32 JPEGs took half as long again."""
    sizes = [file.stat().st_size for file in files[:: len(files) // 64 + 1] if file.exists()]
    return sum(sizes) / max(1, len(sizes))


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({error.strerror}); check its permissions") from error


def _npz(path: Path, shape: Shape, wants_train: bool, wants_test: bool) -> _Source:
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
            _check_memory(
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
    classes = _npz_classes(path, arrays)
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
    return _Source(classes, sides.get("train"), sides.get("test"))


def _announced_bytes(archive: zipfile.ZipFile, key: str, path: Path) -> int:
    """What an array takes in memory, from its header alone: a few kilobytes of zip can unpack to gigabytes."""
    with archive.open(f"{key}.npy") as file:
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
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
    last, first = pictures.shape[3] in _MODES, pictures.shape[1] in _MODES
    if last and first:
        last, first = pictures.shape[1:] == (height, width, channels), pictures.shape[1:] == shape
    if last == first:
        raise DataError(
            f"{key} in {path} has shape {list(pictures.shape)}, which does not show where its 1 or 3 channels are;"
            " save it as [N,H,W,C] or [N,C,H,W] at the model's input size"
        )
    return pictures if last else pictures.transpose(0, 2, 3, 1)


def _array_side(name: str, pictures: Pictures, labels: NDArray[Any], shape: Shape) -> _Side:
    """A side over pictures in memory, [N,H,W] or [N,H,W,C] with 1 or 3 channels."""
    if pictures.ndim == 4 and pictures.shape[3] == 1:
        pictures = pictures[..., 0]
    if 0 in pictures.shape[1:]:
        raise DataError(f"the {name} pictures have shape {list(pictures.shape)}, without a pixel; save them again")

    def read(index: int) -> Pictures:
        return _fit(Image.fromarray(np.ascontiguousarray(pictures[index])), shape)

    return _Side(labels.astype(np.int64), read, name=lambda index: f"{name}_x[{index}]")


# --- sizes and words ---


def _check_memory(needed: int, what: str, remedy: str) -> None:
    """DataError if `needed` bytes are over half of the free memory; the rest is for the model, and for one copy."""
    free = psutil.virtual_memory().available
    if needed > free / 2:
        raise DataError(
            f"{what} need {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free, of which half may be used;"
            f" {remedy}"
        )


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
