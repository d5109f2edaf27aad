"""The image folder that benchmarks are repeated with, from an archive like CIFAR-10's."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cifar
from device_client.data import load


def test_an_archive_becomes_a_folder_that_can_be_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "TESTED", 1)
    labels = np.array([1, 0, 1, 1], np.uint8)
    pictures = np.broadcast_to(40 + 60 * labels[:, None], (4, 3 * 32 * 32)).astype(np.uint8)
    batch = np.concatenate((labels[:, None], pictures), axis=1).tobytes()
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as files:
        names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
        for name, data in ((name, batch) for name in names):
            _add(files, name, data)
        _add(files, "batches.meta.txt", b"frog\ncat\n\n")
    assert cifar.write(tmp_path / "cifar.tar.gz", tmp_path / "cifar") == {"train": 20, "test": 2}
    loaded = load(f"folder:{tmp_path / 'cifar'}", (3, 32, 32), 0, 0.0)
    assert loaded.classes == ("cat", "frog") and len(loaded.train) == 20 and len(loaded.test) == 2
    # A class's pictures are its own: "cat" is the archive's 1.
    means = loaded.train.pictures.mean((1, 2, 3))
    assert np.abs(means - np.where(loaded.train.labels == 0, 100, 40)).max() < 3


def _add(files: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
    member.size = len(data)
    files.addfile(member, io.BytesIO(data))
