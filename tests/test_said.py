"""What each side says of the other: lost devices, uses, what is not the same as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import pair
from benchmarks.recipes import recipe_text
from common import recipe
from common.progress import RunningMean, StepProgress
from common.recipe import differences
from device_client.data import Dataset, Part
from device_client.remarks import remarks
from device_client.state import _other
from device_client.trainer import Trainer
from edge_server import cli as server_cli
from tests.conftest import ANY_PORT, Run, failed
from tests.legs import leg


def test_a_device_that_is_killed_is_missed_at_once(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text(schedule="phases = [[0, 500]]"))
    log = tmp_path / "log"
    with pair.server(tmp_path / "recipe.toml", "--run", tmp_path / "server", log=log) as (_, address):
        line = pair.command("device-client", "train", address, "--data", "digits", "--run", tmp_path / "device")
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, env=pair.environment()) as device:
            metrics, deadline = tmp_path / "device" / "metrics.jsonl", time.monotonic() + 60
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.05)
            os.kill(device.pid, signal.SIGKILL)
        while "was lost" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert log.read_text().count("Note: the connection to the device was lost; what it trains waits for it") == 1


def test_uses_are_logged_and_a_picture_has_one_answer(deprune_run: Run, tmp_path: Path) -> None:
    """Whatever is beside it, which a codec rounds by one step with it, if it crosses with it."""
    pictures = [tmp_path / f"{number}.png" for number in range(6)]
    random = np.random.default_rng(0)
    for number, path in enumerate(pictures):
        Image.fromarray(random.integers(0, 40 * number + 2, (16, 16), dtype=np.uint8)).save(path)
    log = tmp_path / "log"
    run = ("--run", deprune_run.path / "device", "--json")
    with pair.server("--run", deprune_run.path / "server", log=log) as (_, address):
        together = pair.device("predict", address, *run, *pictures, tmp_path / "none.png", capture_output=True)
        alone = [
            pair.device("predict", address, *run, path, capture_output=True) for path in (pictures[0], pictures[5])
        ]
        pair.device("evaluate", address, "--data", "digits", *run, capture_output=True)
        unread = pair.device("predict", address, *run, tmp_path, tmp_path / "a.npz", capture_output=True)
    *named, missing = [json.loads(line) for line in together.stdout.splitlines()]
    assert [json.loads(each.stdout) for each in alone] == [named[0], named[5]]
    assert missing["picture"].endswith("none.png") and "cannot be read" in missing["error"]
    assert together.returncode == 1 and "1 of 7 pictures was left out, for it cannot be read" in together.stderr
    errors = [json.loads(line)["error"].partition("; ")[2] for line in unread.stdout.splitlines()]
    assert errors == [f"give the pictures in it: {tmp_path}/*", "give one of what it holds, saved as an .npy file"], (
        unread
    )
    assert unread.returncode == 1 and "none of 2 pictures can be read; " in unread.stderr
    text = log.read_text()
    assert "A device had 6 pictures named: " in text and "A device had 359 pictures judged: " in text, text


@pytest.mark.parametrize(
    ("began", "here", "words"),
    [
        ((3, ("a", "b")), (2, ("a", "b")), "the run began with 3 training pictures, and here are 2"),
        ((2, ("a", "b")), (2, ("a", "b")), "these are not the 2 pictures that the run began with"),
        ((2, ("a", "b")), (2, ("a", "c")), "not those that the run began with: without b; with c"),
        ((2, ("a", "b")), (2, ("b", "a")), "not those that the run began with: in another order"),
    ],
)
def test_other_pictures_are_told_apart(
    began: tuple[int, tuple[str, ...]], here: tuple[int, tuple[str, ...]], words: str
) -> None:
    part = Part(np.zeros((here[0], 1, 4, 4), np.uint8), np.zeros(here[0], np.int64))
    data = Dataset(here[1], part, part, part, ())
    assert words in _other(data, {"pictures": began[0], "classes": list(began[1])})


def test_what_a_changed_recipe_changes_is_told(few: Dataset, tmp_path: Path) -> None:
    text = recipe_text(schedule="phases = [[0, 2]]")
    other = text.replace("lr = 0.05", "lr = 0.02").replace("[[0, 2]]", "[[0, 3]]")
    found = differences(recipe.parse(text), recipe.parse(other))
    assert [key for key, *_ in found] == ["schedule.phases", "optimiser.lr"]
    leg(tmp_path, text, few, until=8)
    (tmp_path / "recipe.toml").write_text(other)
    told = failed(server_cli.cli, "serve", *ANY_PORT, tmp_path / "recipe.toml", "--run", tmp_path / "server")
    assert "optimiser.lr is 0.02 and was 0.05" in told and "server/recipe.toml, choose another --run" in told
    assert "(schedule.phases is [[0, 3]] and was [[0, 2]]; " in told


def test_phases_are_told_as_a_recipe_has_them() -> None:
    written = """[{ width = 8, epochs = 6, activation = "auto:10", views = 1, flip = true }, [8, 0.5]]"""
    phases = recipe.parse(recipe_text("fixed", bottleneck='kind = "linear"', schedule=f"phases = {written}")).schedule
    assert recipe.in_toml(phases.phases) == written


def test_what_a_finished_run_had_otherwise_is_told(plain_run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(plain_run.recipe.read_text().replace("lr = 0.05", "lr = 0.02"))
    told = failed(server_cli.cli, "serve", *ANY_PORT, tmp_path / "recipe.toml", "--run", plain_run.path / "server")
    assert "a finished run, and not this one (optimiser.lr is 0.02 and was 0.05); choose another --run" in told


def test_what_is_shown_goes_on_where_it_was(few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and accuracy over 20 steps, on both sides, and not of the first batch of a new process alone."""
    shown: list[tuple[int, float | None, float]] = []
    step = StepProgress.step

    def watched(self: StepProgress, done: int, mean: RunningMean, *rest: Any, **more: Any) -> None:
        shown.append((done, mean.loss, mean.accuracy))
        step(self, done, mean, *rest, **more)

    monkeypatch.setattr(StepProgress, "step", watched)
    text = recipe_text(schedule="phases = [[0, 2]]")
    leg(tmp_path / "whole", text, few)
    whole = {done: rest for done, *rest in shown}
    shown.clear()
    for until in (6, 11, None):
        leg(tmp_path / "broken", text, few, until)
    assert len(shown) > 2 * len(whole), "both sides, and some steps once more"
    assert all(rest == whole[done] for done, *rest in shown)


@pytest.mark.parametrize(
    ("batch", "views", "told"),
    [
        (64, 1, "64, so 36 of 100 pictures are in no whole batch"),
        (64, 1, "a phase with one view learns nothing from those: with 50 it has next to all"),
        (45, 1, "those: with 33 it has"),
        (64, 2, ""),  # the other view has them
        (49, 1, ""),  # no more than are few
        (50, 1, ""),
        (100, 1, ""),
        (200, 1, "200, more than there are pictures: a step takes all 100"),
    ],
)
def test_pictures_that_no_view_has_are_told(batch: int, views: int, told: str) -> None:
    text = recipe_text(data=f"batch = {batch}", schedule=f"phases = [{{ width = 0, epochs = 4, views = {views} }}]")
    part = Part(np.zeros((100, 1, 16, 16), np.uint8), np.zeros(100, np.int64))
    found = list(remarks(recipe.parse(text), Dataset(tuple("0123456789"), part, part, part, ()), begun=False))
    assert [told in one for one in found] == [True] * bool(told), found


def test_a_run_that_went_on_took_the_time_of_all_its_processes(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Trainer.prepare

    def long_ago(self: Trainer, *arguments: Any) -> None:
        prepare(self, *arguments)
        if not self.begun:
            self.wall_s, self.busy_s = self.wall_s + 2000, self.busy_s + 1000

    monkeypatch.setattr(Trainer, "prepare", long_ago)
    text = recipe_text(schedule="phases = [[0, 0.4]]")
    assert leg(tmp_path, text, few, 2) is None
    summary = leg(tmp_path, text, few)
    assert summary and 2000 < summary["wall_s"] < 3000 and 1000 < summary["busy_s"] < 2000
