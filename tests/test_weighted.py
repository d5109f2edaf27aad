"""Principal components weighted by what the loss felt in the run before: where they come from, and that they arrive."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import inprocess
from benchmarks.recipes import recipe_text
from common import bottleneck, halves, weights
from common.errors import FrameError
from common.recipe import parse
from common.schedule import Phase
from device_client.data import Dataset, load
from device_client.remote_tail import RemoteTail
from device_client.trainer import Trainer
from edge_server.training import Training
from tests.test_resume import _Cut, assert_same_end

CODEC = 'activation = "step:20"\ngradient = "step:10"'


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", (1, 16, 16), 3, 0.0, limit=640)


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

    felt: list[np.ndarray | None] = []
    basis: list[np.ndarray] = []

    def send_basis(self, basis: np.ndarray) -> None:
        self.felt.append(self.sensitivity)
        self.basis.append(basis)
        super().send_basis(basis)


@pytest.fixture
def seen() -> type[_Seen]:
    _Seen.felt, _Seen.basis = [], []
    return _Seen


def test_components_are_those_that_are_felt() -> None:
    """The loudest channel is felt by nobody: the weighted components leave it out, and decode the others better."""
    torch.manual_seed(0)
    activation = torch.randn(256, 4, 3, 3) * torch.tensor([10.0, 2.0, 1.0, 1.0])[:, None, None] + 3
    gradient = torch.randn(256, 4, 3, 3) * torch.tensor([0.0, 1.0, 1.0, 0.1])[:, None, None]
    felt = bottleneck.feel(gradient)
    assert torch.allclose(felt.diagonal(), torch.tensor([0.0, 1.0, 1.0, 0.01]), atol=0.1)
    lost = {}
    for name, sensitivity in (("principal", None), ("weighted", felt)):
        components, mean = bottleneck.principal_components(activation.split(100), sensitivity)
        inverse = torch.linalg.inv(components)
        kept = torch.einsum("ij,jk,bkhw->bihw", inverse[:, :2], components[:2], activation - mean[:, None, None])
        off = (activation - mean[:, None, None] - kept).transpose(0, 1).reshape(4, -1)
        lost[name] = float((off * (felt @ off)).sum(0).mean())
        if sensitivity is None:
            torch.testing.assert_close(components @ components.T, torch.eye(4), atol=1e-4, rtol=0)
    assert lost["weighted"] < 0.25 * lost["principal"]


def test_a_run_notes_what_its_loss_feels(source: Path) -> None:
    felt = weights.read(source / "server" / "tail.safetensors")["sensitivity"]
    assert torch.allclose(felt, felt.T) and float(torch.linalg.eigvalsh(felt)[-1]) > 0
    assert float(torch.linalg.eigvalsh(felt)[0]) > -1e-6 * float(felt.trace())


def test_a_narrow_run_leaves_what_it_does_not_send_alone() -> None:
    tail = halves.build(parse(recipe_text("fixed", bottleneck='kind = "linear"', schedule="phases = [[4, 1]]"))).tail
    tail.feel(torch.randn(8, 4, 8, 8))
    assert tail.sensitivity[:4, :4].diagonal().all() and not tail.sensitivity[4:].any()


def test_the_device_weights_by_it_and_both_sides_turn_alike(digits: Dataset, source: Path, seen: type[_Seen]) -> None:
    turned: list[torch.Tensor] = []

    def watch(step: int, _phase: Phase, trainer: Trainer, training: Training) -> None:
        if step == 0:  # of a frozen phase: nothing has moved the bottleneck yet, and no gradient came back
            encoder, decoder = trainer.head.bottleneck, training.halves.tail.bottleneck
            assert isinstance(encoder, bottleneck.LinearEncoder) and isinstance(decoder, bottleneck.LinearDecoder)
            turned.extend([encoder.weight.clone(), training.halves.tail.sensitivity.clone()])

    inprocess.train(_text(source), digits, seen, watch=watch)
    felt = weights.read(source / "server" / "tail.safetensors")["sensitivity"]
    assert seen.felt[0] is not None and np.array_equal(seen.felt[0], felt.numpy())
    encoder, now = turned
    # In the new directions the loss feels all alike, but for the hundredth that every one has.
    assert torch.allclose(now / now.diagonal().mean(), torch.eye(len(now)), atol=0.15)
    torch.testing.assert_close(encoder, torch.from_numpy(seen.basis[0][:-1]))


def test_without_weights_it_is_by_variance_alone(digits: Dataset, source: Path, seen: type[_Seen]) -> None:
    for text in (_text(source, "principal"), _text(source, cut="stage2_1_relu2")):
        inprocess.train(text, digits, seen)
        components = seen.basis[-1][:-1]
        assert seen.felt[-1] is None
        assert np.allclose(components @ components.T, np.eye(len(components)), atol=1e-4)


@pytest.mark.parametrize("passing", [1, 2], ids=["the weights are lost", "the basis is lost"])
def test_what_was_lost_on_the_way_is_sent_again(
    passing: int, digits: Dataset, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = inprocess.train(_text(source), digits, folder=tmp_path / "whole")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(_Cut, "passing", passing)
    cut: dict[str, Any] = inprocess.train(_text(source), digits, remote_class=_Cut, folder=tmp_path / "cut")
    assert cut["faults"]["reconnects"] == 1
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    for way in ("up", "down"):
        assert cut["bytes"][way]["by_role"] == whole["bytes"][way]["by_role"]


def test_a_basis_that_cannot_be_undone_is_refused(digits: Dataset, source: Path, seen: type[_Seen]) -> None:
    class Singular(_Seen):
        def send_basis(self, basis: np.ndarray) -> None:
            super().send_basis(np.zeros_like(basis))

    with pytest.raises(FrameError, match="the basis is of no use: the principal components cannot be undone"):
        inprocess.train(_text(source), digits, Singular, give_up_s=0)
