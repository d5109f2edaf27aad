"""`make bench-learning`: the four methods on real pictures, beside federated averaging and uploading the pictures.

Every row trains through the real head, bottleneck, codec, frames and tail, in process; bytes are the meters' own and
leave evaluations out. Writes benchmarks/results/learning.json run by run and goes on where it was stopped. `--quick`
takes a few rows with one seed, a fifth of the pictures and half of the epochs into learning-quick.json. Wants the
pictures as a folder (SOURCE).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.learning_cases import CASES, CUTS, Case
from benchmarks.learning_runs import Job, is_kept, recipe_of, run, start
from common import recipe

RESULTS = Path("benchmarks/results")
PICTURES, QUICK_PICTURES = 20_000, 4_000
SEEDS, QUICK_SEEDS = 2, 1
# A row has reached plain's accuracy where it is no further below its mean than this (share).
MARGIN = 0.005


def add_targets(rows: list[dict[str, Any]]) -> None:
    """Put the target, plain's mean accuracy less MARGIN, and the bytes until it was first met into every row."""
    for model in {row["model"] for row in rows}:
        plain = [row["accuracy"] for row in rows if row["model"] == model and row["method"] == "plain"]
        for row in rows:
            # On five classes it is another, easier task.
            if row["model"] != model or not plain or recipe.parse(row["recipe"]).model.classes != 10:
                continue
            row["target"] = statistics.mean(plain) - MARGIN
            met = [point["bytes"] for point in row["curve"] if point["accuracy"] >= row["target"]]
            if row["accuracy"] >= row["target"]:
                met.append(row["bytes_up"] + row["bytes_down"])
            row["bytes_to_target"] = min(met, default=None)


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Means over the seeds, a line a row."""
    table = Table(show_edge=False, pad_edge=False)
    for name in ("row", "model", "seeds"):
        table.add_column(name, no_wrap=name == "row")
    for name in ("accuracy", "MB", "to target", "wall s", "device s"):
        table.add_column(name, justify="right")
    for (name, model), group in grouped(rows).items():
        sent = statistics.mean(row["bytes_up"] + row["bytes_down"] for row in group)
        reached = [row["bytes_to_target"] for row in group if row.get("bytes_to_target")]
        to_target = f"{statistics.mean(reached) / 1e6:,.0f}" if len(reached) == len(group) else "not met"
        values = [100 * row["accuracy"] for row in group]
        accuracy = f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        table.add_row(
            name, model, str(len(group)), accuracy, f"{sent / 1e6:,.1f}", to_target,
            *(f"{statistics.mean(row[key] for row in group):,.0f}" for key in ("wall_s", "device_s")),
        )  # fmt: skip
    console.print(table)


def grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by (name, model), the seeds of each together, in the order of the cases."""
    result: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        for case in CASES:
            group = [row for row in rows if (row["name"], row["model"]) == (case.name, model)]
            if group:
                result[case.name, model] = group
    return result


def is_wanted(name: str, only: Sequence[str] | None) -> bool:
    """Whether a row is among those asked for: by its name, or by a part of it that is no other row's name."""
    names = {case.name for case in CASES}
    return not only or any(name == part if part in names else part in name for part in only)


def is_current(row: dict[str, Any], quick: bool) -> bool:
    """Whether a row's recipe is still that of its case; the arithmetic is the machine's and may differ."""
    if row["name"] not in {case.name for case in CASES}:
        return False
    texts = row["recipe"], recipe_of((row["name"], row["seed"], row["model"], quick))
    old, new = (replace(recipe.parse(text), precision="fp32") for text in texts)
    return old == new


def waves(
    chosen: Sequence[Case], seeds: Sequence[int], model: str, quick: bool, done: set[tuple[str, int, str]]
) -> tuple[list[Job], list[Job]]:
    """The runs that have no row yet, in two waves: the second starts from the networks of the first.

    Rows outlive the networks they trained (runs/ is nobody's to keep): one that is started from and gone is trained
    again.
    """
    todo = [
        (case.name, seed, model, quick) for case in chosen for seed in seeds if (case.name, seed, model) not in done
    ]
    starts = {case.name: case.start for case in chosen}
    needed = dict.fromkeys((starts[job[0]], *job[1:]) for job in todo if starts[job[0]])
    first = [job for job in needed if job in todo or not is_kept(job)]
    return first, [job for job in todo if job not in first]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder:PATH with train/CLASS and test/CLASS")
    parser.add_argument("--quick", action="store_true", help="a few rows on few pictures; some 20 minutes without AMX")
    parser.add_argument("--model", default="tiny", choices=CUTS, help="the larger ones have fewer rows and epochs")
    parser.add_argument(
        "--only", action="append", help="a row, and what it starts from; or rows whose names contain it"
    )
    parser.add_argument("--seeds", type=int, help=f"how many; default {SEEDS}, quick {QUICK_SEEDS}")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file has no width of its own, and 80 columns are too few for the table
    result = RESULTS / ("learning-quick.json" if options.quick else "learning.json")
    rows = json.loads(result.read_text()) if result.is_file() else []
    seeds = range(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))
    larger = options.model != "tiny" and not options.only
    chosen = [
        case
        for case in CASES
        if (case.quick or not options.quick) and (case.main or not larger) and is_wanted(case.name, options.only)
    ]
    done = {(row["name"], row["seed"], row["model"]) for row in rows if is_current(row, options.quick)}
    jobs = waves(chosen, seeds, options.model, options.quick, done)
    started, count = time.monotonic(), 0
    total = sum(map(len, jobs))
    pictures = QUICK_PICTURES if options.quick else PICTURES
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(options.workers, start, (options.source, pictures)) as pool:
        for wave in jobs:
            for row in pool.imap_unordered(run, wave):
                same = [row[key] for key in ("name", "seed", "model")]
                rows = [other for other in rows if [other[key] for key in ("name", "seed", "model")] != same]
                rows.append(row)
                count += 1
                add_targets(rows)
                RESULTS.mkdir(parents=True, exist_ok=True)
                result.write_text(json.dumps(rows, indent=1) + "\n")
                minutes = (time.monotonic() - started) / count * (total - count) / 60
                console.print(
                    f"{row['name']}, seed {row['seed']}: {row['accuracy']:.2%}, "
                    f"{(row['bytes_up'] + row['bytes_down']) / 1e6:,.1f} MB; {total - count} runs left, "
                    f"about {minutes:.0f} min", highlight=False,
                )  # fmt: skip
    show(console, rows)


if __name__ == "__main__":
    main()
