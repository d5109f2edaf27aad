"""Principal components weighted by the sensitivity of the run before: where they come from, and that they arrive."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import inprocess
from benchmarks.recipes import PHASE, recipe_text
from common import bottleneck, halves, importance, weights, wire
from common.errors import FrameError
from common.inherit import adopt
from common.meter import Draft
from common.recipe import parse
from common.run import Manifest
from common.schedule import Phase
from device_client.data import Dataset, load
from device_client.link import Stream
from device_client.remote_tail import RemoteTail
from device_client.trainer import Trainer
from edge_server.training import Training
from tests.legs import Cut, assert_same_end, lose_before_the_first_step

CODEC = 'activation = "step:20"\ngradient = "step:10"'


@pytest.fixture(scope="module")
def source(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network, of both sides."""
    folder = tmp_path_factory.mktemp("source")
    inprocess.train(recipe_text(schedule="phases = [[0, 1]]"), digits, folder=folder)
    return folder


def _text(source: Path, start: str = "auto", cut: str = "stage1_relu2") -> str:
    model = f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "{cut}"\ninit = "run:{source}"'
    return recipe_text(
        "prune", model=model, bottleneck=f'kind = "linear"\nstart = "{start}"', codec=CODEC,
        schedule="phases = [{ width = 4, epochs = 0.5, views = 0.25 }, [4, 0.25]]",
    )  # fmt: skip


class _Seen(RemoteTail):
    """Remembers what crossed before the first step."""

    told: list[np.ndarray] = []
    basis: list[np.ndarray] = []

    def _receive_sensitivity(self, stream: Stream, draft: Draft) -> np.ndarray:
        self.told.append(super()._receive_sensitivity(stream, draft))
        return self.told[-1]

    def send_basis(self, basis: np.ndarray) -> None:
        self.basis.append(basis)
        super().send_basis(basis)


@pytest.fixture
def seen() -> type[_Seen]:
    _Seen.told, _Seen.basis = [], []
    return _Seen


def test_components_are_those_that_count() -> None:
    """The loudest channel does not count: the weighted components leave it out, and decode the others better."""
    torch.manual_seed(0)
    activation = torch.randn(256, 4, 3, 3) * torch.tensor([10.0, 2.0, 1.0, 1.0])[:, None, None] + 3
    gradient = torch.randn(256, 4, 3, 3) * torch.tensor([0.0, 1.0, 1.0, 0.1])[:, None, None]
    sensitivity = importance.sensitivity_of(gradient)
    assert torch.allclose(sensitivity.diagonal(), torch.tensor([0.0, 1.0, 1.0, 0.01]), atol=0.1)
    lost = {}
    for name, given in (("principal", None), ("weighted", sensitivity)):
        components, mean = importance.principal_components(activation.split(100), given)
        inverse = torch.linalg.inv(components)
        kept = torch.einsum("ij,jk,bkhw->bihw", inverse[:, :2], components[:2], activation - mean[:, None, None])
        off = (activation - mean[:, None, None] - kept).transpose(0, 1).reshape(4, -1)
        lost[name] = float((off * (sensitivity @ off)).sum(0).mean())
        if sensitivity is None:
            torch.testing.assert_close(components @ components.T, torch.eye(4), atol=1e-4, rtol=0)
    assert lost["weighted"] < 0.25 * lost["principal"]
    # One that is so faint that it says nothing is left out.
    faint, plain = (importance.principal_components([activation], given) for given in (0 * sensitivity, None))
    assert torch.equal(faint[0], plain[0])


def test_no_component_is_far_longer_than_another() -> None:
    """Direction and order stay: the same with lengths that are all one."""
    points = torch.randn(500, 6, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.arange(6.0) + 1)
    felt = torch.diag(torch.tensor([1e3, 1.0, 1e-3, 1e3, 1.0, 1e-3]))
    components, _ = importance.principal_components([points], felt)
    lengths = components.norm(dim=1)
    assert lengths.min() == pytest.approx(0.4) and lengths.max() <= 2.5
    assert [int(row.abs().argmax()) for row in components][:2] == [3, 0]
    plain, _ = importance.principal_components([points])
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(6))


def test_a_late_cut_is_pruned_by_what_few_of_its_directions_count(tmp_path: Path) -> None:
    """With lengths of a tenth and four, the loss of this run was soon not finite."""
    few = load("digits", (1, 16, 16), 3, 0.0, limit=640)
    model = 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage3_1_relu2"'
    inprocess.train(recipe_text(model=model, schedule="phases = [[0, 6]]"), few, folder=tmp_path)
    pruned = recipe_text(
        "prune", model=f'{model}\ninit = "run:{tmp_path}"', bottleneck='kind = "linear"',
        codec='activation = "step:20"\ngradient = "step:5"', schedule="phases = [[32, 3]]",
    )  # fmt: skip
    assert inprocess.train(pruned, few)["accuracy"] >= 0.85


def test_a_run_notes_what_its_loss_feels(source: Path) -> None:
    sensitivity = weights.read(source / "server" / "tail.safetensors")["sensitivity"]
    assert torch.allclose(sensitivity, sensitivity.T) and float(torch.linalg.eigvalsh(sensitivity)[-1]) > 0
    assert float(torch.linalg.eigvalsh(sensitivity)[0]) > -1e-6 * float(sensitivity.trace())


def _tail(kind: str = "linear") -> halves.Tail:
    return halves.build(parse(recipe_text("fixed", bottleneck=f'kind = "{kind}"', schedule="phases = [[4, 1]]"))).tail


def test_a_narrow_run_leaves_what_it_does_not_send_alone() -> None:
    """The first of a direction is taken as it comes, later ones are averaged, and what is not sent stays as it was."""
    tail = _tail()
    for scale in (1.0, 3.0):
        tail.note_sensitivity(scale * torch.ones(8, 4, 8, 8))
    assert torch.allclose(tail.sensitivity[:4, :4], torch.tensor(1 + 0.1 * (9 - 1)))
    assert not tail.sensitivity[4:].any() and not tail.sensitivity[:, 4:].any()
    tail.note_sensitivity(torch.ones(8, 32, 8, 8))
    tail.note_sensitivity(torch.zeros(8, 2, 8, 8))
    assert torch.allclose(tail.sensitivity[4:, 4:], torch.ones(28, 28))


def test_ranked_channels_are_noted_by_their_place_at_the_cut_and_taken_over_in_their_order() -> None:
    tail, order = _tail("channels"), tuple(reversed(range(32)))
    tail.bottleneck.resize(4, order)
    tail.note_sensitivity(torch.arange(1.0, 5.0)[None, :, None, None] * torch.ones(8, 4, 8, 8))
    assert tail.sensitivity.diagonal()[-4:].tolist() == [16.0, 9.0, 4.0, 1.0] and not tail.sensitivity[:28].any()
    table, manifest = "phases = [[4, 1]]", Manifest("run", "digest", (), PHASE)
    manifest = replace(manifest, phase=replace(PHASE, width=4, order=order))
    source = parse(recipe_text("fixed", bottleneck='kind = "channels"', schedule=table))
    recipe = parse(recipe_text("fixed", bottleneck='kind = "linear"', schedule=table))
    taken = adopt(halves.build(recipe).tail, tail.state_dict(), recipe, source, manifest)
    assert taken["sensitivity"].diagonal()[:5].tolist() == [1.0, 4.0, 9.0, 16.0, 0.0]


def test_there_is_none_where_it_would_take_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "MOST_WEIGHTED", 31)
    tail = _tail()
    tail.note_sensitivity(torch.ones(8, 4, 8, 8))
    tail.rotate(2 * torch.eye(32), torch.zeros(32))
    assert tail.sensitivity.shape == (0, 0)
    assert torch.equal(tail.bottleneck.weight, _tail().bottleneck.weight / 2)


def test_the_device_weights_by_it_and_both_sides_turn_alike(digits: Dataset, source: Path, seen: type[_Seen]) -> None:
    turned: list[torch.Tensor] = []

    def watch(step: int, _phase: Phase, trainer: Trainer, training: Training) -> None:
        if step == 0:  # of a frozen phase: nothing has moved the bottleneck yet, and no gradient came back
            encoder, decoder = trainer.head.bottleneck, training.halves.tail.bottleneck
            assert isinstance(encoder, bottleneck.LinearEncoder) and isinstance(decoder, bottleneck.LinearDecoder)
            turned.extend([encoder.weight.clone(), training.halves.tail.sensitivity.clone()])

    inprocess.train(_text(source), digits, seen, watch=watch)
    sensitivity = weights.read(source / "server" / "tail.safetensors")["sensitivity"]
    assert np.array_equal(seen.told[0], sensitivity.numpy())
    encoder, now = turned
    # In the new directions the sensitivity is all alike, but for the hundredth that every one has.
    assert torch.allclose(now / now.diagonal().mean(), torch.eye(len(now)), atol=0.15)
    torch.testing.assert_close(encoder, torch.from_numpy(seen.basis[0][:-1]))


def test_without_weights_it_is_by_variance_alone(digits: Dataset, source: Path, seen: type[_Seen]) -> None:
    for text in (_text(source, "principal"), _text(source, cut="stage2_1_relu2")):
        inprocess.train(text, digits, seen)
        components = seen.basis[-1][:-1]
        assert not seen.told
        assert np.allclose(components @ components.T, np.eye(len(components)), atol=1e-4)


@pytest.mark.parametrize("passing", [1, 2], ids=["the weights are lost", "the basis is lost"])
def test_what_was_lost_on_the_way_is_sent_again(
    passing: int, digits: Dataset, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = inprocess.train(_text(source), digits, folder=tmp_path / "whole")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(Cut, "passing", passing)
    cut: dict[str, Any] = inprocess.train(_text(source), digits, remote_class=Cut, folder=tmp_path / "cut")
    assert cut["faults"]["reconnects"] == 1
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    for way in ("up", "down"):
        assert cut["bytes"][way]["by_role"] == whole["bytes"][way]["by_role"]
    ours, theirs = (json.loads((tmp_path / name / "server" / "summary.json").read_text()) for name in ("cut", "whole"))
    for way in ("up", "down"):
        assert ours["bytes"][way]["by_role"] == theirs["bytes"][way]["by_role"]


@pytest.mark.parametrize("lost", ["device", "device and server", "device with its disk, and server"])
def test_lost_before_the_first_step(lost: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_before_the_first_step(_text(source), lost, tmp_path, monkeypatch)


@pytest.mark.parametrize("damage", [lambda told: told * 0, lambda told: -told, lambda told: told * np.tri(len(told))])
def test_a_sensitivity_that_cannot_be_one_is_refused(
    damage: Any, digits: Dataset, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = wire.pack_raw
    monkeypatch.setattr(wire, "pack_raw", lambda place, tensor: pack(place, damage(tensor).astype(np.float32)))
    with pytest.raises(FrameError, match="not symmetric and positive"):
        inprocess.train(_text(source), digits, give_up_s=0)


@pytest.mark.parametrize("scale", [0, 1e-30])
def test_a_basis_that_cannot_be_undone_is_refused(
    scale: float, digits: Dataset, source: Path, seen: type[_Seen]
) -> None:
    class Singular(_Seen):
        def send_basis(self, basis: np.ndarray) -> None:
            super().send_basis(basis * np.float32(scale))

    with pytest.raises(FrameError, match="the basis is of no use: the principal components cannot be undone"):
        inprocess.train(_text(source), digits, Singular, give_up_s=0)


@pytest.mark.parametrize("shape", [(41, 40), (5, 5), (1, 0)])
def test_a_basis_of_a_shape_that_cannot_be_one_is_refused(
    shape: tuple[int, int], digits: Dataset, source: Path, seen: type[_Seen]
) -> None:
    """Of more channels than cross the cut, too."""

    class Wide(_Seen):
        def send_basis(self, basis: np.ndarray) -> None:
            super().send_basis(np.eye(*shape, dtype=np.float32))

    with pytest.raises(FrameError, match="the basis has shape .*with w up to 32 fits"):
        inprocess.train(_text(source), digits, Wide, give_up_s=0)
