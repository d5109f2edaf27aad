"""First weights: of the whole model, of a run that was cut elsewhere or was narrower; models that cannot be trained."""

from __future__ import annotations

import copy
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from rich.console import Console
from torch import nn

from benchmarks import inprocess
from benchmarks.recipes import recipe_text
from common import halves, models, weights
from common.errors import MismatchError, ModelError, RunFolderError
from common.importance import principal_components
from common.inherit import adopt
from common.recipe import load, parse
from common.run import Manifest, RunFolder
from common.schedule import Phase
from device_client import basis, data
from device_client.data import Dataset, Part
from device_client.remote_tail import RemoteTail
from device_client.trainer import Trainer
from edge_server.budget import Beside
from edge_server.host import Host
from edge_server.initial import initial_weights
from edge_server.servicer import Servicer
from tests import legs
from tests.conftest import Run
from tests.legs import assert_same_end, leg


def test_whole_model_weights_are_split(tmp_path: Path) -> None:
    torch.manual_seed(99)
    whole = models.build("tiny", (1, 16, 16), 10).eval()
    path = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(whole.state_dict(), path)
    table = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "{path}"'
    recipe = parse(recipe_text("fixed", model=table))
    first = initial_weights(recipe, halves.build(recipe), ())
    fresh = halves.build(recipe)
    x = torch.randn(2, 1, 16, 16)
    first.fill(fresh)
    assert not first.run_id
    with torch.no_grad():
        same = models.channels_last(copy.deepcopy(whole))
        assert torch.equal(fresh.tail.eval()(fresh.head.eval()(x)), same(x))

    other = models.build("tiny", (1, 16, 16), 7).state_dict()
    for wrong in (other, whole.state_dict() | {"more.weight": torch.zeros(1)}):
        safetensors.torch.save_file(wrong, path)
        with pytest.raises(ModelError, match="of another model"):
            initial_weights(recipe, halves.build(recipe), ())


def test_every_nested_width_begins_with_the_statistics_of_the_first_weights(tmp_path: Path) -> None:
    whole = models.build("tiny", (1, 16, 16), 10)
    for name, value in whole.named_buffers():
        if name.endswith("running_mean"):
            value.fill_(7)
    path = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(whole.state_dict(), path)
    table = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "{path}"'
    phases = "phases = [{ width = 8, epochs = 1, nested = [2] }]"
    recipe = parse(recipe_text("fixed", model=table, bottleneck='kind = "linear"', schedule=phases))
    fresh = halves.build(recipe)
    initial_weights(recipe, halves.build(recipe), ()).fill(fresh)
    fresh.tail.resize(2)
    for name, value in fresh.tail.layers.named_buffers():
        if name.endswith("running_mean"):
            assert (value == 7).all(), name
    assert fresh.tail.norms.begun.all()


def test_no_head_of_another_run_is_taken(few: Dataset, tmp_path: Path) -> None:
    """Neither by the server, which looks for one beside the tail, nor by a device that is given a folder."""
    text = recipe_text(data="batch = 32", schedule="phases = [[0, 0.2]]")
    for name in ("one", "two"):
        inprocess.train(text, few, folder=tmp_path / name)
    away, other = tmp_path / "away", tmp_path / "one" / "device"
    other.rename(away)
    (tmp_path / "two" / "device").rename(other)
    table = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "run:{tmp_path}/one"'
    text = recipe_text("fixed", model=table)
    host = Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(quiet=True), (), False)
    first = host.run and host.run.initial
    assert first and not first.head
    assert first.run_id == RunFolder(tmp_path / "one" / "server").read()[2].run_id
    remote = RemoteTail("127.0.0.1:1", stub=inprocess.Stub(Servicer(host)))
    remote.open(trains=True)
    trainer = Trainer(remote, few, RunFolder(tmp_path / "mine"), Console(quiet=True))
    trainer.prepare((), RunFolder(away))
    with pytest.raises(MismatchError, match="holds the head of run"):
        trainer.prepare((), RunFolder(other))


def test_a_run_of_another_model_is_no_start(plain_run: Run) -> None:
    table = (
        f'name = "resnet20"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_2_relu2"\ninit = "run:{plain_run.path}"'
    )
    recipe = parse(recipe_text("fixed", model=table))
    with pytest.raises(RunFolderError, match="trained tiny; the recipe has resnet20"):
        initial_weights(recipe, halves.build(recipe), ())


def test_a_run_goes_on_at_another_cut(plain_run: Run, deprune_run: Run) -> None:
    table = 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "{}"\ninit = "run:{}"'
    recipe = parse(recipe_text("fixed", model=table.format("stage2_1_relu2", plain_run.path)))
    fresh, trained = halves.build(recipe), halves.build(load(plain_run.recipe)[0])
    initial = initial_weights(recipe, fresh, ())
    initial.fill(fresh)
    run_id, accuracy = (plain_run.summary("server")[name] for name in ("run_id", "accuracy"))
    assert initial.told == f"run {run_id} in {plain_run.path / 'server'}, {accuracy:.2%} at width 32"
    for side, name, half in (("device", "head", trained.head), ("server", "tail", trained.tail)):
        RunFolder(plain_run.path / side).fill_half(name, half)
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        expected = trained.tail.eval()(trained.head.eval()(x))
        torch.testing.assert_close(fresh.tail.eval()(fresh.head.eval()(x)), expected)
    recipe = parse(recipe_text("fixed", model=table.format("stage2_1_relu2", deprune_run.path)))
    with pytest.raises(RunFolderError, match="without a linear bottleneck"):
        initial_weights(recipe, halves.build(recipe), ())


@pytest.mark.parametrize("cut", ["stage1_relu2", "stage2_1_relu2"])
def test_a_run_goes_on_with_another_number_of_classes(plain_run: Run, cut: str) -> None:
    """All that it has learnt is taken over but the classifier, which begins anew."""
    model = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 4\ncut = "{cut}"\ninit = "run:{plain_run.path}"'
    recipe = parse(recipe_text("fixed", model=model))
    fresh, trained = halves.build(recipe), halves.build(load(plain_run.recipe)[0])
    drawn = {name: value.clone() for name, value in fresh.tail.layers.state_dict().items() if "fc" in name}
    initial_weights(recipe, fresh, ()).fill(fresh)
    RunFolder(plain_run.path / "server").fill_half("tail", trained.tail)
    learnt = trained.tail.layers.state_dict()
    for name, value in fresh.tail.layers.state_dict().items():
        assert torch.equal(value, drawn[name] if name in drawn else learnt[name]), name
    assert len(drawn) == 2 and drawn["fc.bias"].shape == (4,)


def test_going_on_from_a_narrower_bottleneck_keeps_its_map() -> None:
    """Channels that were never sent are noise, and must not be among the principal components of those that were."""
    recipe = parse(recipe_text("deprune", bottleneck='kind = "linear"', schedule="phases = [[2, 1], [8, 1]]"))
    trained, fresh = halves.build(recipe), halves.build(recipe)
    torch.manual_seed(5)
    with torch.no_grad():
        for half in (trained.head, trained.tail):
            half.bottleneck.weight.normal_()
            half.bottleneck.bias.normal_()
    manifest = Manifest("run", recipe.digest(), (), Phase(0, 0, 8, "fp32", "fp32", 0.1, 0, 1))
    for new, old in ((fresh.head, trained.head), (fresh.tail, trained.tail)):
        adopt(new, old.state_dict(), recipe, recipe, manifest)
    activation = torch.randn(64, trained.channels, 4, 4).relu()

    def mapped(of: halves.Halves, width: int) -> torch.Tensor:
        for half in (of.head, of.tail):
            half.bottleneck.resize(width)
        with torch.no_grad():
            return of.tail.bottleneck(of.head.bottleneck(activation))

    expected = mapped(trained, 8)
    fresh.head.bottleneck.resize(fresh.channels)
    components, mean = principal_components([fresh.head.bottleneck(activation)])
    fresh.head.bottleneck.rotate(components, mean)
    fresh.tail.rotate(components, mean)
    assert (mapped(fresh, 8) - expected).norm() < 1e-3 * expected.norm()


def test_channels_that_were_never_sent_are_closed_to_a_linear_bottleneck() -> None:
    source = parse(recipe_text("fixed", bottleneck='kind = "channels"', schedule="phases = [[8, 1]]"))
    recipe = parse(recipe_text("fixed", bottleneck='kind = "linear"', schedule="phases = [[4, 1]]"))
    order = tuple(np.random.default_rng(2).permutation(32).tolist())
    manifest = Manifest("run", source.digest(), (), Phase(0, 0, 8, "fp32", "fp32", 0.1, 0, 1, order))
    trained, fresh = halves.build(source), halves.build(recipe)
    for new, old in ((fresh.head, trained.head), (fresh.tail, trained.tail)):
        adopt(new, old.state_dict(), recipe, source, manifest)
        old.bottleneck.resize(8, order)
    pictures = torch.rand(16, 1, 16, 16)
    with torch.no_grad():
        for half in (trained.head, trained.tail, fresh.head, fresh.tail):
            half.eval()
        expected = trained.tail(trained.head(pictures))
        for width in (32, 8):
            for half in (fresh.head, fresh.tail):
                half.bottleneck.resize(width)
            assert torch.allclose(fresh.tail(fresh.head(pictures)), expected, atol=1e-4), width


def test_pruning_a_run_by_channels_keeps_to_those_that_it_sent(tmp_path: Path) -> None:
    channels = 'kind = "channels"\nranking_steps = 2'
    few = data.load("digits", (1, 16, 16), 3, 0.0, limit=320)
    wide = recipe_text("fixed", bottleneck=channels, schedule="phases = [[8, 0.5]]")
    inprocess.train(wide, few, folder=tmp_path / "wide")
    _, _, manifest = RunFolder(tmp_path / "wide" / "server").read()
    model = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "run:{tmp_path}/wide"'
    narrow = recipe_text("prune", model=model, bottleneck=channels, schedule="phases = [[3, 0.5]]")
    inprocess.train(narrow, few, folder=tmp_path / "narrow")
    _, _, pruned = RunFolder(tmp_path / "narrow" / "server").read()
    assert set(pruned.phase.order[:8]) == set(manifest.phase.order[:8]) and pruned.phase.width == 3


def test_principal_components_are_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder lists one class after the other."""
    digits = data.load("digits", (1, 16, 16), 3, 0.0, limit=400)
    order = np.argsort(digits.train.labels, kind="stable")
    sorted_ = Part(digits.train.pictures[order], digits.train.labels[order])
    seen: list[Part] = []
    for name in ("_sent", "_sent_in_training"):
        whole = getattr(basis, name)
        monkeypatch.setattr(basis, name, lambda head, *rest, whole=whole: seen.append(rest[0]) or whole(head, *rest))
    bottleneck = 'kind = "linear"\nstart = "principal"\nprincipal_pictures = 64'
    for phase in ("[4, 0.1]", "{ width = 4, epochs = 0.1, views = 0.1 }"):
        text = recipe_text("fixed", bottleneck=bottleneck, schedule=f"phases = [{phase}]")
        inprocess.train(text, Dataset(digits.classes, sorted_, digits.validation, digits.test, ()))
    assert [len(part) for part in seen] == [64, 64]
    assert all(len(set(part.labels.tolist())) == 10 for part in seen)


def test_tied_weights_can_be_kept() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    again = weights.from_bytes(weights.to_bytes(tied), "here")
    assert torch.equal(again["0.weight"], again["1.weight"])


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 12), nn.Linear(12, 10)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.first(pictures.mean(dim=(1, 2)))
        logits = self.second(hidden)
        return logits, logits


class SevenOutputs(TwoOutputs):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.second(self.first(pictures.mean(dim=(1, 2))))[:, :7]


def two_outputs(_input: tuple[int, ...], _classes: int) -> nn.Module:
    return TwoOutputs()


def seven_outputs(_input: tuple[int, ...], _classes: int) -> nn.Module:
    return SevenOutputs()


@pytest.mark.parametrize(
    ("factory", "words"), [("two_outputs", "that is no tensor"), ("seven_outputs", r"shape \[7\]")]
)
def test_models_whose_output_is_not_one_number_a_class(factory: str, words: str, tmp_path: Path) -> None:
    name = f"tests.test_initial:{factory}"
    text = recipe_text(model=f'name = "{name}"\ninput = [1, 16, 16]\nclasses = 10\ncut = "first"')
    with pytest.raises(ModelError, match=words):
        Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(file=io.StringIO()), (name,), False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("first", ["", "{ width = 0, epochs = 1 }, ", "{ width = 32, epochs = 1 }, "])
def test_channels_cannot_be_ranked_where_no_gradient_comes_back(first: str, tmp_path: Path) -> None:
    schedule = f"phases = [{first}{{ width = 4, epochs = 2, views = 1 }}]"
    model = 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "x.safetensors"'
    text = recipe_text("prune", model=model, bottleneck='kind = "channels"', schedule=schedule)
    with pytest.raises(ModelError, match="none comes back in a phase with views: put a phase without views before it"):
        Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(file=io.StringIO()), (), False)


def test_nested_widths_that_cannot_cross(tmp_path: Path) -> None:
    schedule = "phases = [{ width = 0, epochs = 1, nested = [2, 64] }]"
    text = recipe_text("fixed", bottleneck='kind = "linear"', schedule=schedule)
    with pytest.raises(ModelError, match=r"nested \[2, 64\], and 32 channels cross"):
        Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(file=io.StringIO()), (), False)


def test_a_width_that_cannot_cross(tmp_path: Path) -> None:
    text = recipe_text("fixed", bottleneck='kind = "linear"', schedule="phases = [[33, 1]]")
    with pytest.raises(ModelError, match="only 32 channels cross the cut"):
        Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(file=io.StringIO()), (), False)


def pooled(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(shape[0], 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, classes),
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_that_batch_norm_cannot_take_is_refused_at_the_start(batch: int, tmp_path: Path) -> None:
    name = "tests.test_initial:pooled"
    model = f'name = "{name}"\ninput = [1, 16, 16]\nclasses = 10\ncut = "_1"'
    text = recipe_text(model=model).replace("batch = 32", f"batch = {batch}")
    arguments = (parse(text), text, RunFolder(tmp_path / "run"), Console(file=io.StringIO()), (name,), False)
    if batch > 1:
        host = Host.to_train(*arguments)
        assert host.run
        with pytest.raises(ModelError, match="cannot be trained with one picture .*; give more"):
            host.run.begin(1, tuple("0123456789"), "", Beside())
        assert not host.run.training
        host.run.begin(2, tuple("0123456789"), "", Beside())
    else:
        with pytest.raises(ModelError, match="cannot be trained with data.batch = 1 .*; give more"):
            Host.to_train(*arguments)


@pytest.mark.parametrize(
    ("kind", "cut", "words"),
    [("none", "stage1_relu2", 'bottleneck.kind "none" would open'), ("none", "stage2_1_relu2", "another cut than")],
)
def test_channels_that_a_run_closed_are_not_opened_by_the_way(kind: str, cut: str, words: str, tmp_path: Path) -> None:
    """Its tail has never seen them: of 96 % right 35 would be left."""
    digits = data.load("digits", (1, 16, 16), 3, 0.0, limit=64)
    source = recipe_text("fixed", bottleneck='kind = "channels"', schedule="phases = [[2, 1]]")
    inprocess.train(source, digits, folder=tmp_path, publish=True)
    table = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "{cut}"\ninit = "run:{tmp_path / "server"}"'
    recipe = parse(recipe_text("fixed", model=table, bottleneck=f'kind = "{kind}"'))
    with pytest.raises(MismatchError, match=f"learnt with 2 of 32 channels, and {words}"):
        initial_weights(recipe, halves.build(recipe), ())


def test_a_run_that_has_begun_needs_no_longer_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server is lost before the first checkpoint after the start, and the run that it started from is gone."""
    digits = data.load("digits", (1, 16, 16), 3, 0.0, limit=64)
    inprocess.train(recipe_text("plain", schedule="phases = [[0, 1]]"), digits, folder=tmp_path / "first", publish=True)
    model = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "run:{tmp_path / "first"}"'
    text = recipe_text("prune", model=model, bottleneck='kind = "linear"', schedule="phases = [[4, 4]]")
    whole = leg(tmp_path / "whole", text, digits)
    monkeypatch.setattr(legs, "EVERY", 200)
    assert leg(tmp_path / "broken", text, digits, 3) is None
    shutil.rmtree(tmp_path / "first")
    assert leg(tmp_path / "broken", text, digits)
    assert whole
    assert_same_end(tmp_path / "broken", tmp_path / "whole")
    with pytest.raises(RunFolderError, match="no run.json there"):
        leg(tmp_path / "anew", text, digits)
