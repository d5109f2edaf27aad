"""A run with a budget spends no more than that, not much less, and is otherwise the run without one."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from rich.console import Console

from benchmarks import inprocess
from benchmarks.recipes import recipe_text
from common import models, report
from common.errors import RecipeError
from common.recipe import parse
from common.room import require_room
from device_client import trainer
from device_client.data import Dataset, load
from edge_server import live

CODEC = 'activation = "step:20"\ngradient = "step:5"'


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", (1, 16, 16), 3, 0.2, limit=640)


def run(
    digits: Dataset, schedule: str, folder: Path | None = None, publish: bool = False, kind: str = "linear"
) -> dict[str, Any]:
    text = recipe_text(
        "deprune", data="batch = 32\nvalidation = 0.2", bottleneck=f'kind = "{kind}"', codec=CODEC, schedule=schedule
    )
    return inprocess.train(text, digits, folder=folder, publish=publish)


def spent(summary: dict[str, Any]) -> int:
    return sum(summary["bytes"][way]["message"] for way in ("up", "down"))


def test_a_run_spends_its_budget_and_no_more(digits: Dataset) -> None:
    summary = run(digits, "phases = [[2, 6], [4, 6]]\nbudget_mb = 0.5")
    assert 0.9 * 0.5e6 < spent(summary) <= 0.5e6
    # As long as it could be, in the given proportions: each phase had about half of the steps.
    starts = {phase["width"]: phase["from_step"] for phase in reversed(summary["phases"])}
    assert 0.3 < starts[4] / summary["steps"] < 0.7
    console = Console(file=io.StringIO(), width=120)
    report.show(console, summary)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    enough = f"{summary['epochs']:.3g}"  # 5, or a step more where a processor rounds otherwise
    assert enough in ("5", "5.06")
    assert f"of a budget of 500.0 kB, which was enough for {enough} of 12 epochs." in shown and "width 2 → 4." in shown


def test_a_phase_that_was_left_out_is_said(digits: Dataset) -> None:
    """Its test part alone would take most of the budget."""
    summary = run(digits, "phases = [[2, 6], [32, 6]]\nbudget_mb = 0.35")
    console = Console(file=io.StringIO(), width=120)
    report.show(console, summary)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "of 12 epochs, without the last phase." in shown and "width 2." in shown, shown


def test_a_published_head_is_in_the_budget(digits: Dataset) -> None:
    """It crosses when all steps are done: what it takes is set aside from the first."""
    kept, published = (
        inprocess.train(
            recipe_text(
                "deprune", bottleneck='kind = "linear"', codec=CODEC, schedule="phases = [[2, 12]]\nbudget_mb = 0.22"
            ),
            digits,
            publish=publish,
        )
        for publish in (False, True)
    )
    assert spent(published) <= 0.22e6 and published["steps"] < kept["steps"]


@pytest.mark.parametrize(
    ("phases", "ranking", "budget", "steps"),
    [
        ([[1, 8], [2, 8]], 4, 0.25, 25),  # after a step with all channels those to come are cheap
        ([[2, 0.1], [8, 8]], 8, 0.22, 25),  # the first entry is over before it is ranked in full
        ([[2, 0.1], [8, 8]], 8, 0.26, 40),
    ],
)
def test_choosing_channels_is_paid_for_and_ends_no_run(
    phases: list[list[float]], ranking: int, budget: float, steps: int
) -> None:
    bottleneck = f'kind = "channels"\nranking_steps = {ranking}'
    text = recipe_text(
        "deprune", data="batch = 32", bottleneck=bottleneck, codec=CODEC,
        schedule=f"phases = {phases}\nbudget_mb = {budget}",
    )  # fmt: skip
    summary = inprocess.train(text, load("digits", (1, 16, 16), 3, 0.0, limit=640))
    assert summary["steps"] >= steps and spent(summary) <= budget * 1e6


def test_a_prune_narrows_early_where_only_the_narrow_test_can_be_paid_for(tmp_path: Path) -> None:
    init = tmp_path / "whole.safetensors"
    safetensors.torch.save_file(models.build("tiny", (1, 16, 16), 10).state_dict(), init)
    text = recipe_text(
        "prune", data="batch = 32", bottleneck='kind = "channels"', codec=CODEC,
        model=f'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "{init}"',
        schedule="phases = [[0, 0.4], [2, 8]]\nbudget_mb = 0.47",
    )  # fmt: skip
    summary = inprocess.train(text, load("digits", (1, 16, 16), 3, 0.0, limit=640))
    widths = [phase["width"] for phase in summary["phases"]]
    assert widths[0] == 32 and widths[-1] == 2 and summary["phases"][1]["from_step"] < 8
    assert summary["steps"] > 40 and spent(summary) <= 0.47e6


def test_evaluations_picture_by_picture_are_in_the_budget(digits: Dataset) -> None:
    text = recipe_text(
        "deprune", data="batch = 32\nvalidation = 0.2\nevaluation_batch = 1", bottleneck='kind = "linear"', codec=CODEC,
        schedule="phases = [[2, 6], [4, 6]]\nbudget_mb = 0.3",
    )  # fmt: skip
    assert spent(inprocess.train(text, digits)) <= 0.3e6


@pytest.mark.parametrize("kind", ["linear", "channels"])
def test_a_budget_that_is_not_reached_changes_nothing(digits: Dataset, tmp_path: Path, kind: str) -> None:
    schedule = "phases = [[2, 1], [4, 1]]"
    free = run(digits, schedule, tmp_path / "free", kind=kind)
    limited = run(digits, f"{schedule}\nbudget_mb = 100", tmp_path / "limited", kind=kind)
    assert free["bytes"]["up"]["by_role"] == limited["bytes"]["up"]["by_role"]
    for name in ("accuracy", "loss", "steps", "phases"):
        assert free[name] == limited[name]
    heads = [(tmp_path / name / "device" / "head.safetensors").read_bytes() for name in ("free", "limited")]
    assert heads[0][-1000:] == heads[1][-1000:]


def test_a_budget_that_turns_out_too_small_is_said(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "require_room", lambda *_: None)
    monkeypatch.setattr(trainer, "require_room", lambda *_: None)  # as if its estimate had been far too low
    summary = run(digits, "phases = [[2, 1]]\nbudget_mb = 0.1")
    assert summary["steps"] <= 3 and spent(summary) > 100_000
    console = Console(file=io.StringIO(), width=200)
    report.show(console, summary)
    assert "too little for the head's weights" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("budget", "kind", "publish", "words"),
    [
        (0.08, "linear", False, "the weights of the head alone are 86.2 kB: give more"),
        (
            0.1,
            "linear",
            False,
            r"about 1\d\d.\d kB .*86.2 kB for .* weights, .* for 8 steps, .* for 359 test pictures\)",
        ),
        (0.15, "linear", True, "172.4 kB for the head's weights"),
        (0.15, "channels", False, "kB for choosing channels"),
    ],
)
def test_a_budget_with_no_room_for_learning_is_refused(
    digits: Dataset, tmp_path: Path, budget: float, kind: str, publish: bool, words: str
) -> None:
    """Before anything crosses where the server can tell by itself, else before the first step."""
    with pytest.raises(RecipeError, match=f"schedule.budget_mb is {budget} .*{words}"):
        run(digits, f"phases = [[2, 6], [4, 6]]\nbudget_mb = {budget}", tmp_path, publish=publish, kind=kind)
    assert not (tmp_path / "server" / "recipe.toml").exists()


def test_what_is_exact_is_not_taken_to_be_less() -> None:
    """A fifth of the budget stood for fp32 that might come to less."""
    text = recipe_text(
        "deprune", data="batch = 128", bottleneck='kind = "channels"', schedule="phases = [[1, 3]]\nbudget_mb = {}"
    )
    for budget, has_room in ((6.5, False), (9.5, True)):
        with contextlib.nullcontext() if has_room else pytest.raises(RecipeError, match="for choosing channels"):
            require_room(parse(text.format(budget)), (32, 8, 8), 1438, 359, 86_000, 0)


def test_channels_that_an_earlier_run_chose_are_not_all_ranked_anew() -> None:
    text = recipe_text(
        "prune", data="batch = 128", bottleneck='kind = "channels"', schedule="phases = [[4, 1]]\nbudget_mb = 5",
        model='name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "run:x"',
    )  # fmt: skip
    for sent, has_room in ((8, True), (None, True), (0, False)):
        with contextlib.nullcontext() if has_room else pytest.raises(RecipeError, match="for choosing channels"):
            require_room(parse(text), (32, 8, 8), 1438, 359, 0, sent)


def test_a_first_phase_of_one_step_is_refused(digits: Dataset) -> None:
    """Before it is booked nothing is known, and a wider one would begin whatever it costs."""
    with pytest.raises(RecipeError, match="comes to one step on these pictures"):
        run(digits, "phases = [[2, 0.06], [32, 6]]\nbudget_mb = 0.5")
