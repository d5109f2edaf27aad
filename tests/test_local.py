"""The head learns alone before the run: what that is worth, that it costs no byte, and that no fault is lost by it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks import inprocess, pair
from benchmarks.recipes import recipe_text
from common.errors import DataError, DivergedError, MismatchError, ModelError, RecipeError
from common.importance import principal_components
from common.recipe import parse
from device_client import batches
from device_client.alone import Classifier
from device_client.basis import principal_basis
from device_client.cli import cli
from device_client.data import Dataset, Part
from device_client.inputs import training_batch
from device_client.local import Local
from tests.alone import text_of, trainer_of
from tests.conftest import failed, train
from tests.legs import outcome


def test_a_head_that_learnt_alone_is_worth_much(digits: Dataset, tmp_path: Path) -> None:
    alone = inprocess.train(text_of(3), digits, folder=tmp_path / "alone")
    drawn = inprocess.train(text_of(0), digits, folder=tmp_path / "drawn")
    assert alone["local"] == {"epochs": 3, "steps": 60, "accuracy": pytest.approx(0.9, abs=0.07)}
    assert "local" not in drawn
    assert alone["accuracy"] > drawn["accuracy"] + 0.03
    assert not list((tmp_path / "alone" / "device").glob("local*")), "what it went on from is not needed any more"


def test_components_are_of_what_a_head_that_has_learnt_nothing_will_send(digits: Dataset, tmp_path: Path) -> None:
    """Normalised by the batch, as in its first steps: batch norm has no statistics yet, and gets none by looking."""
    text = text_of(0, "phases = [[4, 1]]", "principal", data="batch = 32\nevaluation_batch = 1")
    trainer = trainer_of(tmp_path, text, digits)
    before = [buffer.clone() for buffer in trainer.head.buffers()]
    principal_basis(trainer.head, trainer.data.train, trainer.recipe, trainer.batch, None)
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.head.buffers(), strict=True))
    trainer.head.train()
    inputs, _ = training_batch(trainer.recipe, digits.train, 3, 128)
    with torch.no_grad():
        sent = trainer.head(inputs).transpose(0, 1).flatten(1)
    spread = sent.cov().diagonal()
    best = torch.linalg.eigvalsh(sent.cov()).flip(0)
    assert spread[:4].sum() > 0.9 * best[:4].sum(), (spread[:4].sum(), best[:4].sum())


def test_it_costs_no_byte_but_the_basis(digits: Dataset, tmp_path: Path) -> None:
    """Beside what is sent, whose size depends on what was learnt, all is as in a run without."""
    without = inprocess.train(text_of(0, start="principal"), digits)["bytes"]
    with_it = inprocess.train(text_of(0.2), digits)["bytes"]
    for way in ("up", "down"):
        for books in (without, with_it):
            for role in ("activation", "evaluation"):
                books[way]["by_role"].pop(role, None)
            # The recipe is part of what opens a session.
            books[way]["by_role"]["control"] = books[way]["by_role"].get("control", {}).get("payload")
        assert with_it[way]["by_role"] == without[way]["by_role"]


def test_its_sensitivity_reaches_the_basis(digits: Dataset, tmp_path: Path) -> None:
    """And that of a run before, which is of another head by now, does not."""
    inprocess.train(recipe_text(schedule="phases = [[0, 0.5]]"), digits, folder=tmp_path / "source")
    source = tmp_path / "source"
    model = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "run:{source}"'
    bases = []
    for number, (start, init) in enumerate((("auto", False), ("principal", False), ("auto", True))):
        more = {"model": model} if init else {}
        trainer = trainer_of(tmp_path / str(number), text_of(0.2, start=start, **more), digits)
        trainer.learn_alone()
        assert (trainer.sensitivity is None) == (start == "principal")
        trainer.fit(publish=False)
        assert trainer.sensitivity is None
        assert trainer.basis is not None
        trainer.remote._stub.close()  # before its folder is collected
        bases.append(trainer.basis)
    # Components by variance alone are orthonormal; weighted ones are not.
    weighted, by_variance, after_init = (np.abs(basis[:-1] @ basis[:-1].T - np.eye(32)).max() for basis in bases)
    assert by_variance < 1e-4 < min(weighted, after_init)


def test_its_sensitivity_says_what_to_send(digits: Dataset, tmp_path: Path) -> None:
    """With three directions of 32 left the classifier does better by those it listens to than by the loudest."""
    trainer = trainer_of(tmp_path, text_of(2), digits)
    alone = Local(trainer)
    alone.learn()
    told = alone.sensitivity()
    assert torch.allclose(told, told.T) and told.trace() > 0
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

        assert loss(told) < 0.9 * loss(None)


def test_a_loss_that_is_not_finite_stops_it(digits: Dataset, tmp_path: Path) -> None:
    alone = Local(trainer_of(tmp_path, text_of(1, optimiser="lr = 1e18"), digits))
    with pytest.raises(DivergedError, match=r"local step \d+ is not finite.*give a local\.lr below 1e\+18"):
        alone.learn()
    assert not alone.checkpoints.written


@pytest.mark.parametrize("shape", [(5, 24), (5, 24, 9), (5, 24, 7, 1)])
def test_the_classifier_takes_whatever_lies_at_a_cut(shape: tuple[int, ...]) -> None:
    assert Classifier(24, len(shape) - 2, 3)(torch.randn(shape)).shape == (5, 3)


def test_its_own_learning_rate_and_its_own_views(digits: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, text_of(1, local="epochs = 1\nlr = 0.003"), digits)
    alone, seen = Local(trainer), list[torch.Tensor]()
    alone.classifier.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    alone._learn_step()
    assert alone.optimiser.lr == pytest.approx(0.003)
    pictures, _ = training_batch(trainer.recipe, digits.train, 0, trainer.batch)
    with torch.no_grad():
        assert not torch.allclose(trainer.head.layers(pictures), seen[0], atol=0.1)


def test_recipes_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match=r"local\.epochs is above 0 and data\.batch is 1"):
        parse(text_of(1, data="batch = 1"))
    with pytest.raises(RecipeError, match="local.epochs is -1"):
        parse(text_of(-1))
    with pytest.raises(RecipeError, match=r'method "plain" is what others are compared with: local\.epochs must be 0'):
        parse(recipe_text(local="epochs = 1"))
    assert parse(text_of(1)).weighted and parse(text_of(1)).principal
    assert not parse(text_of(0)).principal


def test_pictures_that_do_not_fit_are_refused_before_all_is_learnt(digits: Dataset, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="the pictures have 3 classes, the recipe test-fixed has 10"):
        trainer_of(tmp_path, text_of(1), replace(digits, classes=("a", "b", "c"))).learn_alone()
    one = replace(digits, train=Part(digits.train.pictures[:1], digits.train.labels[:1]))
    with pytest.raises(DataError, match="one training picture is too few"):
        trainer_of(tmp_path / "one", text_of(1), one).learn_alone()
    model = 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stem_fold"'
    with pytest.raises(ModelError, match="before the cut stem_fold there is nothing that could learn"):
        trainer_of(tmp_path / "fold", text_of(1, model=model), digits).learn_alone()


def test_two_processes_whose_server_is_another_afterwards(tmp_path: Path) -> None:
    """The device does not need its server meanwhile: that may go, and come back as if nothing had been opened."""
    text = text_of(3, schedule="phases = [[4, 0.2]]")
    left = tmp_path / "whole" / "device" / "local" / "step-000000000005.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of another run")
    refused = failed(
        cli, "train", "127.0.0.1:1", "--data", "digits", "--run", tmp_path / "whole" / "device", "--overwrite"
    )
    assert "no server answers" in refused and left.exists(), "nothing is deleted before there is a server"
    whole = train(tmp_path / "whole", text, device=("--overwrite",))
    assert "The head learns alone for 3 epochs" in whole.output and "local step" in whole.output
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
    # The server that was started anew has not handed out the head itself, and its books have it all the same.
    mine, other, theirs = (
        json.loads((folder / side / "summary.json").read_text())["bytes"]
        for folder, side in ((tmp_path, "device"), (tmp_path, "server"), (tmp_path / "whole", "server"))
    )
    for way in ("up", "down"):
        assert mine[way]["by_role"] == other[way]["by_role"]
        assert (
            other[way]["by_role"]["activation" if way == "up" else "weights"]
            == (theirs[way]["by_role"]["activation" if way == "up" else "weights"])
        )
