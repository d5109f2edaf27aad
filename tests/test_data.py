"""Sources, their errors, and the order and augmentation of batches, on pictures written by Pillow and numpy."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.errors import DataError
from device_client import data, sources
from device_client.batches import augment, indices, normalise, order, steps_per_epoch
from device_client.data import load, load_picture

RGB, GRAY = (3, 8, 8), (1, 8, 8)
COLOURS = {"ant": (200, 10, 10), "bee": (10, 200, 10), "cat": (10, 10, 200)}


def save(path: Path, colour=(120, 60, 30), size=(8, 8), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, each of one colour: 10 training and 2 test pictures a class, of three sizes and two formats."""
    for part, count in (("train", 10), ("test", 2)):
        for name, colour in COLOURS.items():
            for i in range(count):
                save(tmp_path / part / name / f"{i}.{('jpg', 'PNG')[i % 2]}", colour, size=(8 + i % 3, 8))
    return tmp_path


def arrays(**changes) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    found = {
        "train_x": random.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8),
        "train_y": np.arange(12) % 3,
        "test_x": random.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8),
        "test_y": np.arange(6) % 3,
    } | changes
    return {key: value for key, value in found.items() if value is not None}


def save_npz(path: Path, **changes) -> str:
    np.savez(path, **arrays(**changes))
    return f"npz:{path}"


def refused(pattern: str, *args, **options) -> None:
    with pytest.raises(DataError, match=pattern):
        load(*args, **options)


# --- digits ---


def test_digits_are_split_once_and_for_all():
    one, other = load("digits", GRAY, 1, 0.1), load("digits", GRAY, 2, 0.1)
    assert one.classes == tuple("0123456789")
    assert (len(one.train), len(one.validation), len(one.test)) == (1294, 144, 359)
    assert one.train.pictures.shape == (1294, 1, 8, 8) and one.train.pictures.dtype == np.uint8
    assert one.train.labels.dtype == np.int64
    assert one.train.pictures.max() == 255 and one.train.pictures.min() == 0
    np.testing.assert_array_equal(one.test.pictures, other.test.pictures)
    assert not np.array_equal(one.validation.labels, other.validation.labels)
    assert 33 <= np.bincount(one.test.labels).min() <= np.bincount(one.test.labels).max() <= 38
    fingerprint = hashlib.sha256(one.test.labels.tobytes() + one.test.pictures.tobytes()).hexdigest()
    assert fingerprint.startswith("6fe0ee3fd3e99c67")


def test_digits_at_another_size_and_in_colour():
    small, large = (load("digits", shape, 1, 0, parts=("test",)).test for shape in (GRAY, (3, 16, 24)))
    assert large.pictures.shape == (359, 3, 16, 24)
    np.testing.assert_array_equal(large.pictures[:, 0], large.pictures[:, 2])
    np.testing.assert_array_equal(small.labels, large.labels)
    assert np.abs(large.pictures.mean((1, 2, 3)) - small.pictures.mean((1, 2, 3))).max() < 12


# --- folders ---


def test_folder_reads_every_picture_with_its_label(folder):
    found = load(f"folder:{folder}", RGB, 1, 0.2)
    assert found.classes == ("ant", "bee", "cat") and found.skipped == ()
    assert (len(found.train), len(found.validation), len(found.test)) == (24, 6, 6)
    for part in (found.train, found.validation, found.test):
        assert part.pictures.shape == (len(part), 3, 8, 8) and part.pictures.dtype == np.uint8
        means = part.pictures.mean((2, 3))
        expected = np.array([COLOURS[found.classes[label]] for label in part.labels])
        assert np.abs(means - expected).max() < 4


@pytest.mark.parametrize("threads_from", [0, 10**9])
def test_order_does_not_depend_on_threads(folder, monkeypatch, threads_from):
    monkeypatch.setattr(data, "_CHUNK", 3)
    monkeypatch.setattr(sources, "_THREADS_FROM", threads_from)
    found = load(f"folder:{folder}", RGB, 1, 0)
    assert found.train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert found.train.pictures.mean((2, 3)).argmax(1).tolist() == found.train.labels.tolist()


def test_train_and_validation_are_disjoint_and_follow_the_seed(tmp_path):
    # Picture i has the value i, so that what was read says which picture it is.
    values = np.arange(100, dtype=np.uint8)
    source = save_npz(
        tmp_path / "a.npz", train_x=np.broadcast_to(values[:, None, None], (100, 8, 8)), train_y=values // 10 % 3
    )

    def ids(part):
        return part.pictures[:, 0, 0, 0].tolist()

    first, again, other = (load(source, GRAY, seed, 0.3) for seed in (1, 1, 2))
    assert sorted(ids(first.train) + ids(first.validation)) == list(range(100))
    assert len(first.validation) == 30
    assert ids(first.validation) == ids(again.validation) != ids(other.validation)
    assert first.train.labels.tolist() == [i // 10 % 3 for i in ids(first.train)]

    limited = load(source, GRAY, 1, 0.3, limit=20)
    assert len(limited.train) == 14 and len(limited.validation) == 6 and len(limited.test) == 6
    assert len(set(ids(limited.train) + ids(limited.validation))) == 20
    assert set(limited.train.labels) == {0, 1, 2}
    alone = load(source, GRAY, 1, 0.3, parts=("validation",))
    assert ids(alone.validation) == ids(first.validation) and len(alone.train) == len(alone.test) == 0
    assert len(load(source, GRAY, 1, 0.3, parts=("train",)).validation) == 0
    assert len(load(source, GRAY, 1, 0).validation) == 0
    assert len(load(source, GRAY, 1, 0.001).validation) == 1


def test_evaluating_leaves_the_training_pictures_alone(folder):
    for path in (folder / "train").rglob("*.*"):
        path.write_bytes(b"")
    found = load(f"folder:{folder}", RGB, 1, 0.1, parts=("test",))
    assert len(found.test) == 6 and len(found.train) == len(found.validation) == 0
    assert found.train.pictures.shape == (0, 3, 8, 8)
    # The numbers of the classes are train's, even where test has fewer.
    for path in (folder / "test" / "ant").iterdir():
        path.unlink()
    (folder / "test" / "ant").rmdir()
    assert set(load(f"folder:{folder}", RGB, 1, 0.1, parts=("test",)).test.labels) == {1, 2}
    # Where there is no train, test's own classes are all there is to go by.
    (folder / "train").rename(folder / "elsewhere")
    assert load(f"folder:{folder}", RGB, 1, 0.1, parts=("test",)).classes == ("bee", "cat")


def test_training_does_not_need_the_test_folder(folder):
    (folder / "test").rename(folder / "elsewhere")
    assert len(load(f"folder:{folder}", RGB, 1, 0.2, parts=("train", "validation")).train) == 24


def test_hidden_and_other_files_are_ignored(folder):
    for name in (".DS_Store", "._0.jpg", "Thumbs.db", "notes.txt", "paper.pdf", "figure.eps"):
        (folder / "train" / "ant" / name).write_bytes(b"no picture")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "ant" / "deeper.jpg").mkdir()
    found = load(f"folder:{folder}", RGB, 1, 0)
    assert len(found.train) == 30 and len(found.classes) == 3


def test_progress_counts_all_parts_up(folder, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 4)
    calls: list[tuple[int, int]] = []
    load(f"folder:{folder}", RGB, 1, 0.2, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[0] == (4, 36) and calls[-1] == (36, 36)


# --- one picture ---


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
        found = load_picture(path, shape)
        assert found.shape == shape and found.dtype == np.uint8
        assert np.abs(found.mean((1, 2)) - expected).max() < 12  # GIF and P have a coarse palette


def test_transparent_palettes_do_not_warn(tmp_path, recwarn):
    image = Image.new("P", (8, 8))
    image.putpalette([9, 9, 9, 90, 120, 150])
    image.paste(1, (0, 0, 8, 8))
    image.save(tmp_path / "a.png", transparency=b"\x80\x40")
    assert load_picture(tmp_path / "a.png", RGB)[:, 0, 0].tolist() == [90, 120, 150]
    assert not recwarn.list


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 0x8040, dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.unique(load_picture(tmp_path / "a.png", GRAY)).tolist() == [0x80]
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="32-bit pixels"):
        load_picture(tmp_path / "a.tif", GRAY)


def test_resizing_averages_and_keeps_orientation(tmp_path):
    # A fine checkerboard on the left, white on the right: a filter without antialiasing would give 0 or 255.
    pixels = np.full((64, 64), 255, dtype=np.uint8)
    pixels[:, :32] = np.indices((64, 32)).sum(0) % 2 * 255
    for name in ("a.png", "a.jpg"):
        Image.fromarray(pixels).save(tmp_path / name, quality=95)
        found = load_picture(tmp_path / name, GRAY)[0].astype(int)
        assert np.abs(found[:, :3] - 127).max() < 8 and found[:, 5:].min() > 247


def test_scaling_is_told_with_the_first_picture_that_can_be_read(tmp_path):
    for part in ("train", "test"):
        save(tmp_path / part / "a" / "0.png", size=(12, 6))
        save(tmp_path / part / "a" / "1.png", size=(8, 8))
    assert load(f"folder:{tmp_path}", (3, 8, 8), 0, 0.0).scaled == "train/a/0.png was 12x6"
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"")
    assert load(f"folder:{tmp_path}", (3, 8, 8), 0, 0.0, skip_unreadable=True).scaled == ""


def test_large_jpegs_shrink_like_any_other_picture(tmp_path):
    # Stripes of 5 pixels, each a pixel of the result; at an eighth of its size the JPEG would have no more than 5.
    stripes = np.repeat(np.arange(8) % 2 * 200 + 20, 5).astype(np.uint8)
    image = Image.fromarray(np.stack([np.broadcast_to(stripes, (40, 40))] * 3, axis=2))
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    jpeg, png = (load_picture(tmp_path / name, (3, 8, 8)).astype(int) for name in ("a.jpg", "a.png"))
    assert np.abs(jpeg - png).max() < 30 and np.ptp(png) > 150


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must be turned by 90 degrees clockwise
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255  # above: white, which ends up right
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = load_picture(tmp_path / "a.jpg", RGB)
    assert found[:, :, 5:].min() > 240 and found[:, :, :3].max() < 15


def test_load_picture_names_the_file_and_the_reason(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    for name, reason in (("a.jpg", "empty file"), ("b.jpg", "not a picture"), ("c.jpg", "no such file")):
        with pytest.raises(DataError, match=rf"{name} cannot be read \({reason}.*another file"):
            load_picture(tmp_path / name, RGB)
    with pytest.raises(DataError, match="wants 4"):
        load_picture(tmp_path / "a.jpg", (4, 8, 8))


def test_eps_never_reaches_ghostscript(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="not a picture"):
        load_picture(tmp_path / "a.jpg", RGB)


# --- pictures that cannot be read ---


def spoil(folder: Path) -> None:
    (folder / "train" / "ant" / "0.jpg").write_bytes(b"")
    (folder / "train" / "bee" / "1.PNG").write_bytes(b"not a picture at all")
    whole = save(folder / "big.jpg", size=(64, 64)).read_bytes()
    (folder / "test" / "cat" / "0.jpg").write_bytes(whole[: len(whole) // 2])


def test_unreadable_pictures_are_named_and_counted(folder):
    spoil(folder)
    refused(
        rf"^3 of 36 pictures under {re.escape(str(folder))} cannot be read: train/ant/0.jpg \(empty file\),"
        r" train/bee/1.PNG \(not a picture\), test/cat/0.jpg \(.*[Tt]runcated.*\);"
        r" delete them or pass --skip-unreadable$",
        f"folder:{folder}",
        RGB,
        1,
        0,
    )


def test_only_five_are_named(folder):
    for path in (folder / "train" / "ant").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="^10 of 36 .* and 5 more; delete") as raised:
        load(f"folder:{folder}", RGB, 1, 0)
    assert str(raised.value).count("empty file") == 5


def test_unreadable_pictures_can_be_skipped(folder):
    spoil(folder)
    found = load(f"folder:{folder}", RGB, 1, 0, skip_unreadable=True)
    assert [name.split(" ")[0] for name in found.skipped] == ["train/ant/0.jpg", "train/bee/1.PNG", "test/cat/0.jpg"]
    assert np.bincount(found.train.labels).tolist() == [9, 9, 10]
    assert np.bincount(found.test.labels).tolist() == [2, 2, 1]
    assert found.train.pictures.mean((2, 3)).argmax(1).tolist() == found.train.labels.tolist()


def test_skipping_does_not_skip_everything(folder):
    for path in (folder / "test").rglob("*.*"):
        path.write_bytes(b"")
    refused("none of the 6 test pictures", f"folder:{folder}", RGB, 1, 0, skip_unreadable=True)


def test_decompression_bombs_are_refused_without_unpacking(folder, monkeypatch):
    save(folder / "train" / "ant" / "bomb.png", size=(100, 80))
    for limit in (5000, 1000):  # over the limit Pillow warns, over twice the limit it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refused(rf"1 of 37 .*bomb.png \(more than {limit:,} pixels\)", f"folder:{folder}", RGB, 1, 0)
        with pytest.raises(DataError, match=f"more than {limit:,} pixels"):
            load_picture(folder / "train" / "ant" / "bomb.png", RGB)


def test_a_dangling_link_is_not_passed_over(folder):
    (folder / "train" / "ant" / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    refused(r"1 of 37 .*gone.jpg \(no such file", f"folder:{folder}", RGB, 1, 0)


# --- folders that are not as they should be ---


def test_malformed_folders_are_refused(folder):
    source = f"folder:{folder}"
    refused("there is no folder .*nowhere; give one that has train/CLASS", f"folder:{folder}/nowhere", RGB, 1, 0)
    (folder / "test" / "dog").mkdir()
    refused("test has classes that .*train does not have: dog; rename", source, RGB, 1, 0)
    (folder / "train" / "dog").mkdir()
    refused("train/dog has no pictures; add some", source, RGB, 1, 0)
    save(folder / "train" / "dog" / "0.jpg")
    refused("test/dog has no pictures", source, RGB, 1, 0)
    (folder / "test").rename(folder / "elsewhere")
    refused("there is no folder .*test; make it", source, RGB, 1, 0)
    (folder / "train").rename(folder / "test")
    refused("there is no folder .*train; make it", source, RGB, 1, 0)
    (folder / "train").mkdir()
    save(folder / "train" / "loose.jpg")
    refused("train has no classes; put", source, RGB, 1, 0)


def test_folders_that_cannot_be_listed_are_refused(folder, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources.os, "scandir", scandir)  # and not chmod, which does not stop root
    refused(r"train cannot be listed \(Permission denied\); check", f"folder:{folder}", RGB, 1, 0)


@pytest.mark.parametrize("source", ["", "cifar", "digits:", "folder", "folder:", "npz:", "zip:a"])
def test_unknown_sources_are_refused(source):
    refused(f"^'{source}' is not a source of pictures; give digits, folder:PATH or npz:PATH$", source, RGB, 1, 0)


def test_impossible_requests_are_refused(folder):
    source = f"folder:{folder}"
    refused("the model wants 4", source, (4, 8, 8), 1, 0)
    refused("not 1", source, RGB, 1, 1.0)
    refused("not -0.1", source, RGB, 1, -0.1)
    refused("not nan", source, RGB, 1, float("nan"))
    refused("limit of 0", source, RGB, 1, 0, limit=0)
    refused("holding out 0.9 of 2 training pictures leaves none", source, RGB, 1, 0.9, limit=2)


def test_memory_is_checked_before_it_is_taken(folder, monkeypatch):
    source = f"folder:{folder}"
    needed = 36 * 3 * 8 * 8
    monkeypatch.setattr(sources.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * needed))
    load(source, RGB, 1, 0)
    monkeypatch.setattr(sources.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * needed - 1))
    refused("36 pictures of 3x8x8 need 0.0 GB .* pass --limit", source, RGB, 1, 0)
    load(source, RGB, 1, 0, limit=29)
    monkeypatch.setattr(sources.psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    monkeypatch.setattr(data, "_read", lambda *_: pytest.fail("allocated before the check"))
    refused(
        "36 pictures of 3x20000x20000 need 43.2 GB .* 8.0 GB are free.*smaller input", source, (3, 20000, 20000), 1, 0
    )


# --- npz ---


def test_npz_layouts_agree(tmp_path):
    colour = load(save_npz(tmp_path / "last.npz"), RGB, 1, 0)
    expected = arrays()
    np.testing.assert_array_equal(colour.train.pictures, expected["train_x"].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(colour.test.labels, expected["test_y"])
    assert colour.classes == ("0", "1", "2") and colour.test.labels.dtype == np.int64
    channels_first = {key: expected[key].transpose(0, 3, 1, 2) for key in ("train_x", "test_x")}
    np.testing.assert_array_equal(
        load(save_npz(tmp_path / "first.npz", **channels_first), RGB, 1, 0).train.pictures, colour.train.pictures
    )
    flat = {key: expected[key][..., 0] for key in ("train_x", "test_x")}
    gray = load(save_npz(tmp_path / "flat.npz", **flat), GRAY, 1, 0)
    np.testing.assert_array_equal(gray.train.pictures[:, 0], flat["train_x"])
    with_axis = {key: value[..., None] for key, value in flat.items()}
    np.testing.assert_array_equal(
        load(save_npz(tmp_path / "axis.npz", **with_axis), GRAY, 1, 0).train.pictures, gray.train.pictures
    )
    repeated = load(save_npz(tmp_path / "flat.npz", **flat), RGB, 1, 0).train.pictures
    np.testing.assert_array_equal(repeated[:, 1], flat["train_x"])


def test_npz_is_resized_and_named(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8), (12, 32, 32))
    source = save_npz(tmp_path / "a.npz", train_x=ramp, classes=np.array(["x", "y", "z", "unused"]))
    found = load(source, (1, 8, 16), 1, 0)
    assert found.train.pictures.shape == (12, 1, 8, 16) and found.classes == ("x", "y", "z", "unused")
    assert (np.diff(found.train.pictures[0, 0].astype(int), axis=1) > 0).all()


def test_npz_whose_layout_is_unclear(tmp_path):
    both = np.zeros((12, 3, 8, 3), dtype=np.uint8)
    source = save_npz(tmp_path / "a.npz", train_x=both)
    refused("train_x .* does not show where", source, RGB, 1, 0, parts=("train",))
    assert load(source, (3, 8, 3), 1, 0, parts=("train",)).train.pictures.shape == (12, 3, 8, 3)
    neither = save_npz(tmp_path / "b.npz", train_x=np.zeros((12, 8, 8, 4), dtype=np.uint8))
    refused("does not show where", neither, RGB, 1, 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_x": np.zeros((12, 8, 8))}, r"train_x .* is float64 of shape \[12, 8, 8\]; save pictures as uint8"),
        ({"train_x": np.zeros((12, 64), dtype=np.uint8)}, r"train_x .* shape \[12, 64\]"),
        ({"test_x": np.zeros((6, 0, 8), dtype=np.uint8)}, "test pictures have shape .* without a pixel"),
        ({"train_x": None}, "no array train_x; save"),
        ({"test_x": None, "test_y": None}, "no array test_x or test_y"),
        ({"train_y": np.arange(11) % 3}, "12 pictures in train_x and 11 labels in train_y"),
        ({"train_x": np.zeros((0, 8, 8), dtype=np.uint8), "train_y": np.arange(0)}, "0 pictures in train_x and 0"),
        ({"train_y": np.arange(12) % 3 / 1}, "train_y .* is float64"),
        ({"train_y": np.arange(12)[:, None] % 3}, r"train_y .* shape \[12, 1\]"),
        ({"train_y": np.arange(12) % 3 - 1}, "train_y .* below 0"),
        ({"train_y": np.arange(12) % 3 * 10**9}, "go up to 2000000000, but only 3 different"),
        ({"test_y": np.arange(6)}, "label 5 in test_y and only 3 classes"),
        ({"classes": np.array(["a", "b"])}, "label 2 in train_y and only 2 classes"),
        ({"classes": np.array(["a", "b", "b"])}, "classes in .* not a list of different names"),
        ({"classes": np.array([1, 2, 3])}, "classes in .* not a list of different names"),
    ],
)
def test_malformed_npz_files_are_refused(tmp_path, changes, message):
    refused(message, save_npz(tmp_path / "a.npz", **changes), RGB, 1, 0)


def test_pickles_and_broken_files_are_refused(tmp_path):
    refused(
        "cannot be read as a numpy", save_npz(tmp_path / "a.npz", classes=np.array([print], dtype=object)), RGB, 1, 0
    )
    whole = Path(save_npz(tmp_path / "b.npz")[4:]).read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[:-300])
    refused("b.npz cannot be read as a numpy .npz file", f"npz:{tmp_path}/b.npz", RGB, 1, 0)
    (tmp_path / "c.npz").write_bytes(b"")
    refused("c.npz cannot be read as a numpy .npz file", f"npz:{tmp_path}/c.npz", RGB, 1, 0)
    refused("there is no file .*d.npz", f"npz:{tmp_path}/d.npz", RGB, 1, 0)


def test_an_npz_that_unpacks_to_terabytes_is_refused_from_its_header(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64)})
    with zipfile.ZipFile(save_npz(tmp_path / "a.npz", test_x=None)[4:], "a") as archive:
        archive.writestr("test_x.npy", header.getvalue())
    refused("the arrays in .* need 4096.0 GB", f"npz:{tmp_path}/a.npz", RGB, 1, 0)


def test_npz_labels_keep_their_meaning_in_an_evaluation(tmp_path):
    source = save_npz(tmp_path / "a.npz", test_y=np.ones(6, dtype=np.uint8))
    found = load(source, RGB, 1, 0, parts=("test",))
    assert found.classes == ("0", "1", "2") and found.test.labels.tolist() == [1] * 6
    alone = save_npz(tmp_path / "b.npz", train_x=None, train_y=None)
    assert len(load(alone, RGB, 1, 0, parts=("test",)).test) == 6


# --- batches ---


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(1, 200), st.data())
def test_every_epoch_visits_distinct_pictures(seed, epoch, samples, draw):
    batch = draw.draw(st.integers(1, samples))
    steps = steps_per_epoch(samples, batch)
    assert steps == samples // batch
    seen = np.concatenate([indices(seed, epoch * steps + i, samples, batch) for i in range(steps)])
    assert len(seen) == steps * batch == len(set(seen.tolist()))
    assert seen.min() >= 0 and seen.max() < samples
    assert sorted(order(seed, epoch, samples).tolist()) == list(range(samples))


def test_epochs_and_seeds_differ():
    orders = [order(seed, epoch, 50).tolist() for seed in range(5) for epoch in range(5)]
    assert len({tuple(o) for o in orders}) == 25
    assert indices(1, 5, 50, 10).tolist() == order(1, 1, 50)[:10].tolist()


def test_a_caller_cannot_spoil_the_cached_order():
    before = indices(3, 0, 20, 5)
    indices(3, 0, 20, 5)[:] = 0
    np.testing.assert_array_equal(indices(3, 0, 20, 5), before)
    with pytest.raises(ValueError, match="read-only"):
        order(3, 0, 20)[0] = 1


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="batch of 65 pictures is larger than the 64 training pictures; choose"):
        indices(1, 0, 64, 65)
    with pytest.raises(DataError, match="batch of 0"):
        steps_per_epoch(64, 0)


FINGERPRINT = """
import hashlib, numpy as np
from device_client.batches import augment, indices
pictures = np.arange(64 * 3 * 8 * 8, dtype=np.uint32).astype(np.uint8).reshape(64, 3, 8, 8)
found = hashlib.sha256()
for step in (0, 7, 10**6, 3):
    found.update(augment(pictures[indices(5, step, 64, 16)], 5, step, 2, True).tobytes())
print(found.hexdigest())
"""


def test_the_same_step_is_the_same_batch_in_another_process():
    root = Path(__file__).parent.parent
    found = [
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": str(i)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for i in (1, 2)
    ]
    # Stored, so that a run from an earlier version replays the same too.
    assert found == ["6f59864cf7352a1f8c56fbe386fd3abab4e619ad3ee627e494395ea36c322d9d"] * 2


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 10**9), st.integers(1, 3), st.integers(4, 9), st.integers(4, 9), st.data())
def test_augmented_pictures_are_windows_of_the_reflected_originals(seed, step, channels, height, width, draw):
    crop, flip = draw.draw(st.integers(0, 3)), draw.draw(st.booleans())
    pictures = np.random.default_rng(seed).integers(0, 256, (5, channels, height, width), dtype=np.uint8)
    before = pictures.copy()
    found = augment(pictures, seed, step, crop, flip)
    assert found.shape == pictures.shape and found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(pictures, before)
    # The reflection in other words than numpy's: pixel -1 is pixel 1, pixel H is pixel H - 2.
    rows, columns = ([size - 1 - abs(size - 1 - abs(i)) for i in range(-crop, size + crop)] for size in (height, width))
    for picture, original in zip(found, pictures, strict=True):
        padded = original[:, rows][:, :, columns]
        windows = [padded[:, y : y + height, x : x + width] for y in range(2 * crop + 1) for x in range(2 * crop + 1)]
        assert any(
            np.array_equal(picture, window) or (flip and np.array_equal(picture, window[:, :, ::-1]))
            for window in windows
        )


def test_every_shift_and_flip_occurs_equally_often():
    # Each pixel has its own value, so the corner and its neighbour tell the shift and the flip.
    picture = np.arange(100, dtype=np.uint8).reshape(1, 1, 10, 10)
    found = augment(np.repeat(picture, 9000, axis=0), 1, 2, 1, True)[:, 0]
    flipped = found[:, 5, 5] > found[:, 5, 6]
    upright = np.where(flipped[:, None, None], found[:, :, ::-1], found)
    shifts = upright[:, 5, 5].astype(int) - 55
    values, counts = np.unique(shifts, return_counts=True)
    assert values.tolist() == [-11, -10, -9, -1, 0, 1, 9, 10, 11]
    assert counts.min() > 850 and counts.max() < 1150
    assert 4300 < flipped.sum() < 4700
    # A flip says nothing about the shift.
    assert 0.4 < flipped[shifts == 0].mean() < 0.6


def test_augmentation_depends_on_seed_and_step_and_on_nothing_else():
    pictures = np.random.default_rng(0).integers(0, 256, (32, 3, 8, 8), dtype=np.uint8)
    found = [augment(pictures, seed, step, 2, True) for seed in (1, 2) for step in (0, 1, 2)]
    assert len({batch.tobytes() for batch in found}) == 6
    np.random.seed(0)
    np.testing.assert_array_equal(augment(pictures, 1, 0, 2, True), found[0])
    np.testing.assert_array_equal(augment(pictures, 1, 0, 0, False), pictures)
    view = pictures.transpose(0, 1, 3, 2)  # not contiguous
    np.testing.assert_array_equal(augment(view, 1, 0, 2, True), augment(view.copy(), 1, 0, 2, True))
    assert augment(view, 1, 0, 2, True).flags.c_contiguous


@pytest.mark.parametrize("crop", [-1, 8])
def test_crops_that_leave_nothing_to_reflect_are_refused(crop):
    with pytest.raises(DataError, match=f"crop of {crop} pixels does not fit pictures of 8x9; choose 0 to 7"):
        augment(np.zeros((1, 1, 8, 9), dtype=np.uint8), 1, 0, crop, False)


@pytest.mark.parametrize("mean, std", [((0.5,), (0.25,)), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ((0,), (1, 2, 3))])
def test_normalise_is_the_formula(mean, std):
    pictures = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3).transpose(0, 3, 1, 2) * 2
    found = normalise(pictures, mean, std)
    expected = (pictures / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_normalise_refuses_what_does_not_fit():
    pictures = np.zeros((1, 3, 2, 2), dtype=np.uint8)
    with pytest.raises(DataError, match="mean has 2 values for pictures of 3 channels; give 1 or 3"):
        normalise(pictures, (0, 0), (1,))
    with pytest.raises(DataError, match="std has 4 values"):
        normalise(pictures, (0,), (1, 1, 1, 1))
    with pytest.raises(DataError, match="every std must be above 0"):
        normalise(pictures, (0,), (0,))
