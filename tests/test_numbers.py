"""Numbers in place of pictures: arrays of float as they are, from .npz to a trained network's answer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import pair
from benchmarks.recipes import recipe_text
from common import recipe
from common.errors import DataError
from device_client.batches import augment, normalise, together
from device_client.data import load, load_picture
from device_client.remarks import remarks
from tests.conftest import train
from tests.pictures import arrays, refused, save_npz

SHAPE = (2, 6, 10)  # channels of another number than pictures have


def numbers(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(5, 3, (count, *SHAPE)).astype(np.float32)


def save_numbers(path: Path, **changes: np.ndarray) -> str:
    return save_npz(path, **{"train_x": numbers(12), "test_x": numbers(6, 1)} | changes)


def test_numbers_are_read_as_they_are(tmp_path: Path) -> None:
    found = load(save_numbers(tmp_path / "a.npz"), SHAPE, 1, 0)
    for part, expected in ((found.train, numbers(12)), (found.test, numbers(6, 1))):
        assert part.pictures.dtype == np.float32 and part.pictures.tobytes() == expected.tobytes()
    assert found.scaled == "" and found.train.labels.tolist() == [0, 1, 2] * 4
    wide = load(save_numbers(tmp_path / "b.npz", train_x=numbers(12).astype(np.float64)), SHAPE, 1, 0)
    assert wide.train.pictures.tobytes() == numbers(12).tobytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"train_x": numbers(12)[:, :, :5]},
            r"train_x in .* rows of shape \[2, 5, 10\]; .* \[2, 6, 10\], which is the",
        ),
        ({"train_x": numbers(12)[:, 0]}, r"train_x .* is float32 of shape \[12, 6, 10\]; save pictures as uint8"),
        ({"test_x": numbers(6).astype(np.int16)}, "test_x .* is int16 .* other numbers as float32"),
        (
            {"test_x": np.full((6, *SHAPE), 1e39)},
            "test_x .* has 6 of 6 rows with NaN, .* beyond 1e.18",
        ),
        # What maps and simulations have for "nothing here": found now, and not after the last step.
        (
            {"test_x": np.where(np.arange(6)[:, None, None, None] == 4, np.finfo(np.float32).min, numbers(6))},
            "test_x .* 1 of 6 rows .* the first at 4",
        ),
        (
            {"train_x": np.where(np.arange(12)[:, None, None, None] == 7, np.float32(np.nan), numbers(12))},
            "train_x .* 1 of 12 rows with NaN, .* the first at 7",
        ),
        (
            {name: arrays()[name] for name in ("train_x", "test_x")},
            "pictures have 1 or 3 channels and the model wants 2",
        ),
    ],
)
def test_numbers_that_the_model_cannot_take_are_refused(changes, message, tmp_path: Path) -> None:
    refused(message, save_numbers(tmp_path / "a.npz", **changes), SHAPE, 1, 0)


def test_pixels_are_the_numbers_from_0_to_1() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 6, 10), dtype=np.uint8)
    same = pixels / np.float32(255)
    settings = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    assert np.allclose(normalise(pixels, *settings), normalise(same, *settings), atol=1e-6)
    moved = augment(same, 1, 2, 2, True)
    assert moved.dtype == np.float32 and np.array_equal(moved, augment(pixels, 1, 2, 2, True) / np.float32(255))
    mixed = together([pixels[0], same[1]])
    assert mixed.dtype == np.float32 and np.array_equal(mixed, same[:2])
    assert together([pixels[0], pixels[1]]).dtype == np.uint8


def test_one_array_in_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbers(1)[0])
    found, size = load_picture(tmp_path / "a.npy", SHAPE)
    assert found.tobytes() == numbers(1).tobytes() and size == (10, 6)
    for name, wrong, message in (
        ("b", numbers(1), r"rows of shape \[1, 2, 6, 10\]"),
        ("c", np.zeros(SHAPE, np.uint8), "is uint8; save numbers as float32"),
        ("d", np.full(SHAPE, np.nan), "1 of 1 rows with NaN"),
        ("e", np.array([print], object), "cannot be read as a numpy .npy file"),
    ):
        np.save(tmp_path / f"{name}.npy", wrong)
        with pytest.raises(DataError, match=message):
            load_picture(tmp_path / f"{name}.npy", SHAPE)
    (tmp_path / "b.npy").rename(tmp_path / "B.NPY")
    with pytest.raises(DataError, match="rows of shape"):
        load_picture(tmp_path / "B.NPY", SHAPE)
    np.savez(tmp_path / "f.npz", a=numbers(1))
    (tmp_path / "f.npz").rename(tmp_path / "f.npy")
    with pytest.raises(DataError, match="it is an .npz file"):
        load_picture(tmp_path / "f.npy", SHAPE)
    (tmp_path / "g.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        load_picture(tmp_path / "g.npy", SHAPE)
    with pytest.raises(DataError, match=r"cannot be read \(no such file or directory\)"):
        load_picture(tmp_path / "h.npy", SHAPE)


@pytest.mark.parametrize("mean, std, said", [(0.5, 0.25, True), (5, 3, False), (5, 0.1, True), (5, 100, True)])
def test_numbers_far_from_what_networks_learn_by_are_told(mean: float, std: float, said: bool, tmp_path: Path) -> None:
    text = recipe_text(
        model='name = "tiny"\ninput = [2, 6, 10]\nclasses = 3\ncut = "stage1_relu2"',
        data=f"batch = 4\nmean = [{mean}]\nstd = [{std}]",
    )
    found = load(save_numbers(tmp_path / "a.npz"), SHAPE, 1, 0)
    told = list(remarks(recipe.parse(text, "here"), found, begun=False))
    assert len(told) == said, told
    if said:
        assert f"mean = [{found.train.pictures[:, 0].mean():.4g}, " in told[0]
    assert not list(remarks(recipe.parse(text, "here"), found, begun=True))


def test_all_classes_are_looked_at_where_they_come_sorted(tmp_path: Path) -> None:
    """A channel that says the class itself is the same over each of them."""
    text = recipe_text(
        model='name = "tiny"\ninput = [2, 2, 2]\nclasses = 3\ncut = "stage1_relu2"', data="mean = [0]\nstd = [1]"
    )
    rows = np.random.default_rng(0).normal(0, 1, (6000, 2, 2, 2)).astype(np.float32)
    rows[:, 1] = np.repeat([-1, 0, 1], 2000)[:, None, None]
    labels = np.repeat([0, 1, 2], 2000)
    source = save_npz(tmp_path / "a.npz", train_x=rows, train_y=labels, test_x=rows[::999], test_y=labels[::999])
    found = load(source, (2, 2, 2), 1, 0)
    assert list(remarks(recipe.parse(text, "here"), found, begun=False)) == []


def test_a_network_learns_from_numbers_and_names_one(tmp_path: Path) -> None:
    """Three classes that differ in where the second channel is high, which no picture could have."""
    random = np.random.default_rng(0)

    def made(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 3
        rows = random.normal(-40, 5, (count, 2, 12, 16)).astype(np.float32)
        for row, label in zip(rows, labels, strict=True):
            row[1, 4 * label : 4 * label + 4] += 15
        return rows, labels

    (train_x, train_y), (test_x, test_y) = made(360), made(60)
    names = np.array(["low", "middle", "high"])
    np.savez(tmp_path / "a.npz", train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y, classes=names)
    text = recipe_text(
        "fixed", model='name = "tiny"\ninput = [2, 12, 16]\nclasses = 3\ncut = "stage1_relu2"',
        data="batch = 32\nmean = [-40]\nstd = [5]", bottleneck='kind = "linear"', schedule="phases = [[4, 4]]",
        codec='activation = "step:20"\ngradient = "step:10"',
    )  # fmt: skip
    run = train(tmp_path, text, data=f"npz:{tmp_path / 'a.npz'}")
    assert run.summary("device")["accuracy"] > 0.95 and "Note" not in run.output
    np.save(tmp_path / "one.npy", test_x[1])
    with pair.server("--run", run.path / "server", log=tmp_path / "log") as (_, address):
        answer = pair.device(
            "predict", address, "--run", run.path / "device", "--json", tmp_path / "one.npy", capture_output=True
        )
    assert json.loads(answer.stdout)["class"] == "middle", answer.stderr


def test_each_channel_has_its_own_unit(tmp_path: Path) -> None:
    """One mean for all would put each far from 0 and next to no distance apart."""
    far = numbers(12) * np.array([1, 10], np.float32)[:, None, None] + np.array([0, 5000], np.float32)[:, None, None]
    text = recipe_text(
        model='name = "tiny"\ninput = [2, 6, 10]\nclasses = 3\ncut = "stage1_relu2"',
        data="batch = 4\nmean = [5]\nstd = [3]",
    )
    found = load(save_numbers(tmp_path / "a.npz", train_x=far), SHAPE, 1, 0)
    (told,) = remarks(recipe.parse(text, "here"), found, begun=False)
    assert " in channel 1, and" in told and re.search(
        r"mean = \[(4|5)\.\d+, 50\d\d\] and std = \[\d\.\d+, \d\d\.\d+\]", told
    )
    flat = load(
        save_numbers(tmp_path / "b.npz", train_x=far * np.array([1, 0], np.float32)[:, None, None]), SHAPE, 1, 0
    )
    (told,) = remarks(recipe.parse(text, "here"), flat, begun=False)
    assert told == "channel 1 has the same number everywhere: nothing can be learnt from it"
