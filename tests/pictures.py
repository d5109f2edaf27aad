"""Pictures that tests write and load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from device_client.data import load

RGB, GRAY = (3, 8, 8), (1, 8, 8)
COLOURS = {"ant": (200, 10, 10), "bee": (10, 200, 10), "cat": (10, 10, 200)}


def save(path: Path, colour=(120, 60, 30), size=(8, 8), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


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
