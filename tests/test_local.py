"""The head learns alone before the run: what that is worth, that it costs no byte, and that no fault is lost by it."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional

from benchmarks import inprocess, pair
from benchmarks.recipes import recipe_text
from common.bottleneck import principal_components
from common.errors import DivergedError, RecipeError
from common.meter import DOWN, UP
from common.recipe import parse
from common.run import RunFolder
from device_client import batches, local
from device_client.data import Dataset, load
from device_client.local import Classifier, Local
from device_client.remote_tail import RemoteTail
from device_client.trainer import Trainer
from edge_server.servicer import Servicer
from tests.conftest import train
from tests.test_resume import assert_same_end, outcome, server_of

CODEC = 'activation = "step:10"\ngradient = "step:5"'
FROZEN = "phases = [{ width = 4, epochs = 2, views = 1 }]"


def _text(epochs: float, schedule: str = FROZEN, kind: str = "linear", **more: str) -> str:
    return recipe_text(
        "fixed", bottleneck=f'kind = "{kind}"', codec=CODEC, schedule=schedule, local=f"epochs = {epochs}", **more
    )


def _trainer(path: Path, text: str, data: Dataset) -> Trainer:
    """A device that has opened its session with a server in this process."""
    folder = RunFolder(path / "device")
    remote = RemoteTail("127.0.0.1:1", stub=inprocess.Stub(Servicer(server_of(path, text))))
    remote.open(trains=True)
    trainer = Trainer(remote, data, folder, Console(file=io.StringIO()))
    trainer.prepare((), None)
    folder.start(text)
    return trainer


def test_a_head_that_learnt_alone_is_worth_much(digits: Dataset, tmp_path: Path) -> None:
    alone = inprocess.train(_text(3), digits, folder=tmp_path / "alone")
    drawn = inprocess.train(_text(0), digits, folder=tmp_path / "drawn")
    assert alone["local"] == {"epochs": 3, "steps": 60, "accuracy": pytest.approx(0.9, abs=0.07)}
    assert drawn["local"] is None
    assert alone["accuracy"] > drawn["accuracy"] + 0.03
    assert not list((tmp_path / "alone" / "device").glob("local*")), "what it went on from is not needed any more"


def test_it_costs_no_byte(digits: Dataset, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, _text(0.2), digits)
    meter = trainer.remote.meter
    before = meter.total(UP), meter.total(DOWN)
    trainer.learn_alone()
    assert trainer.local is not None and (meter.total(UP), meter.total(DOWN)) == before


@pytest.mark.parametrize("until", [1, 7, 19])
def test_a_device_that_dies_goes_on_to_the_same_weights(
    until: int, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "EVERY", 6)
    text = _text(1, schedule="phases = [[4, 0.2]]")
    inprocess.train(text, digits, folder=tmp_path / "whole")

    learn, made = Local._learn_step, list[int]()

    def dying(self: Local) -> tuple[float, int]:
        if len(made) == until:
            raise KeyboardInterrupt
        made.append(self.step)
        return learn(self)

    monkeypatch.setattr(Local, "_learn_step", dying)
    with pytest.raises(KeyboardInterrupt):
        _trainer(tmp_path / "killed", text, digits).run(publish=False)
    monkeypatch.setattr(Local, "_learn_step", lambda self: (made.append(self.step), learn(self))[1])
    trainer = _trainer(tmp_path / "killed", text, digits)
    trainer.run(publish=False)
    assert made == [*range(until), *range(until - until % 6, 20)]
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_a_device_that_dies_between_learning_alone_and_its_first_step(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _text(0.5)
    inprocess.train(text, digits, folder=tmp_path / "whole")
    fit = Trainer.fit

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        _trainer(tmp_path / "killed", text, digits).run(publish=False)
    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr(Local, "_learn_step", lambda self: pytest.fail("it had learnt all of it"))
    _trainer(tmp_path / "killed", text, digits).run(publish=False)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_other_pictures_and_another_start_are_learnt_from_anew(digits: Dataset, tmp_path: Path) -> None:
    def going_on(text: str, data: Dataset) -> int:
        alone = Local(_trainer(tmp_path, text, data))
        good, _ = alone.checkpoints.sound()
        alone.learn()
        return len(good)

    assert going_on(_text(0.3), digits) == 0
    assert going_on(_text(0.3), digits) == 1
    assert going_on(_text(0.3), load("digits", (1, 16, 16), 4, 0.0, limit=640)) == 0
    assert going_on(_text(0.3, optimiser="lr = 0.04"), digits) == 0


def test_what_it_has_felt_says_what_to_send(digits: Dataset, tmp_path: Path) -> None:
    """With three directions of 32 left the classifier does better by those it listens to than by the loudest."""
    trainer = _trainer(tmp_path, _text(2), digits)
    alone = Local(trainer)
    alone.learn()
    felt = alone.sensitivity()
    assert torch.allclose(felt, felt.T) and felt.trace() > 0
    trainer.head.eval()
    data, encoder = trainer.recipe.data, trainer.head.bottleneck.weight.detach()
    with torch.no_grad():
        inputs = torch.from_numpy(batches.normalise(digits.test.pictures, data.mean, data.std))
        activation = trainer.head.layers(inputs)
        sent = torch.einsum("ij,bjhw->bihw", encoder, activation)

        def loss(sensitivity: torch.Tensor | None) -> float:
            components, mean = principal_components([sent], sensitivity)
            centred = sent - mean[:, None, None]
            left = torch.linalg.inv(components)[:, :3] @ components[:3]
            back = torch.einsum("ij,bjhw->bihw", encoder.T @ left, centred) + (encoder.T @ mean)[:, None, None]
            return float(functional.cross_entropy(alone.classifier(back), torch.from_numpy(digits.test.labels).long()))

        assert loss(felt) < 0.9 * loss(None)


def test_a_loss_that_is_not_finite_stops_it(digits: Dataset, tmp_path: Path) -> None:
    alone = Local(_trainer(tmp_path, _text(1, optimiser="lr = 1e18"), digits))
    with pytest.raises(DivergedError, match=r"local step \d+ is not finite.*lower local\.lr"):
        alone.learn()
    assert not alone.checkpoints.written


@pytest.mark.parametrize("shape", [(5, 24), (5, 24, 9), (5, 24, 7, 1)])
def test_the_classifier_takes_whatever_lies_at_a_cut(shape: tuple[int, ...]) -> None:
    assert Classifier(24, len(shape) - 2, 3)(torch.randn(shape)).shape == (5, 3)


def test_recipes_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="local.epochs is -1"):
        parse(_text(-1))
    with pytest.raises(RecipeError, match=r'method "plain" is what others are compared with: local\.epochs must be 0'):
        parse(recipe_text(local="epochs = 1"))
    assert parse(_text(1)).weighted and parse(_text(1)).principal
    assert not parse(_text(0)).principal


def test_two_processes_whose_server_is_another_afterwards(tmp_path: Path) -> None:
    """The device does not need its server meanwhile: that may go, and come back as if nothing had been opened."""
    text = _text(6, schedule="phases = [[4, 0.2]]")
    whole = train(tmp_path / "whole", text)
    assert "The head learns alone for 6 epochs" in whole.output and "local step" in whole.output
    recipe, log = tmp_path / "recipe.toml", tmp_path / "device.log"
    recipe.write_text(text)
    serve = (recipe, "--run", tmp_path / "server", "--once", "--threads", 1)
    with pair.server(*serve, log=tmp_path / "first.log") as (first, address):
        device = pair.start(
            "device-client", "train", address, "--data", "digits", "--run", tmp_path / "device", "--threads", 1, log=log
        )
        try:
            deadline = time.monotonic() + 60
            while "local step" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.02)
            first.kill()
            first.wait()
            assert "takes over" not in log.read_text(), "too late to be of use"
            with pair.server(*serve, log=tmp_path / "second.log", listen=address) as (second, _):
                assert device.wait(timeout=120) == 0, log.read_text()
                assert second.wait(timeout=30) == 0
        finally:
            device.kill()
    for name, value in outcome(tmp_path)[0].items():
        assert torch.equal(value, outcome(tmp_path / "whole")[0][name]), name
