"""What the learning benchmark says of `context` without having coded all of a run by it."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import inprocess
from benchmarks.priced import Priced, Prices
from benchmarks.recipes import recipe_text
from common.meter import DOWN, UP
from device_client.data import Dataset

CODEC = 'activation = "{0}:15"\ngradient = "{0}:10"'
SCHEDULE = "phases = [[2, 1], { width = 4, epochs = 1, views = 0.5, flip = true }, [8, 1]]"


def _text(coder: str) -> str:
    return recipe_text("deprune", bottleneck='kind = "linear"', codec=CODEC.format(coder), schedule=SCHEDULE)


def _payload(summary: dict[str, Any], way: str) -> int:
    roles = summary["bytes"][way]["by_role"]
    return sum(count["payload"] for role, count in roles.items() if role in ("activation", "gradient"))


@pytest.fixture(scope="module")
def priced(digits: Dataset) -> tuple[dict[str, Any], Prices]:
    """Every step is coded by both."""
    prices = Prices(every=1)
    return inprocess.train(_text("step"), digits, Priced, prices=prices), prices


def test_with_every_step_it_is_what_a_run_by_context_sends(
    digits: Dataset, priced: tuple[dict[str, Any], Prices]
) -> None:
    summary, prices = priced
    other = inprocess.train(_text("context"), digits)
    assert summary["loss"] == other["loss"]
    for way in (UP, DOWN):
        assert prices.saved(way) == _payload(summary, way) - _payload(other, way) > 0


def test_every_fourth_step_tells_nearly_the_same(digits: Dataset, priced: tuple[dict[str, Any], Prices]) -> None:
    whole, some = priced[1], Prices(every=4)
    inprocess.train(_text("step"), digits, Priced, prices=some)
    for way in (UP, DOWN):
        assert some.saved(way) == pytest.approx(whole.saved(way), rel=0.1)
    assert 0 < some.spent < whole.spent


def test_raw_tensors_have_no_other_price(digits: Dataset) -> None:
    prices = Prices(every=1)
    inprocess.train(recipe_text(schedule="phases = [[0, 0.2]]"), digits, Priced, prices=prices)
    assert (prices.saved(UP), prices.saved(DOWN), prices.spent) == (0, 0, 0.0)
