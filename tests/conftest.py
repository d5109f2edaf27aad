"""What the tests share: whole runs of the two real processes, each trained once; links, where they can be made."""

from __future__ import annotations

import io
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import settings
from rich.console import Console

from benchmarks import netns, pair
from benchmarks.recipes import recipe_text
from common.errors import DepruneError
from common.recipe import parse
from common.run import RunFolder
from device_client.data import Dataset, load
from edge_server.host import Host
from edge_server.limits import Limits
from tests import forked

settings.register_profile("deprune", deadline=None)  # no test is about seconds
settings.load_profile("deprune")
torch.set_num_threads(1)  # networks this small gain nothing by more, and lose much where another program has the core

forked.use()
# Under nohup, or in the background of a script, whoever is started would ignore them too, and hear no test's signal.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
ANY_PORT = ("--listen", "127.0.0.1:0")  # for a server of which no address is asked: its usual port may be taken
needs_link = pytest.mark.skipif(bool(netns.unavailable()), reason=netns.unavailable())


@dataclass(frozen=True)
class Run:
    """A finished run of the two processes."""

    path: Path
    output: str  # of the device
    log: str  # of the server

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.toml"

    def summary(self, side: str) -> dict[str, Any]:
        return json.loads((self.path / side / "summary.json").read_text())

    def metrics(self, side: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / side / "metrics.jsonl").read_text().splitlines()]


def train(
    path: Path, text: str, *, server: tuple[object, ...] = (), device: tuple[object, ...] = (), data: str = "digits"
) -> Run:
    """Train the recipe in `text` with both processes, one thread each; fails with both outputs."""
    path.mkdir(parents=True, exist_ok=True)
    recipe, log = path / "recipe.toml", path / "server.log"
    recipe.write_text(text)
    arguments = (recipe, "--run", path / "server", "--once", "--threads", 1, *server)
    with pair.server(*arguments, log=log) as (process, address):
        done = pair.device(
            "train", address, "--data", data, "--run", path / "device", "--threads", 1, *device, capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
        assert process.wait(timeout=30) == 0, log.read_text()
    return Run(path, done.stdout, log.read_text())


def quiet_host(path: Path, **limits: Any) -> Host:
    text = recipe_text()
    return Host.to_train(parse(text), text, RunFolder(path), Console(file=io.StringIO()), (), False, Limits(**limits))


def failed(command: Any, *arguments: object) -> str:
    """The sentence that a command ends with."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], standalone_mode=False)
    assert isinstance(result.exception, DepruneError), (result.output, result.exception)
    return str(result.exception)


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """20 steps of plain: raw fp32 and no bottleneck."""
    text = recipe_text(schedule="phases = [[0, 0.4546]]")
    return train(tmp_path_factory.mktemp("plain"), text)


@pytest.fixture(scope="session")
def deprune_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short deprune run, its head published, good enough to name digits."""
    text = recipe_text(
        "deprune",
        bottleneck='kind = "linear"',
        codec='activation = "int8"\ngradient = "int8"',
        schedule="phases = [[2, 1], [4, 1], [8, 2]]",
    )
    return train(tmp_path_factory.mktemp("deprune"), text, device=("--publish-head",))


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """Some of the digits, for runs in one process."""
    return load("digits", (1, 16, 16), 3, 0.0, limit=640)


@pytest.fixture(scope="session")
def few() -> Dataset:
    return load("digits", (1, 16, 16), 3, 0.0, limit=320)
