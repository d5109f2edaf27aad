"""A run with a budget spends no more than that, not much less, and is otherwise the run without one."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import inprocess
from benchmarks.recipes import recipe_text
from common import models, report
from common.errors import RecipeError
from common.meter import Count
from common.recipe import Recipe, parse
from common.room import require_room
from common.rpc import split_pb2 as pb
from common.schedule import Phase, planned
from device_client import trainer
from device_client.data import Dataset, load
from edge_server import live
from edge_server.budget import Beside, Budget
from edge_server.coordinator import Coordinator

CODEC = 'activation = "step:20"\ngradient = "step:5"'
CHANNELS, EPOCH, BATCH = 32, 40, 10
SCHEDULES = [[[2, 6], [4, 6], [8, 6]], [[2, 1], [16, 10]], [[2, 0.15], [4, 12]], [[4, 12]]]


class Books:
    """What a meter says where steps cost what the test says."""

    def __init__(self, up: int, down: int) -> None:
        self.spent = {"up": up, "down": down}

    def add(self, up: float, down: float) -> None:
        self.spent["up"] += round(up)
        self.spent["down"] += round(down)

    def total(self, way: str) -> Count:
        return Count(payload=self.spent[way])


@given(
    budget_mb=st.floats(1, 60),
    up=st.integers(1000, 20_000),
    down=st.integers(50, 20_000),
    drift=st.floats(0.5, 2),  # of what a step costs, from the first to the last that was planned
    dearer=st.floats(0.6, 1.6),  # each later phase, beside what its width says
    noise=st.floats(0, 0.2),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["linear", "channels"]),
    restart=st.booleans(),
    phases=st.sampled_from(SCHEDULES),
    validation=st.sampled_from([0, 100]),
    test=st.sampled_from([50, 300]),
)
# Its last validation was not to be paid for, and the run ended with a fifth unspent.
@example(
    budget_mb=1.0, up=1520, down=265, drift=1.0, dearer=1.5, noise=0.0, seed=0, kind="linear", restart=False,
    phases=[[2, 6], [4, 6], [8, 6]], validation=100, test=50,
)  # fmt: skip
def test_whatever_steps_cost_the_budget_is_kept(
    budget_mb: float, up: int, down: int, drift: float, dearer: float, noise: float, seed: int, kind: str,
    restart: bool, phases: list[list[float]], validation: int, test: int,
) -> None:  # fmt: skip
    draw, asked_for = random.Random(seed), [width for width, _ in phases]
    asked = sum(epochs * EPOCH for _, epochs in phases)

    def of_width(phase: Phase, step: int) -> float:
        later = asked_for.index(phase.width) if phase.width in asked_for else 0
        return phase.width / 2 * dearer**later * drift ** (step / asked)

    def costs(phase: Phase, step: int) -> tuple[float, float]:
        noisy = of_width(phase, step) * (1 + noise * (draw.random() - 0.5))
        return up * noisy, down * noisy

    steps, spent, widths = simulated(
        phases, budget_mb, kind, restart, validation, test, costs, lambda phase, step: up * of_width(phase, step)
    )
    assert steps <= asked
    # With so few steps there is nothing to learn from what phases cost before the test part takes what is left.
    assert spent <= budget_mb * 1e6 or steps < 50
    assert widths == sorted(widths)
    if steps > 100 and kind == "linear":  # what is left over is a validation and some steps, or would change too little
        assert steps >= 0.97 * asked or spent > 0.85e6 * budget_mb


@pytest.mark.parametrize(
    ("phases", "budget_mb", "channel", "widths"),
    [
        ([[1, 1], [32, 10]], 4, (400, 200), [1]),  # the plan without the second entry is as long as the one with it
        ([[2, 0.15], [32, 10]], 4, (1500, 750), [2]),  # the first entry is over before it can be judged
        ([[1, 1], [32, 10]], 10, (400, 200), [1, 32]),
    ],
)
def test_an_entry_that_cannot_be_paid_for_does_not_end_the_run(
    phases: list[list[float]], budget_mb: float, channel: tuple[int, int], widths: list[int]
) -> None:
    """Its test part alone takes much of the budget: what is left goes to the entries before."""
    up, down = channel
    steps, spent, had = simulated(
        phases, budget_mb, "linear", False, 400, 3000,
        lambda phase, _: (up * phase.width, down * phase.width), lambda phase, _: up * phase.width,
    )  # fmt: skip
    assert had == widths and spent <= budget_mb * 1e6
    assert steps == sum(epochs * EPOCH for _, epochs in phases) or spent > 0.85e6 * budget_mb


def simulated(
    phases: list[list[float]], budget_mb: float, kind: str, restart: bool, validation: int, test: int,
    costs: Callable[[Phase, int], tuple[float, float]], judged: Callable[[Phase, int], float],
) -> tuple[int, float, list[int]]:  # fmt: skip
    """Steps, bytes and widths of a run whose steps take `costs` up and down, and a batch of an evaluation `judged`."""
    recipe = parse(
        recipe_text(
            "deprune", data=f"batch = {BATCH}\nvalidation = 0.2", bottleneck=f'kind = "{kind}"', codec=CODEC,
            schedule=f"phases = {phases}\nbudget_mb = {budget_mb}", optimiser=f"restart = {str(restart).lower()}",
        )
    )  # fmt: skip
    coordinator = Coordinator(recipe, CHANNELS, EPOCH, Budget(recipe, CHANNELS, EPOCH, BATCH, Beside(validation, test)))
    books = Books(0, 5000)
    coordinator.book(books)  # type: ignore[arg-type]
    then, step, judging = pb.STEP, 0, 0.0
    while then != pb.FINISH:
        phase = coordinator.phase
        assert coordinator.phases[-1].from_step <= step < coordinator.steps == phase.steps
        assert phase.decay_until >= step
        then = coordinator.after_step(step).then
        books.add(*costs(phase, step))
        coordinator.book(books, phase, step)  # type: ignore[arg-type]
        judging = judged(coordinator.phase, step)  # now at the width of the next step
        if then == pb.VALIDATE:
            books.add(judging * validation / BATCH, 0)
            coordinator.book(books)  # type: ignore[arg-type]
            coordinator.after_validation(step, 1.0)
        step += 1
    books.add(judging * test / BATCH, 0)
    widths = list(dict.fromkeys(phase.width for phase in coordinator.phases if phase.kind == "learn"))
    return step, sum(books.spent.values()) + 160 * step, widths  # with what frames are beside payloads


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


def pruned(schedule: str) -> Recipe:
    model = 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"\ninit = "run:x"'
    return parse(recipe_text("prune", model=model, bottleneck='kind = "linear"', codec=CODEC, schedule=schedule))


def test_an_entry_that_comes_to_no_step_is_no_obstacle() -> None:
    """Here the second; the first cannot be paid for any more, nor what the third takes beside its one step."""
    recipe = pruned("phases = [[8, 5], [4, 0.1], [4, 0.5]]\nbudget_mb = 0.1")
    budget = Budget(recipe, CHANNELS, 2, BATCH, Beside(0, 300))
    phase = planned(recipe, CHANNELS, 2)[0][0]
    for step in range(9):
        budget.book(step * 6000, step * 4000, phase)
    budget.leave(9)
    assert budget.ends == [9, 9, 9]


def test_which_phases_never_came() -> None:
    """Those after the last that did; one before it had come to no step."""
    recipe = pruned("phases = [[8, 1], [6, 0.001], [4, 1], [2, 1]]")
    ran = [phase for phase in planned(recipe, CHANNELS, EPOCH)[0] if phase.width in (8, 4)]
    assert [report._left_out(recipe, CHANNELS, ran[:count]) for count in (1, 2)] == [3, 1]


def test_evaluations_of_a_nested_phase_take_its_whole_width() -> None:
    """Its steps draw narrower ones too, and say nothing of that by themselves."""
    phases = "phases = [{ width = 8, epochs = 60, nested = [1, 2] }]\nbudget_mb = 3"
    recipe = parse(recipe_text("fixed", bottleneck='kind = "linear"', codec=CODEC, schedule=phases))
    test, channel = 10_000, 100  # pictures, and bytes that a channel of a batch takes
    coordinator = Coordinator(recipe, CHANNELS, EPOCH, Budget(recipe, CHANNELS, EPOCH, BATCH, Beside(0, test)))
    books, then, step = Books(0, 5000), pb.STEP, 0
    coordinator.book(books)  # type: ignore[arg-type]
    while then != pb.FINISH:
        phase = coordinator.phase
        books.add(channel * phase.width_at(recipe.seed, step), channel * phase.width_at(recipe.seed, step))
        then = coordinator.after_step(step).then
        coordinator.book(books, phase, step)  # type: ignore[arg-type]
        step += 1
    books.add(channel * 8 * test / BATCH, 0)
    assert 0.85 * 3e6 < sum(books.spent.values()) + 160 * step <= 3e6


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("nested", [(30, [1, 2, 3]), (8, [2, 4])])
def test_steps_of_nested_widths_are_paid_for_by_their_own(nested: tuple[int, list[int]], seed: int) -> None:
    """A run that had drawn narrow ones alone would take the others to be as cheap, or the other way round."""
    width, others = nested
    text = recipe_text(
        "fixed", top=f'name = "nested"\nmethod = "fixed"\nseed = {seed}', bottleneck='kind = "linear"', codec=CODEC,
        schedule=f"phases = [{{ width = {width}, epochs = 60, nested = {others} }}]\nbudget_mb = 1",
    )  # fmt: skip
    recipe, channel, test = parse(text), 24_000 // width, 300
    coordinator = Coordinator(recipe, CHANNELS, EPOCH, Budget(recipe, CHANNELS, EPOCH, BATCH, Beside(0, test)))
    books, then, step = Books(0, 5000), pb.STEP, 0
    coordinator.book(books)  # type: ignore[arg-type]
    while then != pb.FINISH:
        phase = coordinator.phase
        sent = channel * phase.width_at(seed, step)
        books.add(sent, sent)
        then = coordinator.after_step(step).then
        coordinator.book(books, phase, step)  # type: ignore[arg-type]
        step += 1
    books.add(channel * width * test / BATCH, 0)
    assert 0.75e6 < sum(books.spent.values()) + 160 * step <= 1e6


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


def test_a_step_that_chooses_channels_is_reckoned_with_as_the_dearest_was() -> None:
    text = recipe_text("deprune", bottleneck='kind = "channels"', schedule="phases = [[2, 5]]\nbudget_mb = 9")
    budget = Budget(parse(text), CHANNELS, EPOCH, BATCH, Beside())
    rank = Phase(0, 0, CHANNELS, "fp32", "fp32", 0.1, 0, 1, kind="rank")
    for payload in (1000, 1100):
        budget.book(payload, payload, rank)
    assert budget.state()["spent"]["ranked"] == 2000


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


def test_what_comes_after_entries_without_steps_is_paid_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked about was the entry after the present one; where that comes to no step, a dearer one is next."""
    recipe = parse(
        recipe_text(
            "deprune", bottleneck='kind = "linear"', schedule="phases = [[1, 1], [2, 1], [8, 1]]\nbudget_mb = 9"
        )
    )
    budget = Budget(recipe, CHANNELS, EPOCH, BATCH, Beside())
    coordinator, asked = Coordinator(recipe, CHANNELS, EPOCH, budget), []

    def allows(done: int, present: Phase, coming: Phase, tested: Phase, validates: bool) -> bool:
        asked.append((done, coming.width))
        return done < 5 or coming.width == 2

    monkeypatch.setattr(budget, "allows", allows)
    monkeypatch.setattr(budget, "leave", lambda done: setattr(budget, "ends", [done, done, done + 9]))
    books, step = Books(0, 0), 0
    while coordinator.after_step(step).then != pb.FINISH:
        coordinator.book(books, coordinator.phase, step)  # type: ignore[arg-type]
        step += 1
    assert asked[-4:-1] == [(5, 1), (5, 2), (5, 8)] and coordinator.steps == step + 1 == 5


def test_a_ranking_is_priced_by_what_was_sent_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by an entry between that comes to no step; nor does a plan have more steps than were asked for."""
    budget = Budget(pruned("phases = [[16, 1], [8, 1], [4, 1]]\nbudget_mb = 9"), CHANNELS, EPOCH, BATCH, Beside())
    budget.book(1000, 1000, Phase(0, 0, 16, "step:20", "step:5", 0.1, 0, 1))
    budget._ranking = 4  # as with ranked channels
    between = budget._to_rank(2)
    budget.ends = [10, 10, 20]
    assert budget._to_rank(2) == pytest.approx(2 * between) and between
    monkeypatch.setattr(budget, "_share", lambda *_: (1.02, 2))
    assert budget._plan(9, range(3))[-1] == 3 * EPOCH
