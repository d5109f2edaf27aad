"""Reads the device's own pictures into memory: `digits`, `folder:PATH` or `npz:PATH`, at the model's size.

`load` is called once before a run or an evaluation, `load_picture` for a prediction. Which pictures are wanted,
whether they fit in memory and which cannot be read is decided here, for all sources alike.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.draw import SPLIT, generator
from common.errors import DataError, printable
from common.progress import Counted
from common.words import by, some
from device_client.arrays import npy
from device_client.batches import Pictures
from device_client.listing import COLOURLESS, Listing, Source, check_memory
from device_client.pictures import Shape, bombs_are_errors, decode, reason, require_channels
from device_client.sources import open_source

# Pictures a thread reads before it reports: a future for each would cost as much as a small JPEG.
_CHUNK, _LARGE_CHUNK = 256, 4


@dataclass(frozen=True)
class Part:
    """Pictures uint8 [N,C,H,W], or numbers float32 [N,C,H,W], and labels int64 [N], indices into the set's classes."""

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
    scaled: str = ""  # "train/cat/b.jpg was 640x480", of the first picture that had another size than the model's
    left_out: tuple[str, ...] = ()  # what lies in the source and is not used, in words


def load(
    source: str,
    input_shape: Shape,
    seed: int,
    validation: float,
    *,
    parts: Sequence[str] = ("train", "validation", "test"),
    skip_unreadable: bool = False,
    limit: int | None = None,
    classes: int | None = None,
    known: Sequence[str] = (),
    progress: Counted | None = None,
) -> Dataset:
    """The pictures of SOURCE, resized (not cropped) to `input_shape` = (C,H,W), and their labels; numbers as they are.

    `limit` keeps that many training pictures, drawn by `seed` from all classes; `validation` (0 up to 1) is the
    fraction of those that is held out, by `seed` too. Test pictures are never limited. Only `parts` are read: for
    "test" alone the training pictures are not touched. `classes`: how many there must be; `known`: their names, of
    which a folder with a test part alone may lack some. `progress` is called with (pictures read, pictures in all).

    Raises DataError, in one sentence with what to do, for a source that is missing, malformed or larger than half
    of the free memory, and for pictures that cannot be read, unless `skip_unreadable` leaves those out.
    """
    wants_train, wants_test = "train" in parts or "validation" in parts, "test" in parts
    opened = open_source(source, input_shape, wants_train, wants_test, known)
    _require_classes(source, opened.classes, classes, known)
    wanted = _choose(opened, parts, seed, validation, limit)
    total = sum(len(chosen) for _, chosen in wanted.values())
    fewer = "pass --limit to train on fewer pictures, or " if "train" in parts else ""
    check_memory(
        sum(len(chosen) * np.dtype(listing.dtype).itemsize for listing, chosen in wanted.values())
        * math.prod(input_shape),
        f"{total:,} pictures of {by(input_shape)}",
        f"{fewer}choose a model with a smaller input",
    )

    read: dict[str, Part] = {}
    unreadable: list[str] = []
    done, scaled = 0, ""
    for name, (listing, chosen) in wanted.items():
        report = (lambda count, before=done: progress(before + count, total)) if progress else None
        read[name], bad, others = _read(listing, chosen, input_shape, report)
        unreadable += bad
        scaled = scaled or others
        done += len(chosen)

    if unreadable and not skip_unreadable:
        raise DataError(
            f"{len(unreadable):,} of {total:,} pictures under {source.partition(':')[2]} cannot be read:"
            f" {some(unreadable)}; delete them or pass --skip-unreadable"
        )
    for name, (_, chosen) in wanted.items():
        if len(chosen) and not len(read[name]):
            raise DataError(f"none of the {len(chosen):,} {name} pictures of {source} can be read: {some(unreadable)}")
    empty = Part(np.empty((0, *input_shape), dtype=np.uint8), np.empty(0, dtype=np.int64))
    train_part, validation_part, test_part = (read.get(name, empty) for name in ("train", "validation", "test"))
    left_out = opened.left_out
    if any(listing.loses_colour for listing, _ in wanted.values()):
        left_out += (COLOURLESS,)
    present = set(train_part.labels)
    bare = [name for label, name in enumerate(opened.classes) if label not in present]
    if present and bare:
        left_out += (f"no training pictures of {len(bare)} of {len(opened.classes)} classes: {some(bare)}",)
    if source == "digits" and input_shape[0] == 1:  # of whose size nobody can be mistaken
        scaled = ""
    return Dataset(opened.classes, train_part, validation_part, test_part, tuple(unreadable), scaled, left_out)


def _require_classes(source: str, classes: Sequence[str], expected: int | None, known: Sequence[str]) -> None:
    if expected not in (None, len(classes)):
        raise DataError(
            f"{source} has {len(classes)} classes and the recipe {expected}; use other data"
            f"{'' if known else ', or change model.classes on the server'}"
        )
    if strange := [shown for name in classes if (shown := printable(name)) != name]:
        raise DataError(f"{source} has the class {strange[0]!r}, with a character that no terminal shows: rename it")


def _choose(
    opened: Source, parts: Sequence[str], seed: int, validation: float, limit: int | None
) -> dict[str, tuple[Listing, NDArray[np.int64]]]:
    """For each part that is wanted where its pictures are, and their indices there."""
    wanted: dict[str, tuple[Listing, NDArray[np.int64]]] = {}
    if opened.train:
        train, held_out = _split(len(opened.train.labels), seed, validation, limit)
        if "train" in parts:
            wanted["train"] = (opened.train, train)
        if "validation" in parts:
            wanted["validation"] = (opened.train, held_out)
    if opened.test:
        wanted["test"] = (opened.test, np.arange(len(opened.test.labels)))
    return wanted


def load_picture(path: str | os.PathLike[str], input_shape: Shape) -> tuple[Pictures, tuple[int, int]]:
    """One picture file as uint8 [C,H,W], treated as `load` treats those of a folder, or numbers in an .npy file as
    float32 [C,H,W]; and the width and height that it had. Raises DataError."""
    if Path(path).suffix.lower() == ".npy":
        return npy(Path(path), input_shape)
    if Path(path).suffix.lower() == ".npz":
        raise DataError(f"{path} holds many arrays; give one of what it holds, saved as an .npy file")
    if os.path.isdir(path):  # noqa: PTH112 -- Path's fails where it may not look, which is told below
        raise DataError(f"{path} is a folder; give the pictures in it: {Path(path) / '*'}")
    require_channels(input_shape)
    try:
        with bombs_are_errors():
            return decode(Path(path), input_shape)
    except Exception as error:  # noqa: BLE001 as in _read
        raise DataError(f"the picture {path} cannot be read ({reason(error)}); give another file") from error


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
    listing: Listing, chosen: NDArray[np.int64], shape: Shape, report: Callable[[int], None] | None
) -> tuple[Part, list[str], str]:
    """The chosen pictures, without those that cannot be read; "name (reason)" of each of those; the first that had
    another size than the model's, and which."""
    pictures: Pictures = np.empty((len(chosen), *shape), listing.dtype)
    failed: dict[int, str] = {}
    others: dict[int, tuple[int, int, int]] = {}  # by chunk its first of another size: row, width, height
    size, stopped = _CHUNK if listing.threads == 1 else _LARGE_CHUNK, threading.Event()

    def read_chunk(start: int) -> int:
        stop = min(start + size, len(chosen))
        for row in range(start, stop):
            if stopped.is_set():
                break
            try:
                pictures[row], (width, height) = listing.read(int(chosen[row]))
                if (height, width) != shape[1:]:
                    others.setdefault(start, (row, width, height))
            # Pillow's plugins raise whatever a broken file provokes, not only OSError.
            except Exception as error:  # noqa: BLE001
                failed[row] = f"{listing.name(int(chosen[row]))} ({reason(error)})"
        return stop - start

    pool = ThreadPoolExecutor(listing.threads)  # each writes rows that no other does
    try:
        with bombs_are_errors():
            done = 0
            for count in pool.map(read_chunk, range(0, len(chosen), size)):
                done += count
                if report:
                    report(done)
    finally:
        stopped.set()  # after Ctrl-C, only the pictures in hand are finished
        pool.shutdown(cancel_futures=True)
    labels = listing.labels[chosen]
    if failed:
        readable = np.setdiff1d(np.arange(len(chosen)), list(failed))
        pictures, labels = pictures[readable], labels[readable]
    scaled = ""
    if others:
        row, width, height = others[min(others)]
        scaled = f"{listing.name(int(chosen[row]))} was {width}x{height}"
    return Part(pictures, labels), [failed[row] for row in sorted(failed)], scaled
