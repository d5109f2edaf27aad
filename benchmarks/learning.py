"""`make bench-learning`: the four methods on real pictures, beside federated averaging and uploading the pictures.

Every row trains through the real head, bottleneck, codec, frames and tail, in process; bytes are the meters' own and
leave evaluations out. Writes benchmarks/results/learning.json run by run and goes on where it was stopped. `--quick`
takes a few rows with one seed, a fifth of the pictures and half of the epochs into learning-quick.json; `--table` those
of another table. Rows that are recorded are not trained again: `--into NAME` takes another file. Wants the pictures as
a folder (SOURCE).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.learning_cases import CASES, CUTS, Case
from benchmarks.learning_runs import Job, alike, epochs, is_kept, recipe_of, run, start
from benchmarks.learning_tables import TABLES
from benchmarks.options import add_device, add_source, cores
from common import recipe
from common.files import write_atomically

RESULTS = Path("benchmarks/results")
PICTURES, QUICK_PICTURES = 20_000, 4_000
SEEDS, QUICK_SEEDS = 2, 1
# A row has reached plain's accuracy where it is no further below its mean than this (share).
MARGIN = 0.005


def add_targets(rows: list[dict[str, Any]]) -> None:
    """Put the target, plain's mean accuracy less MARGIN, and the bytes until it was first met into every row."""
    for model in {row["model"] for row in rows}:
        plain = [row["accuracy"] for row in rows if row["model"] == model and row["name"] == "plain"]
        for row in rows:
            # On five classes it is another, easier task.
            if row["model"] != model or not plain or recipe.parse(row["recipe"]).model.classes != 10:
                continue
            row["target"] = statistics.mean(plain) - MARGIN
            ends = {"bytes": row["bytes_up"] + row["bytes_down"], "context": row["context_up"] + row["context_down"]}
            points = [*row["curve"], {"accuracy": row["accuracy"], **ends}]
            met = [point for point in points if point["accuracy"] >= row["target"]]
            for coder in ends:
                row[f"{coder}_to_target"] = min((point[coder] for point in met), default=None)


def sent(rows: Sequence[dict[str, Any]], coder: str = "bytes") -> float:
    """Bytes both ways, the mean over seeds."""
    return statistics.mean(row[f"{coder}_up"] + row[f"{coder}_down"] for row in rows)


def reached(rows: Sequence[dict[str, Any]], coder: str) -> str:
    """MB to the target, of a row all of whose seeds met it."""
    met = [row[f"{coder}_to_target"] for row in rows if row.get(f"{coder}_to_target")]
    return f"{statistics.mean(met) / 1e6:,.0f}" if len(met) == len(rows) else "not met"


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Means over the seeds, a line a row."""
    table = Table(show_edge=False, pad_edge=False)
    for name in ("row", "model", "seeds"):
        table.add_column(name, no_wrap=name == "row")
    for name in ("accuracy", "MB", "by context", "to target", "wall s", "device s"):
        table.add_column(name, justify="right")
    for (name, model), group in grouped(rows).items():
        values = [100 * row["accuracy"] for row in group]
        spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        accuracy = f"{statistics.mean(values):.1f}{spread}"
        table.add_row(
            name, model, str(len(group)), accuracy,
            *(f"{sent(group, coder) / 1e6:,.1f}" for coder in ("bytes", "context")), reached(group, "context"),
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
    return alike(row["recipe"], recipe_of((row["name"], row["seed"], row["model"], quick)))


def planned(
    chosen: Sequence[tuple[Case, str]], seeds: Sequence[int], quick: bool, done: set[tuple[str, int, str]]
) -> tuple[list[Job], dict[Job, list[Job]]]:
    """The runs of `chosen`, cases and models, that have no row yet, the long ones first; and for each those that start
    from its network.

    Rows outlive the networks they trained (runs/ is nobody's to keep): one that is started from and gone is trained
    again.
    """
    cases = {case.name: case for case in CASES}
    todo = [
        (case.name, seed, model, quick)
        for case, model in chosen
        for seed in seeds
        if (case.name, seed, model) not in done
    ]
    after: dict[Job, list[Job]] = {}
    for job in todo:
        if start := cases[job[0]].start:
            after.setdefault((start, *job[1:]), []).append(job)
    free = [job for job in todo if not cases[job[0]].start]
    missing = [job for job in after if job not in free and not is_kept(job)]
    ready = [job for begun, jobs in after.items() if begun not in free and is_kept(begun) for job in jobs]
    # What others wait for begins first.
    models = list(dict.fromkeys(model for _, model in chosen))
    first = sorted([*missing, *free], key=lambda job: (job not in after, models.index(job[2]), -epochs(job)))
    return [*first, *ready], {job: after.get(job, []) for job in first}


def trained(
    jobs: Sequence[Job], after: dict[Job, list[Job]], workers: int, setting: tuple[str, int, str]
) -> Iterator[tuple[Job, dict[str, Any] | None, str]]:
    """Each job with its row as it is done, or with what went wrong: the others go on. A worker that is killed takes all
    that are left with it: begun again, the benchmark goes on with those."""

    def failed(job: Job, why: str) -> Iterator[tuple[Job, None, str]]:
        yield job, None, why
        for later in after.get(job, []):
            yield later, None, "what it starts from failed"

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start, setting) as pool:
        ready, going = deque(jobs), dict[Future[dict[str, Any]], Job]()
        while ready or going:
            while ready and len(going) < workers:
                job = ready.popleft()
                try:
                    going[pool.submit(run, job)] = job
                except BrokenProcessPool as error:
                    yield from failed(job, str(error))
            ended, _ = wait(going, return_when=FIRST_COMPLETED)
            for future in ended:
                job = going.pop(future)
                if error := future.exception():
                    yield from failed(job, f"{type(error).__name__}: {error}")
                    continue
                ready.extendleft(after.get(job, []))
                yield job, future.result(), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_source(parser)
    parser.add_argument(
        "--quick", action="store_true", help="a few rows on few pictures; a quarter of an hour without AMX"
    )
    parser.add_argument(
        "--model", action="append", choices=CUTS, help="tiny unless given; the larger ones have fewer rows and epochs"
    )
    parser.add_argument(
        "--only", action="append", help="a row, and what it starts from; or rows whose names contain it"
    )
    parser.add_argument("--table", choices=TABLES, help="the rows of another table, into learning-TABLE.json")
    parser.add_argument("--seeds", type=int, help=f"how many; default {SEEDS}, quick {QUICK_SEEDS}")
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--into", default="", help="write benchmarks/results/NAME.json instead", metavar="NAME")
    add_device(parser)
    options = parser.parse_args()
    if options.quick and options.table:
        parser.error("--quick has rows of its own: leave out --table")
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file has no width of its own, and 80 columns are too few for the table
    kind = "quick" if options.quick else options.table
    result = RESULTS / f"{options.into or (f'learning-{kind}' if kind else 'learning')}.json"
    rows = json.loads(result.read_text()) if result.is_file() else []
    rows = [row for row in rows if "context_up" in row]  # others were measured before that was
    seeds = range(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))
    chosen = [
        (case, model)
        for model in options.model or ["tiny"]
        for case in CASES
        if (case.quick or not options.quick)
        and (case.is_of(model) or ((options.only or options.table) and not case.network))
        and is_wanted(case.name, options.only)
        and (not options.table or case.name in TABLES[options.table])
    ]
    done = {(row["name"], row["seed"], row["model"]) for row in rows if is_current(row, options.quick)}
    jobs, after = planned(chosen, seeds, options.quick, done)
    started, failures = time.monotonic(), 0
    left = [*jobs, *(later for following in after.values() for later in following)]
    total = sum(map(epochs, left))
    pictures = QUICK_PICTURES if options.quick else PICTURES
    for job, row, error in trained(jobs, after, options.workers, (options.source, pictures, options.device)):
        left.remove(job)
        to_come = sum(map(epochs, left))
        minutes = (time.monotonic() - started) / (total - to_come) * to_come / 60
        if not row:
            failures += 1
            console.print(f"{job[0]}, {job[2]}, seed {job[1]}: failed, {error}", style="red", highlight=False)
            continue
        rows = [other for other in rows if (other["name"], other["seed"], other["model"]) != job[:3]]
        rows.append(row)
        add_targets(rows)
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_atomically(result, (json.dumps(rows, indent=1) + "\n").encode())
        console.print(
            f"{job[0]}, {job[2]}, seed {job[1]}: {row['accuracy']:.2%}, "
            f"{(row['bytes_up'] + row['bytes_down']) / 1e6:,.1f} MB in {row['wall_s']:,.0f} s; {len(left)} runs left, "
            f"about {minutes:.0f} min", highlight=False,
        )  # fmt: skip
    show(console, rows)
    if failures:
        raise SystemExit(f"{failures} runs failed")


if __name__ == "__main__":
    main()
