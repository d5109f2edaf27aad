"""The run folder: files are written whole or not at all, whatever the disk does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from common.errors import RunFolderError
from common.files import write_atomically
from common.run import MetricsLog, RunFolder


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match="No space left on device; what was there before is unchanged"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_a_metrics_line_that_does_not_fit_is_taken_back_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 0})
    whole = log._file

    class Short:
        """Writes half of what it is given, as a disk does that fills up on the way."""

        def write(self, data: bytes) -> int:
            return whole.write(data[: len(data) // 2])

        def __getattr__(self, name: str) -> object:
            return getattr(whole, name)

    monkeypatch.setattr(log, "_file", Short())
    assert "the disk is full" in (log.append({"step": 1}) or "")
    assert log.append({"step": 2}) is None, "said once"
    assert log.dropped == 2
    monkeypatch.undo()
    log.append({"step": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step":0}\n{"step":3}\n'


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be used"):
        RunFolder(tmp_path / "file" / "run").prepare(overwrite=False)
