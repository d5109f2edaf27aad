"""One picture: every kind becomes the input that the model wants."""

from __future__ import annotations

import os
import struct
import threading

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from common.errors import DataError
from device_client.data import load, load_picture
from device_client.pictures import in_colour, size_of
from tests.pictures import GRAY, RGB, save, save_npz


def picture(path, shape):
    return load_picture(path, shape)[0]


@pytest.mark.parametrize(
    "name, mode",
    [("a.jpg", "RGB"), ("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.png", "RGB"), ("a.png", "L"), ("a.png", "RGBA")]
    + [("a.png", "LA"), ("a.png", "P"), ("a.gif", "P"), ("a.bmp", "RGB"), ("a.webp", "RGB"), ("a.tif", "RGB")],
)
def test_every_kind_of_picture_becomes_the_models_input(tmp_path, name, mode):
    path = save(tmp_path / name, (200, 100, 40), (11, 6), mode)
    gray = 0.299 * 200 + 0.587 * 100 + 0.114 * 40
    colour = (gray,) * 3 if mode in ("L", "LA") else (200, 100, 40)
    for shape, expected in (((3, 5, 7), colour), ((1, 5, 7), (gray,))):
        found = picture(path, shape)
        assert found.shape == shape and found.dtype == np.uint8
        assert np.abs(found.mean((1, 2)) - expected).max() < 12  # GIF and P have a coarse palette


def test_transparent_palettes_do_not_warn(tmp_path, recwarn):
    image = Image.new("P", (8, 8))
    image.putpalette([9, 9, 9, 90, 120, 150])
    image.paste(1, (0, 0, 8, 8))
    image.save(tmp_path / "a.png", transparency=b"\x80\x40")
    quarter = [round(value + (255 - value) * (1 - 0x40 / 255)) for value in (90, 120, 150)]
    assert picture(tmp_path / "a.png", RGB)[:, 0, 0].tolist() == quarter
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_a_drawing_that_is_all_in_its_transparency_is_seen(mode: str, shape: tuple[int, int, int], tmp_path) -> None:
    """Icons and glyphs are black on nothing: without their ground all of them would be the same black picture."""
    image = Image.new(mode, (32, 32))
    image.paste((0, 255) if mode == "LA" else (0, 0, 0, 255), (8, 8, 24, 24))
    image.save(tmp_path / "a.png")
    found = picture(tmp_path / "a.png", shape)
    assert found.shape == shape and found[:, 0, 0].min() == 255 and found[:, 4, 4].max() == 0


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_what_stands_beside_a_picture_does_not_make_it_unreadable(name: str, tmp_path, recwarn) -> None:
    Image.new("RGB", (9, 6), (200, 100, 40)).save(tmp_path / name, exif=b"Exif\0\0garbage!!!!")
    assert picture(tmp_path / name, RGB).shape == RGB and size_of(tmp_path / name) == (9, 6)
    assert not recwarn.list


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_a_picture_that_is_to_be_turned_may_have_odd_notes(name: str, tmp_path) -> None:
    """A unit that is written as text, which Pillow would not write anew."""
    entries = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x128, 2, 2, b"2\0\0\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255  # above, which ends up right
    Image.fromarray(pixels).save(tmp_path / name, exif=exif, quality=95)
    found = picture(tmp_path / name, RGB)
    assert found[:, :, 5:].min() > 230 and found[:, :, :3].max() < 25


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("beside", [False, True])
def test_every_way_that_a_picture_may_lie(turn: int, beside: bool, tmp_path) -> None:
    """As Pillow turns it; a TIFF is turned once, also where it says so in two places."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x112] = turn
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    lying = ImageFileDirectory_v2()
    lying[0x112] = turn
    if beside:
        lying[700] = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % turn
        lying.tagtype[700] = 1
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo=lying)
    with Image.open(tmp_path / "a.png") as image:
        upright = ImageOps.exif_transpose(image)
    shape = (3, upright.height, upright.width)
    for name in ("a.png", "a.tif"):
        found, size = load_picture(tmp_path / name, shape)
        assert np.array_equal(found, np.asarray(upright).transpose(2, 0, 1)), name
        assert size == size_of(tmp_path / name) == upright.size, name


def test_portable_grey_of_more_than_eight_bits_and_lab(tmp_path) -> None:
    values = np.linspace(0, 1023, 64).astype(">u2").reshape(8, 8)
    (tmp_path / "a.pgm").write_bytes(b"P5\n8 8\n1023\n" + values.tobytes())
    assert np.abs(picture(tmp_path / "a.pgm", GRAY)[0] - values / 4.01).max() <= 1
    Image.new("RGB", (8, 8), (200, 100, 40)).convert("LAB").save(tmp_path / "a.tif")
    colour, grey = picture(tmp_path / "a.tif", RGB), picture(tmp_path / "a.tif", GRAY)
    assert np.abs(colour[:, 0, 0] - np.array([200, 100, 40])).max() < 6
    assert abs(int(grey[0, 0, 0]) - (0.299 * 200 + 0.587 * 100 + 0.114 * 40)) < 6


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 0x8040, dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.unique(picture(tmp_path / "a.png", GRAY)).tolist() == [0x80]
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="32-bit pixels"):
        picture(tmp_path / "a.tif", GRAY)


def test_resizing_averages_and_keeps_orientation(tmp_path):
    # A fine checkerboard on the left, white on the right: a filter without antialiasing would give 0 or 255.
    pixels = np.full((64, 64), 255, dtype=np.uint8)
    pixels[:, :32] = np.indices((64, 32)).sum(0) % 2 * 255
    for name in ("a.png", "a.jpg"):
        Image.fromarray(pixels).save(tmp_path / name, quality=95)
        found = picture(tmp_path / name, GRAY)[0].astype(int)
        assert np.abs(found[:, :3] - 127).max() < 8 and found[:, 5:].min() > 247


def test_scaling_is_told_with_the_first_picture_that_was_scaled(tmp_path):
    for part in ("train", "test"):
        save(tmp_path / part / "a" / "0.png", size=(12, 6))
        save(tmp_path / part / "a" / "1.png", size=(8, 8))
    assert load(f"folder:{tmp_path}", (3, 8, 8), 0, 0.0).scaled == "train/a/0.png was 12x6"
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"")
    assert load(f"folder:{tmp_path}", (3, 8, 8), 0, 0.0, skip_unreadable=True).scaled == "test/a/0.png was 12x6"
    save(tmp_path / "test" / "a" / "0.png", size=(8, 8))
    assert load(f"folder:{tmp_path}", (3, 8, 8), 0, 0.0, skip_unreadable=True).scaled == ""


def test_of_many_pictures_the_first_that_was_scaled_is_told(tmp_path):
    many = {f"{part}_x": np.zeros((600, 10, 10), np.uint8) for part in ("train", "test")}
    labels = {f"{part}_y": np.arange(600) % 2 for part in ("train", "test")}
    assert load(save_npz(tmp_path / "a.npz", **many, **labels), RGB, 0, 0.0).scaled == "train_x[0] was 10x10"


def test_large_jpegs_shrink_like_any_other_picture(tmp_path):
    # Stripes of 5 pixels, each a pixel of the result; at an eighth of its size the JPEG would have no more than 5.
    stripes = np.repeat(np.arange(8) % 2 * 200 + 20, 5).astype(np.uint8)
    image = Image.fromarray(np.stack([np.broadcast_to(stripes, (40, 40))] * 3, axis=2))
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    jpeg, png = (picture(tmp_path / name, (3, 8, 8)).astype(int) for name in ("a.jpg", "a.png"))
    assert np.abs(jpeg - png).max() < 30 and np.ptp(png) > 150


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must be turned by 90 degrees clockwise
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255  # above: white, which ends up right
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    Image.fromarray(pixels).save(tmp_path / "b.png", exif=exif)
    text = PngInfo()  # as ImageMagick writes it
    text.add_text("Raw profile type exif", f"\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n", zip=True)
    Image.fromarray(pixels).save(tmp_path / "c.png", pnginfo=text)
    text = PngInfo()  # as programs write it that keep their notes in XMP
    text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    Image.fromarray(pixels).save(tmp_path / "d.png", pnginfo=text)
    for name in ("a.jpg", "b.png", "c.png", "d.png"):
        found = picture(tmp_path / name, RGB)
        assert found[:, :, 5:].min() > 240 and found[:, :, :3].max() < 15, name
    for turn, size in ((4, (4, 8)), (5, (8, 4)), (6, (8, 4)), (9, (4, 8))):  # the last of which there is not
        exif[0x0112] = turn
        Image.fromarray(pixels[:, :4]).save(tmp_path / "a.jpg", exif=exif)
        assert size_of(tmp_path / "a.jpg") == load_picture(tmp_path / "a.jpg", RGB)[1] == size


def test_load_picture_names_the_file_and_the_reason(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    for name, reason in (("a.jpg", "empty file"), ("b.jpg", "not a picture"), ("c.jpg", "no such file")):
        with pytest.raises(DataError, match=rf"{name} cannot be read \({reason}.*another file"):
            picture(tmp_path / name, RGB)
    with pytest.raises(DataError, match="wants 4"):
        picture(tmp_path / "a.jpg", (4, 8, 8))


def test_eps_never_reaches_ghostscript(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="not a picture"):
        picture(tmp_path / "a.jpg", RGB)


def test_a_pipe_is_not_waited_for(tmp_path):
    """Nothing would ever come of it."""
    os.mkfifo(tmp_path / "a.png")
    found = []
    asking = threading.Thread(target=lambda: found.append(in_colour(tmp_path / "a.png")), daemon=True)
    asking.start()
    asking.join(10)
    assert found == [False]
