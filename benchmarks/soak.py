"""`make soak MINUTES=60`: a long run whose link breaks again and again; memory, descriptors and threads of both sides.

Prints how much each has grown since the first five minutes, ends with 1 where that is 1 % or more, or where a process
ended. Writes benchmarks/results/soak.json and docs/images/soak.png.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.faults import points, proxy, runs
from benchmarks.faults.proxy import Fault, Proxy
from benchmarks.faults.rig import SIDES, Rig
from benchmarks.machine import machine
from common.words import duration

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RUN = Path("runs/soak")
RESULT = Path("benchmarks/results/soak.json")
PICTURE = Path("docs/images/soak.png")
GOAL = 0.01
_EVERY_S = 5.0
_WARM_UP_S = 300.0
_KEPT = 240  # samples in the result file
_QUANTITIES = {"rss": "resident memory, MB", "descriptors": "descriptors", "threads": "threads"}
_KINDS = (proxy.CUT, proxy.CLOSE, proxy.TRUNCATE, proxy.HOLE, proxy.DELAY)
_MOMENTS = (points.FORWARD, points.BACKWARD, points.REPLY, points.EVALUATION, points.RECONNECT)


def sample(process: psutil.Process) -> dict[str, float]:
    with process.oneshot():
        rss = process.memory_info().rss / 1e6
        return {"rss": round(rss, 2), "descriptors": process.num_fds(), "threads": process.num_threads()}


def soak(console: Console, minutes: float, seed: int) -> dict[str, Any]:
    """Train for so long; samples by side, and what was done to the link."""
    shutil.rmtree(RUN, ignore_errors=True)
    draw = random.Random(seed)
    text = runs.recipe((2, 20), (4, 20), (8, 1_000_000))  # longer than anyone soaks
    samples: list[dict[str, Any]] = []
    breaks: list[float] = []
    # Nothing is repeated here, so nothing needs to be remembered.
    with Rig(RUN, text, proxy=Proxy(remember=False)) as rig:
        rig.start_device()
        rig.until(lambda: rig.step > 0)
        watched = {side: psutil.Process(rig.processes[side].pid) for side in SIDES}
        started = shown = time.monotonic()
        fault, next_break = None, started + draw.uniform(2, 18)
        while (now := time.monotonic()) < started + 60 * minutes and not any(rig.restarts.values()):
            if now >= started + len(samples) * _EVERY_S:
                seen = {side: sample(process) for side, process in watched.items()}
                samples.append({"s": round(now - started, 1), "step": rig.step} | seen)
            if now >= next_break:
                fault = rig.proxy.arm(_break(draw, rig.step))
                next_break = now + draw.uniform(2, 18)
            if fault and fault.fired.is_set():
                breaks.append(round(now - started, 1))
                fault = None
            if now >= shown + 60:
                shown = now
                left = duration(started + 60 * minutes - now)
                console.print(f"step {rig.step:,}, the link was broken {len(breaks)} times; {left} left")
            rig.tick()
            time.sleep(0.1)
        return {
            "samples": samples, "breaks": breaks, "steps": rig.step + 1, "replayed": rig.proxy.replayed,
            "connections": rig.proxy.connections, "ended": {side: rig.restarts[side] for side in SIDES},
        }  # fmt: skip


def _break(draw: random.Random, step: int) -> Fault:
    kind, point = draw.choice(_KINDS), draw.choice(_MOMENTS)
    seconds = draw.uniform(0.5, 3) if kind in (proxy.HOLE, proxy.DELAY) else 0.0
    return Fault(kind, points.moment(point, step), draw.choice((0.0, 0.5)), seconds)


def growth(samples: list[dict[str, Any]], side: str, quantity: str) -> tuple[float, float, float]:
    """Median of the first tenth after the warm-up, of the last tenth, and by what share that is more."""
    values = [one[side][quantity] for one in settled(samples)]
    tenth = max(1, len(values) // 10)
    first, last = statistics.median(values[:tenth]), statistics.median(values[-tenth:])
    return first, last, last / first - 1


def settled(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those after the first five minutes; after the first quarter of a soak that is shorter than 20."""
    warm_up = min(_WARM_UP_S, samples[-1]["s"] / 4)
    return [one for one in samples if one["s"] >= warm_up]


def show(console: Console, samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Print the growth of everything; the shares by side and quantity."""
    table = Table(title=f"Medians of the first and last tenth of {len(settled(samples))} samples after the warm-up")
    for name in ("", "", "first", "last", "growth"):
        table.add_column(name, justify="right" if name else "left")
    shares: dict[str, dict[str, float]] = {side: {} for side in SIDES}
    for side in SIDES:
        for quantity, words in _QUANTITIES.items():
            first, last, share = growth(samples, side, quantity)
            shares[side][quantity] = round(share, 5)
            table.add_row(side, words, f"{first:,.1f}", f"{last:,.1f}", f"{share:+.2%}")
    console.print(table)
    return shares


def plot(samples: list[dict[str, Any]], breaks: list[float]) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    minutes = [one["s"] / 60 for one in samples]
    for axes, (quantity, words) in zip(panels, _QUANTITIES.items(), strict=True):
        for side in SIDES:
            axes.plot(minutes, [one[side][quantity] for one in samples], label=side)
        axes.set(xlabel="minutes", title=words)
        axes.set_ylim(0, None)
        axes.axvline(settled(samples)[0]["s"] / 60, color="gray", linewidth=0.8, linestyle=":")
        marks = [at / 60 for at in breaks]
        axes.plot(marks, [0] * len(marks), "|", color="tab:red", markersize=6, label="link broken", clip_on=False)
    panels[0].legend(loc="center right")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minutes", type=float, nargs="?", default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error("give more than 0 minutes")
    console = Console(soft_wrap=True)
    outcome = soak(console, options.minutes, options.seed)
    samples = outcome.pop("samples")
    shares = show(console, samples)
    plot(samples, outcome["breaks"])
    thinned = samples[:: max(1, -(-len(samples) // _KEPT))]
    head = {"date": date.today().isoformat(), "machine": machine(), "minutes": options.minutes, "seed": options.seed}
    outcome["breaks"] = len(outcome["breaks"])
    result = head | {"growth": shares} | outcome | {"samples": thinned}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    ended = [side for side in SIDES if outcome["ended"][side]]
    over = [f"{side}'s {name}" for side in SIDES for name, share in shares[side].items() if share >= GOAL]
    console.print(
        f"{outcome['steps']:,} steps, link broken {outcome['breaks']} times, {outcome['replayed']} steps sent again; "
        + (f"ended by itself: {', '.join(ended)}; " if ended else "")
        + (f"grew by {GOAL:.0%} or more: {', '.join(over)}" if over else f"nothing grew by {GOAL:.0%}"),
        highlight=False,
    )
    sys.exit(1 if over or ended else 0)


if __name__ == "__main__":
    main()
