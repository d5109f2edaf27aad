"""Nested widths: one trained network that serves each of them, with the batch-norm statistics of that width."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import pair
from benchmarks.recipes import BATCH, recipe_text
from common import halves
from common import recipe as recipes
from common.errors import RecipeError
from common.norms import Norms
from common.run import RunFolder
from edge_server.host import Host
from edge_server.judging import judge
from tests.conftest import Run, train
from tests.test_put_back import begun


@pytest.fixture(scope="module")
def nested_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    text = recipe_text(
        "deprune",
        bottleneck='kind = "linear"',
        codec='activation = "step:20"\ngradient = "step:10"',
        schedule="phases = [{ width = 8, epochs = 2, nested = [2, 4] }]",
    )
    return train(tmp_path_factory.mktemp("nested"), text)


def test_every_step_draws_its_width_and_both_sides_the_same(nested_run: Run) -> None:
    widths = [line["width"] for line in nested_run.metrics("device")]
    assert widths == [line["width"] for line in nested_run.metrics("server")]
    counts = {width: widths.count(width) for width in (2, 4, 8)}
    assert sum(counts.values()) == len(widths) and min(counts.values()) > len(widths) / 5


def test_the_finished_run_serves_each_width_that_it_was_trained_for(nested_run: Run, tmp_path: Path) -> None:
    run = nested_run.path / "device"
    with pair.server("--run", nested_run.path / "server", log=tmp_path / "log") as (_, address):
        judged = [
            json.loads(
                pair.device(
                    "evaluate", address, "--data", "digits", "--run", run, "--json", *width, capture_output=True
                ).stdout
            )
            for width in ((), ("--width", 8), ("--width", 2))
        ]
        refused = pair.device(
            "evaluate", address, "--data", "digits", "--run", run, "--width", 3, capture_output=True
        ).stderr
    assert [answer["width"] for answer in judged] == [8, 8, 2]
    last, same, narrow = judged
    assert last == same and last["accuracy"] == pytest.approx(nested_run.summary("device")["accuracy"], abs=1e-4)
    # With the statistics of another width it would be little better than chance.
    assert narrow["accuracy"] > 0.7 and narrow["bytes"]["up"] < 0.5 * last["bytes"]["up"]
    assert "width 2/4/8." in nested_run.output and "That is at width 8; evaluate --width judges" in nested_run.output
    assert "this network was trained for 2, 4, 8" in " ".join(refused.split())


def test_each_width_keeps_its_own_statistics() -> None:
    layers = nn.Sequential(nn.BatchNorm1d(1))
    norms = Norms(layers, (2, 4))
    mean = layers[0].running_mean
    for width, value in ((2, 20.0), (4, 40.0), (8, 80.0)):
        norms.switch(width)
        mean.fill_(value)
    for width, value in ((2, 20.0), (4, 40.0)):
        norms.switch(width)
        assert mean.item() == value
    mean.fill_(41.0)
    norms.put_away()
    assert torch.equal(norms.get_buffer("0_running_mean_at_4"), mean)


def test_a_width_begins_with_what_the_layers_have_learnt_before_it() -> None:
    """In a phase that is not the first that is much: with what batch norm begins with, 99 % right became 37."""
    layers = nn.Sequential(nn.BatchNorm1d(1))
    norms, mean = Norms(layers, (2, 4)), layers[0].running_mean
    norms.switch(8)  # a phase that draws no widths
    mean.fill_(80.0)
    norms.switch(2)
    assert mean.item() == 80.0
    mean.fill_(20.0)
    norms.switch(4)
    assert mean.item() == 20.0
    mean.fill_(40.0)
    norms.switch(2)
    assert mean.item() == 20.0
    again = Norms(nn.Sequential(nn.BatchNorm1d(1)), (2, 4))
    norms.put_away()
    again.load_state_dict(norms.state_dict())
    again.switch(4)
    assert next(iter(again._used.values())).item() == 40.0, "what has begun is known where it was read"
    late = Norms(layers, (2, 4, 6))
    late.switch(2)
    mean.fill_(22.0)
    late.put_away()
    late.complete()
    assert late.get_buffer("0_running_mean_at_6").item() == 22.0, "and what never has is as what has"


def test_norms_whose_names_look_alike_are_kept_apart() -> None:
    layers = nn.ModuleDict(
        {"a_b": nn.ModuleDict({"n": nn.BatchNorm2d(3)}), "a": nn.ModuleDict({"b_n": nn.BatchNorm2d(3)})}
    )
    norms = Norms(layers, (2, 4))
    for width in (2, 4):
        norms.switch(width)
        layers["a_b"]["n"].running_mean.fill_(width)
        layers["a"]["b_n"].running_mean.fill_(10 * width)
    norms.switch(2)
    assert layers["a_b"]["n"].running_mean.unique().tolist() == [2.0]
    assert layers["a"]["b_n"].running_mean.unique().tolist() == [20.0]


def test_a_tail_that_is_written_has_what_each_width_learnt_in_its_own_place() -> None:
    """Also the width that it stands at, whose statistics are in the layers until then."""
    schedule = "phases = [{ width = 8, epochs = 1, nested = [2, 4] }]"
    tail = halves.build(recipes.parse(recipe_text("deprune", bottleneck='kind = "linear"', schedule=schedule))).tail
    for width in (8, 4, 8):
        tail.resize(width)
    for name, value in tail.layers.named_buffers():
        if name.endswith("running_mean"):
            value.fill_(7)
    tail.settle(8)
    places = {name: value for name, value in tail.norms.named_buffers() if "running_mean_at" in name}
    assert places
    for name, value in places.items():  # of width 2, which had no step, those of the widest
        assert (value == (0 if name.endswith("_at_4") else 7)).all(), name


def test_what_the_loss_feels_is_noted_where_all_channels_cross(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = "phases = [{ width = 8, epochs = 50, nested = [2, 4] }]"
    text = recipe_text("deprune", bottleneck='kind = "linear"', schedule=phases)
    host = Host.to_train(recipes.parse(text), text, RunFolder(tmp_path / "run"), Console(quiet=True), (), False)
    begun(host)
    assert host.run and host.run.training
    training, noted, came = host.run.training, [], set()
    monkeypatch.setattr(halves.Tail, "note_sensitivity", lambda _, gradient: noted.append(gradient.shape[1]))
    for _ in range(60):
        came.add(training.sent_shape[1])
        training.learn(np.ones(training.sent_shape, np.float32), BATCH[1])
        training.apply()
    assert came == {2, 4, 8} and set(noted) == {8}


def test_an_evaluation_waits_for_another_that_may_be_at_another_width() -> None:
    made = halves.build(recipes.parse(recipe_text()))
    made.tail.eval()
    thread = threading.Thread(target=judge, args=(made, *BATCH, 32, "fp32"))
    with made.lock:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("nested", ["[8]", "[2, 2]", "[0]"])
def test_nested_widths_are_different_and_narrower(nested: str) -> None:
    text = recipe_text(
        "deprune", bottleneck='kind = "linear"', schedule=f"phases = [{{ width = 8, epochs = 1, nested = {nested} }}]"
    )
    with pytest.raises(RecipeError, match="different widths, each below width"):
        recipes.parse(text)
