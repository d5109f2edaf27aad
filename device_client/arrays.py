"""Pictures, or numbers of any kind, in numpy's files: `npz:PATH`, the bundled `digits`, and one in an .npy file."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.draw import SPLIT, generator
from common.errors import DataError
from device_client.batches import Pictures
from device_client.listing import Listing, Source, check_memory
from device_client.pictures import MODES, Shape, check_file, fit, reason, require_channels

# The test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak; UCI Machine Learning Repository,
# doi 10.24432/C50P49, CC BY 4.0), which is also what scikit-learn has.
_DIGITS = Path(__file__).with_name("digits.npz")
# Numbers beyond it are what some files say for "nothing here"; a network would square them out of float32.
_MOST = 1e18


def digits(shape: Shape, wants_train: bool, wants_test: bool) -> Source:
    """1,797 handwritten digits that come with the package; a fifth of each class is the test part, for every seed."""
    require_channels(shape)
    with np.load(_DIGITS, allow_pickle=False) as archive:
        pictures = np.rint(archive["images"] * (255 / 16)).astype(np.uint8)  # [1797,8,8], of 0..16
        labels = archive["labels"]
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = generator(0, SPLIT, digit).permutation(np.flatnonzero(labels == digit))
        test[members[: round(len(members) / 5)]] = True
    return Source(
        tuple("0123456789"),
        _array_listing("train", pictures[~test], labels[~test], shape) if wants_train else None,
        _array_listing("test", pictures[test], labels[test], shape) if wants_test else None,
    )


def npz(path: Path, shape: Shape, wants_train: bool, wants_test: bool, known: Sequence[str]) -> Source:
    """Arrays train_x, train_y, test_x, test_y and, optionally, the class names `classes`, in one numpy file."""
    if not path.is_file():
        raise DataError(f"there is no file {path}; give one that numpy.savez wrote")
    keys = [f"{part}_{half}" for part, on in (("train", wants_train), ("test", wants_test)) if on for half in "xy"]
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
    kinds = {arrays[key].dtype.kind == "f" for key in keys if key.endswith("_x")}
    if len(kinds) > 1:
        raise DataError(
            f"{path} has train_x in {arrays['train_x'].dtype} and test_x in {arrays['test_x'].dtype}: save both as "
            f"pictures in uint8, or both as numbers in float32"
        )
    alone = known and "train_y" not in arrays and "classes" not in arrays
    classes = tuple(known) if alone else _npz_classes(path, arrays)
    return Source(
        classes,
        _npz_listing(path, "train", arrays, len(classes), shape) if wants_train else None,
        _npz_listing(path, "test", arrays, len(classes), shape) if wants_test else None,
    )


def _npz_listing(path: Path, part: str, arrays: dict[str, NDArray[Any]], classes: int, shape: Shape) -> Listing:
    """The "train" or "test" part, if pictures and labels fit each other and the number of classes."""
    pictures, labels = arrays[f"{part}_x"], arrays[f"{part}_y"]
    if len(pictures) != len(labels) or not len(labels):
        raise DataError(
            f"{path} has {len(pictures):,} pictures in {part}_x and {len(labels):,} labels in {part}_y;"
            " save one label for each picture, and at least one"
        )
    if labels.max() >= classes:
        raise DataError(
            f"{path} has label {labels.max()} in {part}_y and only {classes} classes (labels 0 to"
            f" {classes - 1}); correct the labels, or name every class in `classes`"
        )
    if pictures.dtype.kind == "f":
        return _listing_of_numbers(part, pictures, labels, shape, path)
    require_channels(shape)
    return _array_listing(part, _channels_last(path, f"{part}_x", pictures, shape), labels, shape)


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
    dimensions = {"f": (4,), "u": (3, 4) if dtype == np.uint8 else ()}.get(dtype.kind, ())
    if key.endswith("_x") and len(shape) not in dimensions:
        raise DataError(
            f"{key} in {path} is {dtype} of shape {list(shape)}; save pictures as uint8 (0..255) of shape"
            " [N,H,W], [N,H,W,C] or [N,C,H,W], other numbers as float32 of shape [N,C,H,W]"
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


def _array_listing(name: str, pictures: Pictures, labels: NDArray[Any], shape: Shape) -> Listing:
    """A listing of pictures in memory, [N,H,W] or [N,H,W,C] with 1 or 3 channels."""
    if pictures.ndim == 4 and pictures.shape[3] == 1:
        pictures = pictures[..., 0]
    if 0 in pictures.shape[1:]:
        raise DataError(f"the {name} pictures have shape {list(pictures.shape)}, without a pixel; save them again")

    height, width = pictures.shape[1:3]

    def read(index: int) -> tuple[Pictures, tuple[int, int]]:
        return fit(Image.fromarray(np.ascontiguousarray(pictures[index])), shape), (width, height)

    loses_colour = shape[0] == 1 and pictures.ndim == 4
    return Listing(labels.astype(np.int64), read, lambda index: f"{name}_x[{index}]", loses_colour=loses_colour)


def _listing_of_numbers(name: str, numbers: NDArray[Any], labels: NDArray[Any], shape: Shape, path: Path) -> Listing:
    """A listing of numbers in memory, [N,C,H,W] with the model's C, H and W, taken as they are."""
    exact = _numbers(numbers, shape, f"{name}_x in {path}")
    return Listing(
        labels.astype(np.int64), lambda index: (exact[index], shape[:0:-1]), lambda index: f"{name}_x[{index}]",
        dtype=np.float32,
    )  # fmt: skip


def _numbers(found: NDArray[Any], shape: Shape, what: str) -> NDArray[np.float32]:
    """[N,C,H,W] as float32; DataError where a row is not what the model takes."""
    if found.shape[1:] != shape:
        raise DataError(
            f"{what} has rows of shape {list(found.shape[1:])}; numbers are taken as they are: save each as "
            f"{list(shape)}, which is the recipe's model.input"
        )
    with np.errstate(over="ignore"):  # what is too large for float32 is refused below
        exact = found.astype(np.float32, copy=False)
    rows = (1, 2, 3)
    usable = (exact.max(rows, initial=0) <= _MOST) & (exact.min(rows, initial=0) >= -_MOST)  # which NaN isn't
    if not usable.all():
        raise DataError(
            f"{what} has {np.count_nonzero(~usable):,} of {len(exact):,} rows with NaN, infinity or numbers beyond "
            f"{_MOST:.0e}, the first at {int(usable.argmin())}; leave them out or fill them in"
        )
    return exact


def npy(path: Path, shape: Shape) -> tuple[Pictures, tuple[int, int]]:
    """Numbers in a file of numpy.save, float [C,H,W] as the model takes them, and their width and height."""
    try:
        check_file(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({reason(error)}); give a file that numpy.save wrote") from error
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)  # nothing of it is in memory yet
        if not isinstance(found, np.ndarray):
            raise ValueError("it is an .npz file")
    except Exception as error:  # noqa: BLE001 as in npz
        raise DataError(
            f"{path} cannot be read as a numpy .npy file ({error}); save it again with numpy.save"
        ) from error
    if found.dtype.kind != "f":
        raise DataError(f"{path} is {found.dtype}; save numbers as float32, and pixels as a picture file")
    return np.array(_numbers(found[None], shape, str(path))[0]), shape[:0:-1]
