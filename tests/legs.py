"""A run in legs: two processes, as it were, that are killed and begin anew, in this one process and without sockets."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from rich.console import Console

from benchmarks.inprocess import Stub
from benchmarks.recipes import recipe_text
from common.checkpoint import Checkpoints
from common.recipe import parse
from common.run import RunFolder
from device_client.data import Dataset, load
from device_client.link import Stream
from device_client.remote_tail import RemoteTail
from device_client.trainer import Trainer
from edge_server.host import Host
from edge_server.servicer import Servicer
from tests.test_link import Lost

EVERY = 4
CODEC = 'activation = "step:15"\ngradient = "step:10"'
FEW = "batch = 16\ncrop = 1\nflip = true"  # half of the usual batch, of half of the pictures: as many steps
CASES = {
    "ranked channels": recipe_text(
        "deprune", data=FEW, bottleneck='kind = "channels"\nranking_steps = 2', codec=CODEC,
        schedule="phases = [[2, 0.5], [4, 0.5]]",
    ),
    "principal components, adamw": recipe_text(
        "fixed", data=FEW, bottleneck='kind = "linear"\nstart = "principal"', codec=CODEC, schedule="phases = [[4, 1]]",
        optimiser='name = "adamw"\nlr = 0.005',
    ),
    "frozen head": recipe_text(
        "deprune", data=FEW, bottleneck='kind = "linear"', codec=CODEC,
        schedule="phases = [[2, 0.3], { width = 4, epochs = 1.2, views = 0.4, flip = true }, [8, 0.3]]",
    ),
    "nested widths": recipe_text(
        "deprune", data=FEW, bottleneck='kind = "linear"', codec=CODEC,
        # So many that some are drawn for the first time long after others.
        schedule="phases = [{ width = 8, epochs = 1, nested = [1, 2, 3, 4, 5, 6, 7] }]",
    ),
    "plateau": recipe_text(
        "deprune", data=FEW + "\nvalidation = 0.2", bottleneck='kind = "linear"', codec=CODEC,
        schedule='kind = "plateau"\nwidths = [2, 4]\npatience = 1\nmin_gain = 0.9\nmax_epochs = 6',
    ),
    "budget": recipe_text(
        "deprune", data=FEW + "\nvalidation = 0.2", bottleneck='kind = "linear"', codec=CODEC,
        schedule="phases = [[2, 3], [4, 3]]\nbudget_mb = 0.2",
    ),
}  # fmt: skip


class Killed(Exception):
    pass


def server_of(path: Path, text: str) -> Host:
    host = Host.to_train(parse(text), text, RunFolder(path / "server"), Console(file=io.StringIO()), (), False)
    assert host.run
    host.run.every = EVERY
    return host


def leg(
    path: Path, text: str, data: Dataset, until: int | None = None, lives: Host | None = None
) -> dict[str, Any] | None:
    """Two new processes, as it were, until they are killed before step `until`, or to the end; then the summary.

    `lives`: a server that is not new, and not killed.
    """
    quiet, host = Console(file=io.StringIO()), lives or server_of(path, text)
    assert host.run
    folder = RunFolder(path / "device")
    saved = folder.unfinished()
    remote = RemoteTail("127.0.0.1:1", stub=Stub(Servicer(host)))
    if saved:
        kept = Checkpoints(folder.checkpoints, saved["run_id"], saved["digest"]).sound()[0]
        remote.open(trains=True, run_id=saved["run_id"], kept=kept)
    else:
        remote.open(trains=True)
    trainer = Trainer(remote, data, folder, quiet)
    trainer.prepare((), None)
    if not trainer.begun:
        folder.start(text)
    after = trainer._after

    def watched(*arguments: Any) -> dict[str, Any]:
        if trainer.step == until:  # the server has applied it, this side has not noted it down
            raise Killed
        return after(*arguments)

    trainer._after = watched  # type: ignore[method-assign]
    try:
        return trainer.run(publish=False)
    except Killed:
        remote._lose()  # as a dead process's connection is, at once and not when the collector finds it
        remote._asked_on = None
        if not lives:
            host.run.keep = lambda *_, **__: None  # type: ignore[method-assign] # a dead process keeps nothing any more
        return None
    finally:
        for side in (host.folder, folder):
            if side is folder or not lives:
                side.close()


def outcome(path: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    weights = {
        f"{half}.{name}": value
        for side, half in (("device", "head"), ("server", "tail"))
        for name, value in safetensors.torch.load_file(path / side / f"{half}.safetensors").items()
    }
    lines = [json.loads(line) for line in (path / "device" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return weights, [line["loss"] for line in lines]


def assert_same_end(one: Path, other: Path) -> None:
    """Weights bit for bit, and the loss of each step."""
    (weights, losses), (expected, expected_losses) = outcome(one), outcome(other)
    assert losses == expected_losses
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key


def lose_before_the_first_step(text: str, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has kept where it begins, and what it sent then (its basis, where one is wanted) has not arrived."""
    data = load("digits", (1, 16, 16), 3, 0.0, limit=320)
    assert leg(tmp_path / "whole", text, data)
    keep, broken = Trainer.keep, tmp_path / "broken"

    def kept(trainer: Trainer, anew: bool = False) -> None:
        keep(trainer, anew)
        raise Killed

    host = server_of(broken, text)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "keep", kept)
        assert leg(broken, text, data, None, host) is None
    assert host.run and host.run.training and not host.run.training.rotated
    if "server" in lost:
        host.folder.close()
    if "disk" in lost:
        shutil.rmtree(broken / "device")
    assert leg(broken, text, data, None, None if "server" in lost else host)
    assert_same_end(broken, tmp_path / "whole")


class Cut(RemoteTail):
    """In process, on a link that breaks once, right after the server has said that it wants the basis."""

    passing = 1  # frames of that

    def __init__(self, *arguments: Any, stub: Stub, **options: Any) -> None:
        super().__init__(*arguments, stub=stub, **options)
        self._channel, self._whole, self._calls = Mock(), stub, 0

    def _connect(self) -> None:
        pass

    def _open_stream(self, call: Any) -> Stream:
        self._calls += 1
        return Stream(self._breaking if self._calls == 2 else call, self.server, watched=False)  # the first was Head

    def _breaking(self, frames: Any) -> Any:
        call, passing = self._whole.Train(frames), self.passing

        class Breaking:
            answered = 0

            def __next__(self) -> Any:
                if self.answered == passing:
                    call._frames.close()
                    raise Lost()
                self.answered += 1
                return next(call)

        return Breaking()
