"""The end of a run in figures: summary.json, and the table that a person reads. Both sides call it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from common.meter import DOWN, ROLES, UP, Meter
from common.recipe import Recipe
from common.schedule import RANK, Phase, phase_of_entry
from common.tcp_info import KernelBytes
from common.wire import label_type
from common.words import duration, for_json, several, size

# What a plain run needs too, and so what the comparison is made on; weights, evaluation and control stand apart.
_TRAINING = {UP: ("activation", "label"), DOWN: ("gradient",)}


@dataclass
class Faults:
    """What went wrong and was made good, as this side saw it."""

    reconnects: int = 0  # new connections of the same two processes
    resumed: int = 0  # times that the run went on from a checkpoint
    steps_again: int = 0  # steps made once more since then


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to."""

    run_id: str
    accuracy: float  # on the test part, 0 to 1
    loss: float  # mean cross-entropy there
    steps: int
    samples: int  # pictures trained on, repeats counted
    epochs: float
    steps_asked: int | None  # by the recipe; None under a plateau
    wall_s: float
    busy_s: float  # of it spent computing on this side
    phases: tuple[Phase, ...]
    faults: Faults = field(default_factory=Faults)
    local: Mapping[str, Any] | None = None  # what the head learnt alone before: "epochs", "steps", "accuracy"


def plain_bytes(recipe: Recipe, cut: tuple[int, ...], samples: int) -> dict[str, int]:
    """Payload bytes of the same steps in fp32 at full width: activations and labels up, gradients down."""
    tensor = 4 * samples * math.prod(cut)
    return {UP: tensor + samples * label_type(recipe.model.classes).itemsize, DOWN: tensor}


def summarise(
    recipe: Recipe, cut: tuple[int, ...], outcome: Outcome, meter: Meter, kernel: KernelBytes | None, side: str
) -> dict[str, Any]:
    """What summary.json holds. `kernel`: of the run's connections, as this `side`, "device" or "server", sees them."""
    up, down = (kernel.sent, kernel.received) if kernel else (None, None)
    bytes_ = meter.report(up, down) if side == "device" else meter.report(down, up)
    plain = plain_bytes(recipe, cut, outcome.samples)
    return {
        "side": side,
        "name": recipe.name,
        "method": recipe.method,
        "model": recipe.model.name,
        "cut": recipe.model.cut,
        "cut_shape": list(cut),
        "seed": recipe.seed,
        "run_id": outcome.run_id,
        "digest": recipe.digest(),
        "accuracy": outcome.accuracy,
        "loss": for_json(outcome.loss),
        "epochs": outcome.epochs,
        "steps": outcome.steps,
        "samples": outcome.samples,
        "wall_s": round(outcome.wall_s, 3),
        "busy_s": round(outcome.busy_s, 3),
        "bytes": bytes_,
        "retransmitted": kernel.retransmitted if kernel else None,
        "faults": asdict(outcome.faults),
        "plain_bytes": plain,
        "times_fewer": {way: _fewer(bytes_, plain, (way,)) for way in (UP, DOWN)}
        | {"total": _fewer(bytes_, plain, (UP, DOWN))},
        **({"local": outcome.local} if outcome.local else {}),
        "budget": round(recipe.schedule.budget_mb * 1e6) or None,
        "steps_asked": outcome.steps_asked,
        "epochs_asked": sum(phase.epochs for phase in recipe.schedule.phases) or None,
        "phases_left_out": _left_out(recipe, cut[0], outcome.phases),
        "phases": [
            {
                "from_step": phase.from_step,
                "width": phase.width,
                "nested": list(phase.nested),
                "kind": phase.kind,
                "activation": phase.activation_codec,
                "gradient": phase.gradient_codec,
            }
            for phase in outcome.phases
        ],
    }


def _left_out(recipe: Recipe, channels: int, phases: Sequence[Phase]) -> int:
    """How many of the last phases that were asked for never came: a budget was spent before, or the epochs over."""

    def settings(phase: Phase) -> tuple[object, ...]:
        return phase.widths, phase.activation_codec, phase.gradient_codec

    asked = [phase_of_entry(recipe, entry, channels) for entry in recipe.schedule.entries]
    rest = [one for one, _ in groupby(map(settings, asked))]
    for one, _ in groupby(settings(phase) for phase in phases if phase.kind != RANK):
        # Entries in between that came to no step are not the last.
        rest = rest[rest.index(one) + 1 :] if one in rest else rest
    return len(rest)


def _trained(bytes_: dict[str, Any], way: str) -> int:
    by_role = bytes_[way]["by_role"]
    return sum(by_role[role]["message"] for role in _TRAINING[way] if role in by_role)


def _fewer(bytes_: dict[str, Any], plain: dict[str, int], ways: tuple[str, ...]) -> float | None:
    """Plain's payload over our messages for the same training steps: their framing isn't counted, ours is. None where
    nothing crossed, as downwards where the head is frozen."""
    ours = sum(_trained(bytes_, way) for way in ways)
    return round(sum(plain[way] for way in ways) / ours, 3) if ours else None


def show(console: Console, summary: dict[str, Any]) -> None:
    """Print the summary: what came of the run in a sentence or some, and the table of its bytes."""
    bytes_ = summary["bytes"]
    # What channels are ranked at is not among the widths of the method.
    phases = [phase for phase in summary["phases"] if phase["kind"] != RANK]
    widths = [widths for widths, _ in groupby((*sorted(phase["nested"]), phase["width"]) for phase in phases)]
    path = " → ".join("/".join(map(str, one)) for one in widths)
    loss = "too large for a number" if summary["loss"] is None else f"{summary['loss']:.3f}"
    console.print(
        f"\n[bold]{summary['accuracy']:.2%}[/bold] test accuracy "
        f"(loss {loss}) after {several(summary['steps'], 'step')}, "
        f"{several(summary['epochs'], 'epoch')}, in {duration(summary['wall_s'])}; "
        f"method {summary['method']}, width {path}.",
        highlight=False,
    )
    if len(widths[-1]) > 1:
        console.print(
            f"That is at width {widths[-1][-1]}; evaluate --width judges the network at the others.", highlight=False
        )
    if local := summary.get("local"):
        console.print(
            f"Before, the head learnt alone for {several(local['epochs'], 'epoch')}: its own classifier was right on "
            f"{local['accuracy']:.2%} of the test pictures.", highlight=False,
        )  # fmt: skip
        if local["accuracy"] >= summary["accuracy"]:
            well = "as well" if local["accuracy"] == summary["accuracy"] else "better"
            console.print(
                f"So the device alone does {well} here: the server has added nothing. device-client predict alone asks "
                f"it.", highlight=False,
            )  # fmt: skip
    if summary["budget"]:
        console.print(_spent(summary, bytes_[UP]["message"] + bytes_[DOWN]["message"]), highlight=False)
    elif left := summary["phases_left_out"]:
        console.print(f"The run ended before its {_last_phases(left)} began: its epochs were over.", highlight=False)
    if parts := _told(summary["faults"]):
        console.print(f"On the way: {parts}; the result is that of an undisturbed run.", highlight=False)
    console.print(_table(summary))
    resumed = bool(summary["faults"]["resumed"])
    if any(0 < (one["kernel"] or 0) < one["message"] + resumed * one["again"] for one in (bytes_[UP], bytes_[DOWN])):
        console.print(
            "The kernel's bytes are without those that an earlier process moved after its last checkpoint: when it "
            "ended, their count was lost.", highlight=False,
        )  # fmt: skip


def _table(summary: dict[str, Any]) -> Table:
    """Bytes by role and in all, what plain split learning would have sent, and how many times fewer that makes it."""
    bytes_, plain, fewer = summary["bytes"], summary["plain_bytes"], summary["times_fewer"]
    table = Table(title="Bytes on the link", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("")
    for name in ("up", "down", "both"):
        table.add_column(name, justify="right")

    def row(name: str, up: int | None, down: int | None, **style: Any) -> None:
        known = up is not None and down is not None
        table.add_row(name, *(_cell(value) for value in (up, down, up + down if known else None)), **style)  # type: ignore[operator]

    for role in ROLES:
        counts = [bytes_[way]["by_role"].get(role, {}).get("message", 0) for way in (UP, DOWN)]
        if any(counts):
            row(role, *counts)
    row("all messages", bytes_[UP]["message"], bytes_[DOWN]["message"], style="bold")
    if bytes_[UP]["again"] or bytes_[DOWN]["again"]:
        row("sent again", bytes_[UP]["again"], bytes_[DOWN]["again"])
    row("in the kernel (TCP)", bytes_[UP]["kernel"], bytes_[DOWN]["kernel"], end_section=not summary["retransmitted"])
    if again := summary["retransmitted"]:
        # A side knows what it sent twice itself, not what the other one did.
        cells = (_cell(again), "-") if summary["side"] == "device" else ("-", _cell(again))
        table.add_row("of it retransmitted by TCP", *cells, _cell(again), end_section=True)
    row("this run's training steps", _trained(bytes_, UP), _trained(bytes_, DOWN))
    row("plain split learning, same steps", plain[UP], plain[DOWN])
    ratios = (fewer[key] for key in (UP, DOWN, "total"))
    table.add_row("times fewer", *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios), style="bold")
    return table


def _spent(summary: dict[str, Any], spent: int) -> str:
    budget, left = summary["budget"], summary["phases_left_out"]
    text = f"{size(spent)} of messages were spent of a budget of {size(budget)}"
    last = f", without the {_last_phases(left)}" if left else ""
    if spent <= budget and summary["steps"] >= summary["steps_asked"]:
        return f"{text}{last}."
    if spent <= budget:
        return f"{text}, which was enough for {summary['epochs']:.3g} of {summary['epochs_asked']:g} epochs{last}."
    return (
        f"[yellow]Warning[/yellow]: {text}, which is too little for the head's weights, some steps and the test part."
    )


def _told(faults: dict[str, int]) -> str:
    """What went wrong, in words; "" where nothing did."""
    words = {
        "reconnects": ("reconnect", ""),
        "resumed": ("time", " resumed from a checkpoint"),
        "steps_again": ("step", " made again"),
    }
    return ", ".join(several(number, words[name][0]) + words[name][1] for name, number in faults.items() if number)


def _last_phases(count: int) -> str:
    return "last phase" if count == 1 else f"last {several(count, 'phase')}"


def _cell(value: int | None) -> str:
    if value is None:
        return "not known"
    return size(value) if value else "-"
