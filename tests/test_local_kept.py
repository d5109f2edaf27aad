"""What a head has learnt alone is kept: no fault loses it, and nothing else is taken for it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import inprocess
from common.checkpoint import Checkpoints
from common.errors import RunFolderError
from common.run import RunFolder
from device_client.cli import cli
from device_client.data import Dataset, load
from device_client.local import Local
from device_client.trainer import Trainer
from tests.alone import text_of, trainer_of
from tests.conftest import failed
from tests.legs import EVERY, assert_same_end, leg


def _told(trainer: Trainer) -> str:
    assert isinstance(trainer.console.file, io.StringIO)
    return trainer.console.file.getvalue()


@pytest.mark.parametrize("until", [1, 7, 19])
def test_a_device_that_dies_goes_on_to_the_same_weights(
    until: int, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(1, schedule="phases = [[4, 0.2]]")
    inprocess.train(text, digits, folder=tmp_path / "whole")

    learn, made = Local._learn_step, list[int]()

    def dying(self: Local) -> tuple[float, int]:
        if len(made) == until:
            raise KeyboardInterrupt
        made.append(self.step)
        return learn(self)

    monkeypatch.setattr(Local, "_learn_step", dying)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "killed", text, digits).run(publish=False)
    monkeypatch.setattr(Local, "_learn_step", lambda self: (made.append(self.step), learn(self))[1])
    trainer = trainer_of(tmp_path / "killed", text, digits)
    trainer.run(publish=False)
    assert made == [*range(until), *range(until - until % EVERY, 20)]
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_a_device_that_dies_between_learning_alone_and_its_first_step(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(0.5)
    inprocess.train(text, digits, folder=tmp_path / "whole")
    fit = Trainer.fit

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "killed", text, digits).run(publish=False)
    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr(Local, "_learn_step", lambda self: pytest.fail("it had learnt all of it"))
    trainer_of(tmp_path / "killed", text, digits).run(publish=False)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_what_was_learnt_from_other_pictures_is_not_lost_unasked(digits: Dataset, tmp_path: Path) -> None:
    def going_on(text: str, data: Dataset) -> int:
        alone = Local(trainer_of(tmp_path, text, data))
        alone._take_up()
        found = alone.step
        alone.learn()
        return found

    assert going_on(text_of(0.3), digits) == 0
    assert going_on(text_of(0.3), digits) == 6
    for after in (
        text_of(0.3, schedule="phases = [[2, 1]]"),
        text_of(0.3, data="batch = 32\ncrop = 1\nflip = true\nevaluation_batch = 64"),
        text_of(0.3, optimiser="lr = 0.05\nrestart = true"),
        text_of(0.3, bottleneck='kind = "channels"', schedule="phases = [[4, 1]]"),
    ):  # fmt: skip
        assert going_on(after, digits) == 6, "it concerns the run that comes after alone"
    for text, data in (
        (text_of(0.3), load("digits", (1, 16, 16), 4, 0.0, limit=640)), (text_of(0.3, optimiser="lr = 0.04"), digits),
        (text_of(0.3, local="epochs = 0.3\nlr = 0.01"), digits),
    ):  # fmt: skip
        with pytest.raises(RunFolderError, match=r"learnt alone from other pictures, weights or settings.*--overwrite"):
            going_on(text, data)
    # With --overwrite that is replaced, and what is of the same start is taken all the same.
    for text, step in ((text_of(0.3), 6), (text_of(0.3, optimiser="lr = 0.04", local="epochs = 0.3\nlr = 0.05"), 6),
                       (text_of(0.3, optimiser="lr = 0.04"), 0)):  # fmt: skip
        alone = Local(trainer_of(tmp_path, text, digits), anew=True)
        alone._take_up()
        assert alone.step == step
    Local(trainer_of(tmp_path, text_of(0.3), digits)).learn()
    for path in (tmp_path / "device" / "local").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match="or cannot be read .*is damaged"):
        going_on(text_of(0.3), digits)


def test_a_damaged_checkpoint_is_told_and_an_older_one_taken(digits: Dataset, tmp_path: Path) -> None:
    Local(trainer_of(tmp_path, text_of(0.3), digits)).learn()
    newest = max((tmp_path / "device" / "local").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    trainer = trainer_of(tmp_path, text_of(0.3), digits)
    alone = Local(trainer)
    alone._take_up()
    assert alone.step == EVERY and "damaged" in _told(trainer)


def test_a_stop_keeps_where_it_stands(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, text_of(1), digits)
    learn = Local._learn_step

    def stopped(self: Local) -> tuple[float, int]:
        trainer.stopping = self.step == 4
        return learn(self)

    monkeypatch.setattr(Local, "_learn_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(publish=False)
    told = _told(trainer)
    assert "learnt alone up to local step 5 of 20" in told
    assert re.search(r"local step 1/20  loss \d\.\d+  acc [1-9]?\d\.\d%", told), told
    again = trainer_of(tmp_path, text_of(1), digits)
    again.wall_s = 0.0
    alone = Local(again)
    alone._take_up()
    assert alone.step == 5 and again.wall_s > 0 and again.busy_s > 0


def test_a_full_disk_is_told_and_nothing_is_lost(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a checkpoint of the stage that cannot be written, nor the run's first, costs what has been learnt."""
    write, text = Checkpoints.write, text_of(0.5, schedule="phases = [[4, 0.2]]")
    inprocess.train(text, digits, folder=tmp_path / "whole")

    def full(self: Checkpoints, step: int, *arguments: Any) -> None:
        if self.folder.name == refused and step == at:
            raise RunFolderError("the disk is full")
        write(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "write", full)
    refused, at = "local", EVERY
    trainer = trainer_of(tmp_path / "full", text, digits)
    Local(trainer).learn()
    assert "no checkpoint of local step 4: the disk is full; learning goes on" in _told(trainer)
    refused, at = "checkpoints", 0

    class Killed(Exception):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    trainer = trainer_of(tmp_path / "full", text, digits)
    monkeypatch.setattr(trainer, "_train_step", kill)
    with pytest.raises(Killed):
        trainer.run(publish=False)
    refused = ""
    monkeypatch.setattr(Local, "_learn_step", lambda self: pytest.fail("it had learnt all of it"))
    trainer_of(tmp_path / "full", text, digits).run(publish=False)
    assert_same_end(tmp_path / "full", tmp_path / "whole")
    assert not (tmp_path / "full" / "device" / "local").exists()


def test_a_full_disk_at_its_end_ends_no_run(digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RunFolderError("the disk is full")

    monkeypatch.setattr(RunFolder, "write_alone", full)
    trainer = trainer_of(tmp_path, text_of(0.2), digits)
    assert trainer.run(publish=False)["local"]["accuracy"] > 0
    assert "may not be kept beyond this run: the disk is full" in _told(trainer)
    assert "it was not kept, as on a full disk" in failed(
        cli, "evaluate", "alone", "--data", "digits", "--run", tmp_path / "device"
    )


def test_tied_weights_and_short_ones_are_kept(digits: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, text_of(0.5), digits)
    trainer.head.layers.register_parameter("tied", next(trainer.head.layers.parameters()))
    trainer.head.layers.register_buffer("short", torch.ones(2, dtype=torch.bfloat16))  # which numpy does not know
    alone = Local(trainer)
    alone.keep()
    assert Checkpoints(alone.checkpoints.folder, alone.checkpoints.run_id, alone.checkpoints.digest).sound() == (
        [0],
        [],
    )


def test_the_summary_of_a_run_that_went_on_knows_what_was_learnt_alone(digits: Dataset, tmp_path: Path) -> None:
    text = text_of(0.5, schedule="phases = [[4, 0.6]]")
    whole = inprocess.train(text, digits, folder=tmp_path / "whole")
    leg(tmp_path / "killed", text, digits, until=5)
    found = leg(tmp_path / "killed", text, digits)
    assert found and found["local"] == whole["local"]
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
