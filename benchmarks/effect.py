"""`make bench-effect`: what codec `step` does to learning, by the SNRs of both directions and the rounding.

Every run trains the small network on the same CIFAR-10 pictures for the same steps through the real head, codec and
tail, in process; only the codec differs. Against raw fp32 with the same seed. Writes benchmarks/results/effect.json,
run by run, and goes on where it was stopped on such a machine. Takes hours, minutes on a graphics card (`--device`);
wants the pictures as a folder (SOURCE). `--long` trains the settings that a default is chosen from for 20 epochs and
judges them by pictures that were never trained on as well, into effect-long.json.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.learning_cases import precision
from benchmarks.machine import machine
from benchmarks.options import add_device, add_source, cores
from common import processor
from common.files import write_atomically

RESULTS = Path("benchmarks/results")
ACTIVATION, GRADIENT = (10, 15, 20, 30), (5, 10, 15, 20)
SEEDS = (0, 1)
# The default and what it could be instead, with more seeds: two of a cell differ by up to a point.
CLOSE, CLOSE_SEEDS = ((20, 5), (20, 10), (30, 5)), (2, 3)
# Runs of one seed that differ by next to nothing still end some tenths of a point apart: the mean of these is what
# the others are compared with.
AS_RAW = ("fp32", "fp16", "step:40")
LONG = ((15, 10), (20, 5), (20, 10), (20, 15), (25, 5), (25, 10), (30, 5))
LONG_RAW, LONG_SEEDS = ("fp32", "step:40"), (0, 1, 2, 3)
RECIPE = """
name = "effect"
method = "fixed"
seed = {seed}
precision = "{precision}"
[model]
name = "tiny"
input = [3, 32, 32]
classes = 10
cut = "stage1_relu2"
[data]
batch = 128
crop = 4
flip = true
mean = [0.49, 0.48, 0.45]
std = [0.25, 0.24, 0.26]
[codec]
activation = "{activation}"
gradient = "{gradient}"
[schedule]
phases = [[0, {epochs}]]
[optimiser]
lr = 0.1
warmup = 100
"""
_data: Any = None
_processor: Any = None
Setting = tuple[str, str, int]  # activation codec, gradient codec, seed


@dataclass(frozen=True)
class Plan:
    """What is trained, for how long, and by how many pictures beside the test's it is judged: of those that are not
    trained on. Two networks that err on one picture in five seem half a point apart by chance where 5,000 judge.
    """

    file: str
    epochs: float
    cases: list[Setting]
    more: int = 0


def _all() -> list[Setting]:
    """Those that tell most first."""
    raw = [(name, name, seed) for name in AS_RAW for seed in SEEDS]
    grid = itertools.product(("", ":nearest"), SEEDS, ACTIVATION, GRADIENT)
    whole = raw + [(f"step:{up}", f"step:{down}{rounding}", seed) for rounding, seed, up, down in grid]
    pairs = [(name, name) for name in AS_RAW] + [(f"step:{up}", f"step:{down}") for up, down in CLOSE]
    return whole + [(*pair, seed) for seed in CLOSE_SEEDS for pair in pairs]


def _long() -> list[Setting]:
    pairs = [(name, name) for name in LONG_RAW] + [(f"step:{up}", f"step:{down}") for up, down in LONG]
    return [(*pair, seed) for seed in LONG_SEEDS for pair in pairs]


PLANS = {False: Plan("effect.json", 5, _all()), True: Plan("effect-long.json", 20, _long(), more=25_000)}


def _load(source: str, limit: int, more: int, device: str) -> None:
    import numpy as np
    import torch

    from device_client.data import Dataset, Part, load

    global _data, _processor
    torch.set_num_threads(1)
    _processor = processor.choose(device)
    read = load(source, (3, 32, 32), 0, 0.0, limit=limit + more)
    order = np.random.default_rng(0).permutation(len(read.train)) if more else np.arange(len(read.train))
    trained, others = order[:limit], order[limit:]
    judged = Part(
        np.concatenate((read.test.pictures, read.train.pictures[others])),
        np.concatenate((read.test.labels, read.train.labels[others])),
    )
    _data = Dataset(
        read.classes, Part(read.train.pictures[trained], read.train.labels[trained]), read.validation, judged, ()
    )


def _run(case: tuple[str, str, int, float]) -> dict[str, Any]:
    from benchmarks import inprocess

    activation, gradient, seed, epochs = case
    text = RECIPE.format(
        seed=seed, activation=activation, gradient=gradient, epochs=epochs, precision=precision(_processor.type)
    )
    summary = inprocess.train(text, _data, processor=_processor)
    ways = summary["bytes"]
    sent = {way: ways[way]["by_role"][role]["message"] for way, role in (("up", "activation"), ("down", "gradient"))}
    elements = summary["plain_bytes"]["down"] / 4
    return {
        "activation": activation, "gradient": gradient, "seed": seed, "accuracy": summary["accuracy"],
        "loss": summary["loss"], "steps": summary["steps"], "bytes_up": sent["up"], "bytes_down": sent["down"],
        "up_per_element": sent["up"] / elements, "down_per_element": sent["down"] / elements,
    }  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One pair of SNRs against the reference, over the seeds."""

    points: float  # of accuracy, mean; below 0: lost
    seeds: str  # the same, seed by seed
    fewer: float  # bytes of raw fp32 over these


def cells(rows: list[dict[str, Any]], seeds: tuple[int, ...] = SEEDS) -> dict[tuple[int, int, str], Cell]:
    """By (SNR up, SNR down, rounding). The reference of a seed is the mean of its runs that are as good as raw."""
    result, rows = {}, [row for row in rows if row["seed"] in seeds]
    raw = {row["seed"]: row for row in rows if row["activation"] == "fp32"}
    reference = {
        seed: statistics.mean(row["accuracy"] for row in rows if row["seed"] == seed and row["activation"] in AS_RAW)
        for seed in raw
    }
    asked = dict.fromkeys((*itertools.product(ACTIVATION, GRADIENT), *LONG))
    for (up, down), rounding in itertools.product(asked, ("", ":nearest")):
        names = (f"step:{up}", f"step:{down}{rounding}")
        chosen = [row for row in rows if (row["activation"], row["gradient"]) == names and row["seed"] in raw]
        if chosen:
            points = [
                100 * (row["accuracy"] - reference[row["seed"]]) for row in sorted(chosen, key=lambda r: r["seed"])
            ]
            sent = [row["bytes_up"] + row["bytes_down"] for row in chosen]
            full = [raw[row["seed"]]["bytes_up"] + raw[row["seed"]]["bytes_down"] for row in chosen]
            each = ", ".join(f"{value:+.1f}" for value in points)
            result[up, down, rounding] = Cell(statistics.mean(points), each, sum(full) / sum(sent))
    return result


def show(console: Console, rows: list[dict[str, Any]], long: bool) -> None:
    """Points of accuracy against the reference and times fewer bytes, one table a rounding."""
    found = cells(rows, LONG_SEEDS if long else SEEDS)
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["activation"] in AS_RAW:
            console.print(f"{row['activation']}, seed {row['seed']}: {row['accuracy']:.2%}", highlight=False)
    if long:
        for (up, down, _), found_one in found.items():
            points = f"{found_one.points:+.2f} ({found_one.seeds}), {found_one.fewer:.1f}x"
            console.print(f"{up} dB up, {down} down: {points}", highlight=False)
        return
    for rounding in ("", ":nearest"):
        table = Table(title=f"gradients rounded {'to nearest' if rounding else 'without bias'}", title_justify="left")
        table.add_column("up \\ down")
        for down in GRADIENT:
            table.add_column(f"{down} dB", justify="right")
        for up in ACTIVATION:
            across = [found.get((up, down, rounding)) for down in GRADIENT]
            table.add_row(f"{up} dB", *(f"{cell.points:+.2f}  {cell.fewer:.1f}x" if cell else "" for cell in across))
        console.print(table)


@contextlib.contextmanager
def _giving_up(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Where it is stopped, those that wait their turn are not trained: their rows would be written nowhere."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_source(parser)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--long", action="store_true", help="the settings that a default is chosen from, longer")
    parser.add_argument("--epochs", type=float, help="5, --long 20")
    parser.add_argument("--workers", type=int, default=cores())
    add_device(parser)
    options = parser.parse_args()
    console = Console()
    plan = PLANS[options.long]
    folder = Path(options.source.removeprefix("folder:"))
    there = [path.stat().st_size for path in folder.glob("train/*/*")]
    if len(there) < options.pictures + plan.more:
        parser.error(
            f"{len(there):,} training pictures in {options.source}; {options.pictures + plan.more:,} are needed: "
            f"{options.pictures:,} to train on" + (f", {plan.more:,} to judge by" if plan.more else "")
        )
    epochs = options.epochs or plan.epochs
    where = machine() + ("" if options.device == "cpu" else f", {options.device}")
    setting = {"pictures": options.pictures, "epochs": epochs, "machine": where, "source_bytes": sum(there)} | (
        {"more": plan.more} if plan.more else {}
    )
    file = RESULTS / plan.file
    rows: list[dict[str, Any]] = []
    if file.is_file():
        before = json.loads(file.read_text())
        if {name: before.get(name) for name in setting} == setting:
            rows = before["rows"]
        else:  # hours of work, of another machine or of other pictures
            ends = ("", *(f"-{number}" for number in range(2, 100)))
            names = (file.with_name(f"{file.stem}.{before['date']}{end}.json") for end in ends)
            aside = next(path for path in names if not path.exists())
            file.replace(aside)
            console.print(f"What {file} held is of another setting: it is {aside} now.", highlight=False)
    done = {(row["activation"], row["gradient"], row["seed"]) for row in rows}
    left = [(*case, epochs) for case in plan.cases if case not in done]
    started = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    given = (options.source, options.pictures, plan.more, options.device)
    with ProcessPoolExecutor(options.workers, spawn, _load, given) as pool, _giving_up(pool):
        for number, future in enumerate(as_completed([pool.submit(_run, case) for case in left]), 1):
            row = future.result()
            rows.append(row)
            file.parent.mkdir(parents=True, exist_ok=True)
            result = {"date": date.today().isoformat(), **setting, "rows": rows}
            write_atomically(file, (json.dumps(result, indent=1) + "\n").encode())
            minutes = (time.monotonic() - started) / number * (len(left) - number) / 60
            console.print(
                f"{row['activation']:>8} up, {row['gradient']} down, seed {row['seed']}: {row['accuracy']:.2%}; "
                f"{len(left) - number} runs left, about {minutes:.0f} min", highlight=False,
            )  # fmt: skip
    show(console, rows, options.long)


if __name__ == "__main__":
    main()
