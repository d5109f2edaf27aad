"""Reads one picture into uint8 [C,H,W] at the model's size, whatever the format; called by the sources and data.py."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from common.errors import DataError
from device_client.batches import Pictures

Shape = tuple[int, int, int]

MODES = {1: "L", 3: "RGB"}
# Where a file may say how it is to be turned: EXIF, the same as ImageMagick puts it into a PNG, or XMP.
_TURNS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
# What is to be done for each way that a picture may lie, as EXIF numbers them; in the last four it lies on its side.
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_LYING = (5, 6, 7, 8)


def require_channels(shape: Shape) -> None:
    if shape[0] not in MODES:
        raise DataError(
            f"pictures have 1 or 3 channels and the model wants {shape[0]}; choose another model, "
            f"or give numbers as float32: arrays in an .npz, to predict each in an .npy"
        )


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's formats without EPS, the usual two first: trying 40 others before JPEG took a third of the time."""
    Image.init()
    return ("JPEG", "PNG", *(name for name in Image.ID if name not in {"JPEG", "PNG", "EPS"}))


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture file when it is upright, from its header alone."""
    check_file(path)
    with Image.open(path, formats=_formats()) as image:
        return _upright(image)


def in_colour(path: Path) -> bool:
    """Whether a picture file has colours, by its header alone; not where that only lists some, or cannot be read."""
    try:
        check_file(path)
        with bombs_are_errors(), Image.open(path, formats=_formats()) as image:
            return image.mode != "P" and Image.getmodebase(image.mode) == "RGB"
    except Exception:  # noqa: BLE001 -- told where it is read
        return False


def _upright(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _turn(image) in _LYING else (width, height)


def _turn(image: Image.Image) -> int:
    """How the file says that it is to be turned, as in EXIF; 1, not at all, where it says nothing that can be read."""
    if image.format == "TIFF" or not _TURNS & image.info.keys():  # a TIFF Pillow turns itself
        return 1
    try:
        told = image.getexif().get(ExifTags.Base.Orientation)
        return told if told in _TURNED else 1
    except Exception:  # noqa: BLE001 -- what is told beside a picture does not make it unreadable
        return 1


def check_file(path: Path) -> None:
    """ValueError for a pipe or a socket, which would be waited for; OSError where nothing is there."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file")


def decode(path: Path, shape: Shape) -> tuple[Pictures, tuple[int, int]]:
    """A picture file as uint8 [C,H,W], turned upright as it says itself, and the width and height that it had; of an
    animation, the first frame."""
    check_file(path)
    try:
        opened = Image.open(path, formats=_formats())
    except UnidentifiedImageError as error:
        raise ValueError("empty file" if path.stat().st_size == 0 else "not a picture") from error
    with opened as image:
        size = _upright(image)
        # Lets a large JPEG decode at a fraction of its size; twice what is needed keeps the resize sharp.
        side = 2 * max(shape[1:])
        if min(image.size) >= 2 * side:
            image.draft(MODES[shape[0]], (side, side))
        image.load()
        # Pillow's own way would write what else is told beside the picture anew, and fail where it is odd.
        turned = _TURNED.get(_turn(image))
        upright = image if turned is None else image.transpose(turned)
        if image.format == "PPM" and upright.mode == "I":  # whose numbers Pillow has brought to 16 bits
            upright = upright.convert("I;16")
        return fit(upright, shape), size


def fit(image: Image.Image, shape: Shape) -> Pictures:
    """The image with the channels and size of `shape`, as uint8 [C,H,W]; what is transparent lies on white, as on a
    page: a drawing may be all in how transparent it is."""
    channels, height, width = shape
    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit gray at 255, which turns nearly every picture white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit pixels, whose range is unknown; save it with 8 bits")
    elif image.mode == "LAB":
        image = image.convert("RGB")  # from where there is a way to grey
    transparent = image.has_transparency_data
    wanted = "RGBA" if transparent else MODES[channels]
    if image.mode != wanted:
        image = image.convert(wanted)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(MODES[channels])
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


@contextmanager
def bombs_are_errors() -> Iterator[None]:
    """Pillow only warns of a picture that unpacks to gigabytes, up to twice its limit; and of odd things beside what is
    read, in lines that nobody can place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()  # without the path, which str(error) repeats
    return str(error) or type(error).__name__
