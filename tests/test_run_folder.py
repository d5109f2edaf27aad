"""The run folder: files are written whole or not at all, whatever the disk does."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from benchmarks import inprocess
from benchmarks.recipes import recipe_text
from common import checkpoint, halves
from common.errors import RunFolderError
from common.files import write_atomically
from common.metrics import MetricsLog
from common.run import RunFolder
from device_client import cli as device_cli
from device_client.data import Dataset
from edge_server.host import Host
from edge_server.limits import Limits


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


def test_metrics_go_back_to_a_step_and_know_what_is_made_again(tmp_path: Path) -> None:
    """Though the process died over its last line."""
    path, line = tmp_path / "metrics.jsonl", '{"step":%d,"bytes":{"up":3,"down":2}}\n'
    path.write_text("".join(line % step for step in range(4)) + '{"step":4,"by')
    log = MetricsLog(path, resume=True)
    assert log.rewind(2) == {"up": 6, "down": 4, "steps": 2}
    log.close()
    assert path.read_text() == line % 0 + line % 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be used"):
        RunFolder(tmp_path / "file" / "run").prepare(overwrite=False)


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    code = (
        f"from pathlib import Path; from common.run import RunFolder\nwith RunFolder(Path({str(path)!r})).claimed(): "
    )

    def other(what: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code + what], stdin=-1, stdout=-1, stderr=-1, text=True)

    with other("print('in', flush=True); input()") as holder:
        assert holder.stdout and holder.stdout.readline() == "in\n"
        with pytest.raises(RunFolderError, match=f"in use by process {holder.pid} on"), RunFolder(path).claimed():
            pass
        holder.kill()
    with RunFolder(path).claimed():  # the dead hold nothing
        assert other("pass").communicate()[1].count("in use by process") == 1
        (path / "kept").touch()
    assert [file.name for file in path.iterdir()] == ["kept"]
    (path / "kept").unlink()
    path.rmdir()
    path.parent.rmdir()
    with RunFolder(path).claimed():
        pass
    assert not path.parent.exists()


def test_a_run_that_made_no_step_is_no_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start("name = 'refused at once'")
    folder.close()
    folder.prepare(overwrite=False)
    (folder.path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(RunFolderError, match="already holds an unfinished run"):
        folder.prepare(overwrite=False)
    folder.start("name = 'begun'")
    folder.close()
    checkpoint.Checkpoints(folder.checkpoints, "id", "digest").write(0, {"a": torch.zeros(3)}, {})
    with pytest.raises(RunFolderError, match="unfinished run, and not this one"):  # its device may come back
        folder.prepare(overwrite=False)


def test_a_run_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=(8 << 20) + 99))
    RunFolder(tmp_path / "run").prepare(overwrite=False, needed_bytes=99)
    with pytest.raises(RunFolderError, match="has 8 MB of free disk"):
        RunFolder(tmp_path / "run").prepare(overwrite=False, needed_bytes=100)


def test_nothing_of_an_earlier_end_is_taken_for_this_runs(tmp_path: Path) -> None:
    """Of another run that lay here, or of this one's, which is made once more."""
    folder, halves = RunFolder(tmp_path), ("run.json", "head.safetensors", "tail.safetensors")
    for name in (*halves, "summary.json"):
        (tmp_path / name).write_text("{}")
    folder.start("name = 'mine'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "recipe.toml"]
    for name in halves:
        (tmp_path / name).write_text("{}")
    folder.resume(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "recipe.toml"]
    folder.close()


@pytest.mark.parametrize("kind", ["damaged", "other release"])
def test_checkpoints_that_cannot_be_used_are_said(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start("name = 'mine'")
    if kind == "other release":
        monkeypatch.setattr(checkpoint, "_FORMAT", 0)
    checkpoint.Checkpoints(folder.checkpoints, "id", "digest").write(7, {"a": torch.zeros(3)}, {})
    monkeypatch.undo()
    folder.close()
    (folder.path / "metrics.jsonl").write_text('{"step": 0}\n')
    if kind == "damaged":
        next(folder.checkpoints.iterdir()).write_bytes(b"half of it")
    words = "is damaged" if kind == "damaged" else "was written by another release"
    with pytest.raises(RunFolderError, match=f"holds an unfinished run that cannot be gone on with: .*{words}"):
        folder.prepare(overwrite=False)


def test_a_folder_that_can_no_longer_be_written_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with pytest.raises(RunFolderError, match="what matters"), RunFolder(tmp_path / "run").claimed():
        monkeypatch.setattr(Path, "unlink", refused)
        raise RunFolderError("what matters")


def test_what_a_finished_run_could_go_on_from_goes_where_its_process_could_not_remove_it(
    few: Dataset, tmp_path: Path
) -> None:
    """On both sides, where it is looked at the next time."""
    text = recipe_text(schedule="phases = [[0, 0.4]]")
    inprocess.train(text, few, folder=tmp_path)
    places = [tmp_path / side / "checkpoints" for side in ("server", "device")] + [tmp_path / "device" / "local"]
    for place in places:
        assert not place.exists()
        place.mkdir()
        (place / "step-000000000002.safetensors").write_bytes(b"left")
    line = ["train", "127.0.0.1:1", "--data", "digits", "--run", str(tmp_path / "device")]
    assert "is complete already" in CliRunner().invoke(device_cli.cli, line, standalone_mode=False).output
    Host.to_serve(RunFolder(tmp_path / "server"), Console(quiet=True), (), Limits(), halves.CPU)
    assert not any(place.exists() for place in places)
