"""Arrays in an .npz file: layouts, labels, and what is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from device_client.data import load
from tests.pictures import GRAY, RGB, arrays, refused, save_npz


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
    both = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 3), dtype=np.uint8)
    source = save_npz(tmp_path / "a.npz", train_x=both)
    refused("train_x .* does not show where", source, RGB, 1, 0, parts=("train",))
    np.testing.assert_array_equal(load(source, (3, 8, 3), 1, 0, parts=("train",)).train.pictures, both)
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


def test_pictures_beside_numbers_are_refused(tmp_path):
    """The ones are divided by 255, the others taken as they are: a test part so judged would say nothing."""
    numbers = arrays()["test_x"].transpose(0, 3, 1, 2).astype(np.float32)
    message = "has train_x in uint8 and test_x in float32: save both as pictures in uint8, or both as numbers"
    refused(message, save_npz(tmp_path / "mixed.npz", test_x=numbers), RGB, 1, 0)


def test_pickles_and_broken_files_are_refused(tmp_path):
    refused(
        "classes in .*a.npz holds Python objects",
        save_npz(tmp_path / "a.npz", classes=np.array([print], dtype=object)),
        RGB,
        1,
        0,
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


def test_a_test_part_alone_may_lack_some_of_the_runs_classes(tmp_path):
    """Its labels are the run's numbers, whether the last of them occurs or one in the middle does not."""
    known = ("a", "b", "c", "d")
    source = str(tmp_path / "a.npz")
    for labels in ([0, 1, 2], [0, 2, 3]):
        np.savez(tmp_path / "a.npz", test_x=np.zeros((3, 8, 8), np.uint8), test_y=np.array(labels))
        found = load(f"npz:{source}", GRAY, 1, 0, parts=("test",), classes=4, known=known)
        assert found.classes == known and found.test.labels.tolist() == labels
    np.savez(tmp_path / "a.npz", test_x=np.zeros((1, 8, 8), np.uint8), test_y=np.array([4]))
    wrong = "label 4 in test_y and only 4 classes"
    refused(wrong, f"npz:{source}", GRAY, 1, 0, parts=("test",), classes=4, known=known)
