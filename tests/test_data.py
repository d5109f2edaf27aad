"""The digits, and image folders: which pictures are read, split and refused."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from device_client import arrays, data, folders, listing
from device_client.data import load, load_picture
from device_client.sources import check_source
from tests.pictures import COLOURS, GRAY, RGB, refused, save, save_npz


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, each of one colour: 10 training and 2 test pictures a class, of three sizes and two formats."""
    for part, count in (("train", 10), ("test", 2)):
        for name, colour in COLOURS.items():
            for i in range(count):
                save(tmp_path / part / name / f"{i}.{('jpg', 'PNG')[i % 2]}", colour, size=(8 + i % 3, 8))
    return tmp_path


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
    assert load("digits", GRAY, 1, 0).scaled == "" and "was 8x8" in load("digits", (3, 16, 24), 1, 0).scaled


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
    monkeypatch.setattr(folders, "_THREADS_FROM", threads_from)
    found = load(f"folder:{folder}", RGB, 1, 0)
    assert found.train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert found.train.pictures.mean((2, 3)).argmax(1).tolist() == found.train.labels.tolist()


def test_files_are_in_the_order_of_their_names(tmp_path):
    """Not in that of the disk: a run that goes on from a copy of the folder must find the same pictures."""
    for i in (7, 2, 9, 0, 5, 3, 8, 1, 6, 4):
        save(tmp_path / "test" / "a" / f"{i}.png", (20 * i,) * 3)
    found = load(f"folder:{tmp_path}", RGB, 1, 0, parts=("test",))
    assert found.test.pictures[:, 0, 0, 0].tolist() == [20 * i for i in range(10)]


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


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_does_not_wait_for_pictures_that_have_not_been_opened(threads: int) -> None:
    opened: list[int] = []

    def read(index: int) -> tuple[data.Pictures, tuple[int, int]]:
        opened.append(index)
        time.sleep(0.002)
        return np.zeros((1, 8, 8), np.uint8), (8, 8)

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    pictures = listing.Listing(np.zeros(5000, np.int64), read, str, threads)
    with pytest.raises(KeyboardInterrupt):
        data._read(pictures, np.arange(5000), GRAY, interrupt)
    assert len(opened) < 300 if threads == 1 else len(opened) < 100


def test_large_pictures_are_read_by_no_more_threads_than_there_is_memory_for(tmp_path, monkeypatch):
    """Each thread has a whole one in memory: eight of twelve megapixels would be most of a small board's."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400), dtype=np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(folders.os, "cpu_count", lambda: 8)
    found = []
    for pictures in (100, 3, 0):  # that a quarter of the free memory has room for
        free = 4 * pictures * 300 * 400 * folders._BYTES_A_PIXEL
        monkeypatch.setattr(folders.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        found.append(folders._threads([tmp_path / "a.png"]))
    assert found == [8, 3, 1]


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


def test_links_in_circles_and_pipes_are_named(folder):
    for name in ("circle.png", "pipe.png"):
        place = folder / "train" / sorted(path.name for path in (folder / "train").iterdir())[0] / name
        place.symlink_to(place) if name.startswith("circle") else os.mkfifo(place)
        with pytest.raises(DataError, match=rf"1 of .*{name} \("):
            load(f"folder:{folder}", (3, 8, 8), 0, 0.0)
        place.unlink()
    (folder / "train" / "round").symlink_to(folder / "train" / "round")
    load(f"folder:{folder}", (3, 8, 8), 0, 0.0)


def test_what_is_not_used_is_said(folder):
    found = load(f"folder:{folder}", RGB, 1, 0)
    assert found.left_out == ()
    ant = folder / "train" / "ant"
    (ant / "close-ups").mkdir()
    save(ant / "close-ups" / "0.jpg")
    (ant / "labels.txt").write_text("ant")
    (ant / ".DS_Store").write_text("")
    shutil.rmtree(folder / "test" / "bee")
    found = load(f"folder:{folder}", RGB, 1, 0)
    untested, unused = found.left_out
    assert untested == "no test pictures of 1 of 3 classes: bee"
    assert unused.endswith(": train/ant/close-ups/, train/ant/labels.txt")
    assert len(found.train) == 30 and set(found.test.labels.tolist()) == {0, 2}
    assert load(f"folder:{folder}", RGB, 1, 0, parts=("test",)).left_out == (untested,)


def test_another_number_of_classes_is_told_before_pictures_are_read(folder, monkeypatch):
    monkeypatch.setattr(data, "_read", lambda *_: pytest.fail("read"))
    with pytest.raises(DataError, match="has 3 classes and the recipe 10; use other data"):
        load(f"folder:{folder}", RGB, 1, 0, classes=10)


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

    monkeypatch.setattr(folders.os, "scandir", scandir)  # and not chmod, which does not stop root
    refused(r"train cannot be listed \(Permission denied\); check", f"folder:{folder}", RGB, 1, 0)


def test_a_home_is_known_behind_the_colon(folder, monkeypatch):
    """Where no shell puts it in."""
    monkeypatch.setenv("HOME", str(folder.parent))
    check_source(f"folder:~/{folder.name}")
    assert len(load(f"folder:~/{folder.name}", RGB, 1, 0, parts=("test",)).test) == 6
    with pytest.raises(DataError, match="there is no file"):
        check_source(f"npz:~/{folder.name}")
    for source in ("folder:~nobody-of-that-name/x", "npz:~nobody-of-that-name"):
        with pytest.raises(DataError, match="there is no .* ~nobody-of-that-name"):
            check_source(source)


@pytest.mark.parametrize("source", ["", "cifar", "digits:", "folder", "folder:", "npz:", "zip:a"])
def test_unknown_sources_are_refused(source):
    refused(f"^'{source}' is not a source of pictures; give digits, folder:PATH or npz:PATH$", source, RGB, 1, 0)


def test_impossible_requests_are_refused(folder):
    source = f"folder:{folder}"
    refused("the model wants 4", source, (4, 8, 8), 1, 0)
    refused("holding out 0.9 of 2 training pictures leaves none", source, RGB, 1, 0.9, limit=2)


def test_memory_is_checked_before_it_is_taken(folder, monkeypatch):
    source = f"folder:{folder}"
    needed = 36 * 3 * 8 * 8
    monkeypatch.setattr(listing.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * needed))
    load(source, RGB, 1, 0)
    monkeypatch.setattr(listing.psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * needed - 1))
    refused("36 pictures of 3x8x8 need 0.0 GB .* pass --limit", source, RGB, 1, 0)
    load(source, RGB, 1, 0, limit=29)
    monkeypatch.setattr(listing.psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    monkeypatch.setattr(data, "_read", lambda *_: pytest.fail("allocated before the check"))
    refused(
        "36 pictures of 3x20000x20000 need 43.2 GB .* 8.0 GB are free.*smaller input", source, (3, 20000, 20000), 1, 0
    )


def test_numbers_take_four_times_the_memory_of_pixels(tmp_path, monkeypatch):
    made = {f"{part}_x": np.zeros((6, 3, 8, 8), np.float32) for part in ("train", "test")}
    source = save_npz(tmp_path / "a.npz", **made, train_y=np.arange(6) % 3)
    monkeypatch.setattr(arrays, "check_memory", lambda *_: None)  # of the file's own
    whole = 4 * 12 * 3 * 8 * 8
    for available, fits in ((2 * whole, True), (2 * whole - 1, False)):
        monkeypatch.setattr(listing.psutil, "virtual_memory", lambda free=available: SimpleNamespace(available=free))
        if fits:
            load(source, RGB, 1, 0)
        else:
            refused("12 pictures of 3x8x8 need", source, RGB, 1, 0)


def test_a_test_folder_may_lack_some_of_the_runs_classes(folder):
    shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "test" / "ant")
    found = load(f"folder:{folder}", RGB, 1, 0, parts=("test",), classes=3, known=("ant", "bee", "cat"))
    assert found.classes == ("ant", "bee", "cat") and sorted(set(found.test.labels)) == [1, 2]
    assert "no test pictures of 1 of 3 classes: ant" in found.left_out[0]
    with pytest.raises(DataError, match="classes that the run does not have: cat; it has ant, bee, dog: rename"):
        load(f"folder:{folder}", RGB, 1, 0, parts=("test",), classes=3, known=("ant", "bee", "dog"))


@pytest.mark.parametrize(
    ("name", "fits"), [("\u0645\u200c\u0647", True), ("a\u00a0b\u3000c", True), ("a\u202eb", False)]
)
def test_class_names_may_have_what_scripts_have(folder, name, fits):
    """And nothing that turns a terminal's line around: before a head learns alone for hours, not after it."""
    for part in ("train", "test"):
        (folder / part / "cat").rename(folder / part / name)
    if fits:
        assert name in load(f"folder:{folder}", RGB, 1, 0).classes
    else:
        refused("a character that no terminal shows: rename it", f"folder:{folder}", RGB, 1, 0)


def test_colours_that_a_model_does_not_see_are_told(folder, tmp_path):
    assert "colours are not seen" in load(f"folder:{folder}", GRAY, 1, 0).left_out[0]
    for path in (folder / "train").glob("*/*.*"):
        Image.open(path).convert("L").save(path)
    for path in (folder / "test").glob("*/*.*"):
        Image.open(path).convert("L").save(path)
    assert load(f"folder:{folder}", GRAY, 1, 0).left_out == ()


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_colours_in_arrays_are_told_too(tmp_path, channels):
    pictures, labels = np.zeros((4, 16, 16, *channels), np.uint8), np.arange(4) % 2
    np.savez(tmp_path / "some.npz", train_x=pictures, train_y=labels, test_x=pictures, test_y=labels)
    told = load(f"npz:{tmp_path / 'some.npz'}", GRAY, 1, 0).left_out
    assert bool(told) == (channels == (3,)) and all("colours are not seen" in sentence for sentence in told)


def test_classes_without_a_picture_to_learn_from_are_told(folder):
    found = load(f"folder:{folder}", RGB, 1, 0, limit=1)
    assert re.fullmatch("no training pictures of 2 of 3 classes: [a-z]{3}, [a-z]{3}", found.left_out[0])
    assert load(f"folder:{folder}", RGB, 1, 0).left_out == ()


def test_a_class_that_cannot_be_sent_is_named(folder):
    (folder / "train" / "cat").rename(folder / "train" / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match=r"names are not UTF-8 \(caf\?\); rename"):
        load(f"folder:{folder}", RGB, 1, 0)
