"""What a person reads at the end of a run, and a program in summary.json: figures that are what was counted."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from benchmarks.recipes import recipe_text
from common import report
from common.meter import Meter
from common.recipe import parse
from common.schedule import RANK, Phase
from common.tcp_info import KernelBytes

CUT, SAMPLES = (32, 8, 8), 100
MESSAGES = {
    "up": {"activation": 40_000, "label": 1_000, "evaluation": 7_000},
    "down": {"gradient": 20_000, "weights": 500},
}
DEVICE_SAW = KernelBytes(60_000, 30_000, 2_000)


def phase(width: int, from_step: int = 0, **more: Any) -> Phase:
    return Phase(0, from_step, width, "step:10", "step:5", 0.05, 0, 1, **more)


def summary(
    phases: Sequence[Phase] = (phase(8),), schedule: str = "phases = [[8, 1]]", kernel: KernelBytes | None = DEVICE_SAW,
    side: str = "device", again: int = 0, **outcome: Any,
) -> dict[str, Any]:  # fmt: skip
    codec = 'activation = "step:10"\ngradient = "step:5"'
    recipe = parse(recipe_text("deprune", bottleneck='kind = "channels"', codec=codec, schedule=schedule))
    meter = Meter()
    books = {
        way: {role: {"payload": count - 10, "message": count, "raw": 4 * count} for role, count in roles.items()}
        for way, roles in MESSAGES.items()
    }
    meter.restore({"books": books, "again": {"up": again, "down": 0}}, {"up": 0, "down": 0})
    loss, epochs = outcome.pop("loss", 1.0), outcome.pop("epochs", 1.0)
    asked = outcome.pop("asked", 10)
    came = report.Outcome("id", 0.5, loss, 10, SAMPLES, epochs, asked, 2.0, 1.0, tuple(phases), **outcome)
    return report.summarise(recipe, CUT, came, meter, kernel, side)


def shown(found: dict[str, Any]) -> dict[str, list[str]]:
    """The rows of the table by their names; the sentences, as one text, as "said"."""
    console = Console(file=io.StringIO(), width=200)
    report.show(console, found)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if "│" in line]
    said = " ".join(line for line in text.splitlines() if "│" not in line)
    return {row[0]: row[1:] for row in rows} | {"said": [said]}


def test_the_table_has_what_was_counted() -> None:
    rows = shown(summary(again=300))
    assert rows["activation"] == ["40.0 kB", "-", "40.0 kB"] and rows["gradient"] == ["-", "20.0 kB", "20.0 kB"]
    assert "control" not in rows, "none crossed"
    assert rows["all messages"] == ["48.0 kB", "20.5 kB", "68.5 kB"]
    assert rows["sent again"] == ["300 B", "-", "300 B"]
    assert rows["in the kernel (TCP)"] == ["60.0 kB", "30.0 kB", "90.0 kB"]
    assert rows["of it retransmitted by TCP"] == ["2.0 kB", "-", "2.0 kB"]
    # Activations and labels up, gradients down: what plain needs too.
    assert rows["this run's training steps"] == ["41.0 kB", "20.0 kB", "61.0 kB"]
    plain = 4 * SAMPLES * 32 * 8 * 8
    assert summary()["plain_bytes"] == {"up": plain + SAMPLES, "down": plain}
    assert rows["times fewer"] == [
        f"{plain_of / ours:.2f}"
        for plain_of, ours in ((plain + SAMPLES, 41_000), (plain, 20_000), (2 * plain + SAMPLES, 61_000))
    ]
    assert "sent again" not in shown(summary())


def test_the_server_sees_the_link_from_its_end() -> None:
    found = summary(side="server", kernel=KernelBytes(30_000, 60_000, 400))
    assert (found["bytes"]["up"]["kernel"], found["bytes"]["down"]["kernel"]) == (60_000, 30_000)
    assert shown(found)["of it retransmitted by TCP"] == ["-", "400 B", "400 B"]
    unknown = shown(summary(kernel=None))
    assert unknown["in the kernel (TCP)"] == ["not known"] * 3 and "of it retransmitted by TCP" not in unknown


def test_widths_are_told_as_they_were_learnt_at() -> None:
    """Without the steps at which channels were ranked, nor a width that only went on."""
    ranked = [phase(32, kind=RANK), phase(4, 4), phase(32, 8, kind=RANK), phase(8, 12), phase(8, 14)]
    schedule = "phases = [[4, 1], [8, 1]]"
    found = summary(ranked, schedule)
    assert "width 4 → 8." in shown(found)["said"][0] and found["phases_left_out"] == 0
    early = summary(ranked[:3], schedule)
    assert early["phases_left_out"] == 1
    assert "The run ended before its last phase began: its epochs were over." in shown(early)["said"][0]
    (nested,) = shown(summary([phase(8, nested=(4, 2))]))["said"]
    assert "width 2/4/8." in nested and "That is at width 8; evaluate --width judges" in nested
    whole = summary([phase(32)], "phases = [[0, 1]]")
    assert whole["phases_left_out"] == 0, "0 stands for all channels"


@pytest.mark.parametrize(
    ("megabytes", "epochs", "asked", "phases", "words"),
    [
        (0.5, 2.0, 10, 2, "68.5 kB of messages were spent of a budget of 500.0 kB."),
        (0.5, 1.5, 13, 2, "a budget of 500.0 kB, which was enough for 1.5 of 2 epochs."),
        (0.5, 1.0, 20, 1, "which was enough for 1 of 2 epochs, without the last phase."),
        (0.05, 1.0, 20, 1, "Warning: 68.5 kB of messages were spent of a budget of 50.0 kB, which is too little for"),
        # Few steps, whose epochs are rounded; and as many as were asked for, but none of the last phase.
        (0.5, 1.9, 10, 2, "68.5 kB of messages were spent of a budget of 500.0 kB."),
        (0.5, 2.0, 10, 1, "were spent of a budget of 500.0 kB, without the last phase."),
    ],
)
def test_what_became_of_a_budget_is_said(megabytes: float, epochs: float, asked: int, phases: int, words: str) -> None:
    schedule = f"phases = [[4, 1], [8, 1]]\nbudget_mb = {megabytes}"
    found = summary([phase(4), phase(8, 4)][:phases], schedule, epochs=epochs, asked=asked)
    assert found["budget"] == megabytes * 1e6 and words in shown(found)["said"][0]


def test_what_the_head_learnt_alone_is_said() -> None:
    alone = {"epochs": 2, "steps": 20, "accuracy": 0.75}
    (said,) = shown(summary(local=alone))["said"]
    assert "learnt alone for 2 epochs: its own classifier was right on 75.00% of the test pictures" in said


def test_a_loss_that_is_no_number_is_none_to_json() -> None:
    found = summary(loss=float("nan"))
    assert '"loss": null' in json.dumps(found, allow_nan=False)
    assert "(loss too large for a number)" in shown(found)["said"][0]
