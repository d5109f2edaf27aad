"""What is told of the rest of a run: how long it takes and what it sends, and what its budget comes to."""

from __future__ import annotations

import io
from dataclasses import replace
from unittest.mock import Mock

import pytest
from rich.console import Console

from benchmarks.recipes import PHASE, recipe_text
from common.meter import Meter
from common.progress import RunningMean, StepProgress
from common.recipe import parse
from common.schedule import RECALL, STORE
from device_client.forecast import Left
from device_client.outlook import Outlook

LINE = {"bytes": {"up": 10, "down": 5}, "seconds": {"wait": 1.0, "head": 0.5}}

ADVICE = "raise schedule.budget_mb, or lower optimiser.warmup"


def told(lengths: list[int], left: Left | None = None, warmup: int = 0) -> list[str]:
    """What a log has beside its step lines of a run with a budget, which has so many steps as is known after each."""
    text = recipe_text(schedule="phases = [[0, 9]]\nbudget_mb = 2", optimiser=f"lr = 0.05\nwarmup = {warmup}")
    console, forecast = Console(file=io.StringIO(), width=200), Mock()
    forecast.left.return_value = left
    with StepProgress(console, 100) as live:
        outlook = Outlook(live, parse(text), Meter(), forecast, 100)
        for step, length in enumerate(lengths):
            outlook.after(LINE | {"step": step}, RunningMean(1.0, 0.5), PHASE, replace(PHASE, steps=length))
        outlook.end(len(lengths))
    forecast.observe.assert_called_with(PHASE, 1.5, 10, 5, 1.0)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [line for line in lines if not line.startswith("step")]


def test_what_is_left_is_told_once_where_it_is_long() -> None:
    long = Left(3700.0, 12_345_678.0)
    assert told([100] * 23, long)[:-1] == []
    assert told([100] * 99, long)[:-1] == ["About 1:01:40 and 12.3 MB are left, as the link is now."]
    assert told([100] * 99, Left(59.0, 1e9))[:-1] == [] == told([100] * 99)[:-1]


@pytest.mark.parametrize(
    ("lengths", "warmup", "words"),
    [
        ([100, 95, 91], 0, []),  # a tenth is no news
        ([100, 95, 60, 57], 0, ["The budget of 2.0 MB is enough for about 60 steps."]),
        ([100, 40, 80], 0, [f"The budget of 2.0 MB is enough for about {steps} steps." for steps in (40, 80)]),
        ([60], 20, ["The budget of 2.0 MB is enough for about 60 steps."]),
        (
            [60],
            21,
            [f"The budget of 2.0 MB is enough for about 60 steps, of which 21 warm up; {ADVICE}."],
        ),
        (
            [60],
            90,
            [f"The budget of 2.0 MB is enough for about 60 steps, of which 60 warm up; {ADVICE}."],
        ),
    ],
)
def test_a_length_that_changes_is_told(lengths: list[int], warmup: int, words: list[str]) -> None:
    assert told(lengths, warmup=warmup)[:-1] == words


def test_at_the_end_it_is_told_what_a_budget_was_enough_for() -> None:
    assert told([100] * 99)[-1:] == ["The budget of 2.0 MB was enough for 99 steps."]
    assert told([100] * 100) == []


def test_a_frozen_phase_is_named_and_what_its_recalls_are_is_told_once() -> None:
    text = recipe_text(schedule="phases = [{ width = 0, epochs = 2, views = 1, shift = 1 }]")
    console, forecast = Console(file=io.StringIO(), width=200), Mock()
    forecast.left.return_value = None
    store = replace(PHASE, kind=STORE)
    recall = replace(PHASE, kind=RECALL)
    with StepProgress(console, 100) as live:
        outlook = Outlook(live, parse(text), Meter(), forecast, 100)
        pairs = ((PHASE, store), (store, store), (store, recall), (recall, recall), (recall, PHASE), (PHASE, PHASE))
        for step, (phase, present) in enumerate(pairs):
            outlook.after(LINE | {"step": step}, RunningMean(1.0, 0.5), phase, replace(present, steps=100))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [" frozen " in line for line in lines if line.startswith("step")] == [False, True, False]
    told = [line for line in lines if not line.startswith("step")]
    assert told == [
        "The views of all pictures have been sent; the server learns from what it kept, flipped or moved, on which "
        "accuracy is lower."
    ]
