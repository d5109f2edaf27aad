"""Answers that cannot be written, and folders of the other side: nothing is lost without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import inprocess, pair
from benchmarks.recipes import recipe_text
from device_client import cli as device_cli
from device_client.data import load
from edge_server import cli as server_cli
from tests.conftest import ANY_PORT, failed


@pytest.mark.parametrize("line", ["edge-server cuts tiny --input 3x32x32", "device-client --help"])
def test_an_answer_that_cannot_be_written_is_an_error(line: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            pair.command(*line.split()), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False
        )
    assert done.returncode == 1 and done.stderr == "Error: the output cannot be written: No space left on device\n"


def test_letters_that_an_output_has_not_are_replaced(tmp_path: Path) -> None:
    """The table of a run has an arrow, and a class any letters."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    program = (
        "import sys, common.cli\n"
        "sys.modules['fake'] = sys\n"
        "sys.cli = lambda **_: print('a \\u2192 b')\n"
        "common.cli.run('fake')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "a ? b\n"), done.stderr


def test_a_side_replaces_nothing_of_the_others(tmp_path: Path) -> None:
    """Not with --overwrite either, for a device's head may be the only one; nor is it taken for a start."""
    few = load("digits", (1, 16, 16), 3, 0.0, limit=64)
    inprocess.train(recipe_text(schedule="phases = [[0, 0.1]]"), few, folder=tmp_path)
    (tmp_path / "recipe.toml").write_text(recipe_text())
    theirs = "is the folder of the {} of a run"
    serve = ("serve", *ANY_PORT, tmp_path / "recipe.toml", "--overwrite", "--run", tmp_path / "device")
    assert theirs.format("device") in failed(server_cli.cli, *serve)
    train = ("train", "127.0.0.1:9", "--data", "digits", "--overwrite", "--run", tmp_path / "server")
    assert theirs.format("server") in failed(device_cli.cli, *train)
    model = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "run:{tmp_path}/device"'
    (tmp_path / "recipe.toml").write_text(recipe_text(model=model))
    assert theirs.format("device") in failed(
        server_cli.cli, "serve", *ANY_PORT, tmp_path / "recipe.toml", "--run", tmp_path / "new"
    )
    assert (tmp_path / "device" / "head.safetensors").is_file()
