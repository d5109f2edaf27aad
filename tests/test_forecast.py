"""What is left of a run: later phases cost what their widths and codecs make of the link, not what early ones did."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.recipes import recipe_text
from common import recipe, schedule
from common.codecs import codec
from common.schedule import LEARN, RECALL, STORE, Phase
from common.tcp_info import Flow
from device_client.forecast import Forecast

BATCH, SAMPLES, TEST = 32, 3200, 640  # 100 steps an epoch
EPOCH = SAMPLES // BATCH
UNIT = 100.0  # bytes of a step for each channel and bit
CUT = (32, 5, 5)  # of so many places


class Link:
    """A run over a link of `rate` bytes a second, whose steps take `computing` seconds beside."""

    def __init__(self, rate: float, computing: float) -> None:
        self.rate, self.computing, self.delay = rate, computing, 0.05
        self.flow = Flow(0, 0.0, self.delay)

    def of(self, phase: Phase) -> tuple[float, float, float]:
        """Seconds, and bytes up and down, of a step."""
        width = sum(phase.widths) / len(phase.widths)
        up = 0.0 if phase.kind == RECALL else width * codec(phase.activation_codec).bits * UNIT
        down = 0.0 if phase.kind in (RECALL, STORE) else width * codec(phase.gradient_codec).bits * UNIT
        return self.computing + (up + down) / self.rate, up, down

    def step(self, phase: Phase) -> tuple[float, int, int, float]:
        seconds, up, down = self.of(phase)
        busy = self.flow.busy_s + (up / self.rate + self.delay if up else 0.0)
        self.flow = Flow(self.flow.acknowledged + int(up), busy, self.delay)
        return seconds, int(up), int(down), seconds

    def judging(self, phase: Phase, pictures: int) -> tuple[float, float]:
        up = self.of(replace(phase, kind=LEARN))[1] * pictures / BATCH
        return up / self.rate + self.computing / 5 * pictures / BATCH, up


@pytest.mark.parametrize("rate, computing", [(50_000, 0.05), (50_000, 0.5), (1e9, 0.2)])
@pytest.mark.parametrize(
    "phases", ["[[4, 1], [8, 1], [16, 2]]", "[[16, 2], [4, 2]]", "[{ width = 8, epochs = 4, views = 1 }]"]
)
def test_what_is_left_is_known_from_the_first_steps_on(phases: str, rate: float, computing: float) -> None:
    method = "prune" if phases.startswith("[[16") else "deprune"
    model = 'name = "tiny"\ninput = [1, 16, 16]\nclasses = 10\ncut = "stage1_relu2"'
    text = recipe_text(
        method, model=model + '\ninit = "run:none"' * (method == "prune"), bottleneck='kind = "linear"',
        codec='activation = "step:20"\ngradient = "step:5"', schedule=f"phases = {phases}",
    )  # fmt: skip
    parsed = recipe.parse(text, "here")
    link = Link(rate, computing)
    forecast = Forecast(parsed, CUT, BATCH, (SAMPLES, 0, TEST), lambda: link.flow)
    planned, steps = schedule.planned(parsed, 32, EPOCH)
    planned = [replace(phase, index=index) for index, phase in enumerate(planned)]  # as the coordinator does
    each = [[phase for phase in planned if phase.from_step <= step][-1] for step in range(steps)]
    for step, phase in enumerate(each[:-1]):
        forecast.observe(phase, *link.step(phase))
        left = forecast.left(step + 1, replace(each[step + 1], steps=steps))
        if step < 20:
            continue
        assert left
        costs = [link.of(phase) for phase in each[step + 1 :]]
        seconds, sent = link.judging(each[-1], TEST)
        assert left.seconds == pytest.approx(seconds + sum(cost[0] for cost in costs), rel=0.1, abs=1)
        assert left.bytes == pytest.approx(sent + sum(cost[1] + cost[2] for cost in costs), rel=0.05)


def test_nothing_is_said_before_anything_is_known_and_a_link_that_is_not_told_of_counts_as_computing() -> None:
    parsed = recipe.parse(recipe_text(schedule="phases = [[0, 1]]"), "here")
    forecast = Forecast(parsed, CUT, BATCH, (SAMPLES, 0, 0), lambda: None)
    phase = replace(schedule.planned(parsed, 32, EPOCH)[0][0], steps=EPOCH)
    assert forecast.left(0, phase) is None
    forecast.observe(phase, 60.0, 1000, 1000)  # in which all was set up
    assert forecast.left(1, phase) is None
    forecast.observe(phase, 2.0, 1000, 1000)
    assert forecast.left(2, phase) is None, "of one short step"
    forecast.observe(phase, 10.0, 1000, 1000)
    left = forecast.left(3, phase)
    assert left and left.seconds == pytest.approx(6 * 97) and left.bytes == pytest.approx(2000 * 97)


def test_the_first_steps_of_a_phase_do_not_overturn_what_is_known() -> None:
    parsed = recipe.parse(recipe_text("deprune", bottleneck='kind = "linear"', schedule="phases = [[4, 2], [8, 2]]"))
    forecast = Forecast(parsed, CUT, BATCH, (SAMPLES, 0, 0), lambda: None)
    first, second = (replace(phase, index=index) for index, phase in enumerate(schedule.planned(parsed, 32, EPOCH)[0]))
    for _ in range(20):
        forecast.observe(first, 0.1, 1000, 0)
    forecast.observe(second, 5.0, 2000, 0)  # what was set up for it
    left = forecast.left(201, replace(second, steps=400))
    assert left and left.seconds == pytest.approx(0.1 * 199)


def test_a_run_that_a_budget_shortens_has_less_of_each_phase_left() -> None:
    text = recipe_text("deprune", bottleneck='kind = "linear"', schedule="phases = [[4, 2], [8, 2]]")
    parsed = recipe.parse(text, "here")
    forecast = Forecast(parsed, CUT, BATCH, (SAMPLES, 0, 0), lambda: None)
    phase = schedule.planned(parsed, 32, EPOCH)[0][0]
    for _ in range(5):
        forecast.observe(phase, 1.0, 1000, 1000)
    whole, half = (forecast.left(3, replace(phase, steps=count * EPOCH)) for count in (4, 2))
    assert whole and half
    assert whole.bytes == pytest.approx(2000 * (197 + 2 * 200)) and half.bytes == pytest.approx(2000 * (97 + 2 * 100))
    # A phase that the budget has no room for may be among those that it is reckoned by.
    assert forecast.left(3, replace(phase, steps=EPOCH), 5000.0).bytes == 5000  # type: ignore[union-attr]


def test_under_a_plateau_what_is_left_is_of_the_widest_still_to_come() -> None:
    schedule_ = 'kind = "plateau"\nwidths = [4, 8]\nmax_epochs = 10'
    text = recipe_text("deprune", data="batch = 32\nvalidation = 0.2", bottleneck='kind = "linear"', schedule=schedule_)
    parsed = recipe.parse(text, "here")
    forecast = Forecast(parsed, CUT, BATCH, (SAMPLES, 0, 0), lambda: None)
    first = schedule.planned(parsed, 32, EPOCH)[0][0]
    wider = replace(first, index=1, width=8, from_step=300)
    for _ in range(5):
        forecast.observe(first, 1.0, 500, 500)
    left = forecast.left(5, replace(first, steps=1000))
    assert left and left.bytes == pytest.approx(2000 * 995)
    for _ in range(4):
        forecast.observe(wider, 1.0, 1000, 1000)
    left = forecast.left(400, replace(wider, steps=1000))
    assert left and left.bytes == pytest.approx(2000 * 600)


def test_a_new_connection_is_measured_from_its_own_start() -> None:
    parsed = recipe.parse(recipe_text(schedule="phases = [[0, 4]]"), "here")
    flows = iter([Flow(0, 0.0, 0.0), Flow(10**6, 1.0, 0.0), Flow(1000, 0.1, 0.0), Flow(101_000, 1.1, 0.0)])
    now = next(flows)
    forecast = Forecast(parsed, CUT, BATCH, (SAMPLES, 0, 0), lambda: now)
    phase = schedule.planned(parsed, 32, EPOCH)[0][0]
    rates = []
    for now in flows:  # noqa: B007 - which the forecast asks for
        for _ in range(17):
            forecast.observe(phase, 1.0, 1000, 1000)
        rates.append(forecast._rate)
    assert rates == [10**6, 10**6, 10**5]


def test_an_evaluation_sends_all_channels_of_a_nested_phase() -> None:
    parsed = recipe.parse(
        recipe_text(
            "fixed", bottleneck='kind = "linear"', schedule="phases = [{ width = 16, epochs = 1, nested = [1, 2] }]"
        )
    )
    forecast = Forecast(parsed, CUT, BATCH, (SAMPLES, 0, TEST), lambda: None)
    phase = schedule.planned(parsed, 32, EPOCH)[0][0]
    for _ in range(5):
        forecast.observe(phase, 1.0, 1900, 1900)  # 19 channels in three steps
    left = forecast.left(EPOCH, replace(phase, steps=EPOCH))
    assert left and left.bytes == pytest.approx(300 * 16 * TEST / BATCH)


def test_a_process_that_has_seen_recalls_alone_knows_that_later_steps_send() -> None:
    views = "phases = [{ width = 8, epochs = 2, views = 1 }, { width = 8, epochs = 2 }]"
    parsed = recipe.parse(recipe_text("fixed", bottleneck='kind = "linear"', schedule=views))
    forecast = Forecast(parsed, CUT, BATCH, (SAMPLES, 0, 0), lambda: None)
    recall, learn = schedule.planned(parsed, 32, EPOCH)[0][1:]
    for _ in range(5):
        forecast.observe(replace(recall, index=1), 1.0, 0, 0)
    left = forecast.left(150, replace(recall, index=1, steps=4 * EPOCH))
    bits_ = codec(learn.activation_codec).bits + codec(learn.gradient_codec).bits
    assert left and left.bytes == pytest.approx(200 * 8 * bits_ * BATCH * 25 / 8)
