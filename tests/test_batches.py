"""The order and the augmentation of batches, functions of seed and step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.schedule import steps_per_epoch
from device_client.batches import augment, indices, normalise, order


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


def test_pictures_that_are_fewer_than_a_batch_are_one():
    assert [steps_per_epoch(64, batch) for batch in (1, 32, 33, 64, 65)] == [64, 2, 1, 1, 1]


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


@pytest.mark.parametrize("mean, std", [((0.5,), (0.25,)), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), ((0,), (1, 2, 3))])
def test_normalise_is_the_formula(mean, std):
    pictures = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3).transpose(0, 3, 1, 2) * 2
    found = normalise(pictures, mean, std)
    expected = (pictures / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_allclose(found, expected, atol=1e-6)
