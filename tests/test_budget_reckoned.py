"""How a budget reckons where steps cost what a test says; test_budget.py has real runs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.recipes import recipe_text
from common import report
from common.meter import Count
from common.recipe import Recipe, parse
from common.rpc import split_pb2 as pb
from common.schedule import Phase, planned
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


def test_a_step_that_chooses_channels_is_reckoned_with_as_the_dearest_was() -> None:
    text = recipe_text("deprune", bottleneck='kind = "channels"', schedule="phases = [[2, 5]]\nbudget_mb = 9")
    budget = Budget(parse(text), CHANNELS, EPOCH, BATCH, Beside())
    rank = Phase(0, 0, CHANNELS, "fp32", "fp32", 0.1, 0, 1, kind="rank")
    for payload in (1000, 1100):
        budget.book(payload, payload, rank)
    assert budget.state()["spent"]["ranked"] == 2000


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
