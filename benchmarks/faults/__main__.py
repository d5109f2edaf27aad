"""`make faults`: every kind of fault at every point of the protocol, and many at random in one run.

Each run must end as the one without faults does: the same weights bit for bit, each step once with the same loss, the
same outcome, and meters that agree. Ends with 1 where one doesn't. Writes benchmarks/results/faults.json; the folders
of runs that failed stay in runs/faults.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.faults import points, runs
from benchmarks.faults.rig import KINDS
from benchmarks.machine import machine
from common.words import duration
from edge_server import certs

RESULT = Path("benchmarks/results/faults.json")
RUNS = Path("runs/faults")


def matrix(console: Console, only: str | None) -> list[runs.Entry]:
    """Every kind at every point, or at the one named `only`, a run each."""
    console.print("The run without faults, then the matrix: each kind at each point, a run each.")
    reference = runs.fault_free(RUNS / "matrix-reference", runs.SHORT)
    keys = RUNS / "keys"
    shutil.rmtree(keys, ignore_errors=True)
    certs.make(keys, ["127.0.0.1"], [], renew=False)
    todo = [(blow, None) for blow in runs.matrix_blows(False)] + [(blow, keys) for blow in runs.matrix_blows(True)]
    todo = [(blow, tls) for blow, tls in todo if only in (None, blow.point)]
    entries: list[runs.Entry] = []
    started = time.monotonic()
    for number, (blow, tls) in enumerate(todo):
        entry = runs.matrix_entry(RUNS / f"matrix-{number:03}", reference, blow, tls)
        entries.append(entry)
        left = (time.monotonic() - started) / len(entries) * (len(todo) - len(entries))
        say(console, entry, f"{len(entries)}/{len(todo)}", left)
    return entries


def at_random(console: Console, count: int, seed: int) -> runs.Random:
    """`count` faults in one run."""
    console.print(f"{count} faults in one run, seed {seed}; first the same run without faults.")
    many = runs.Random(RUNS / f"random-{count}-{seed}", count, seed)
    started: float | None = None
    for number, entry in enumerate(many, 1):
        started = started or time.monotonic()
        say(console, entry, f"{number}/{count}", (time.monotonic() - started) / number * (count - number))
    return many


def say(console: Console, entry: runs.Entry, place: str, left: float) -> None:
    """A line for a fault that is over."""
    end = "[green]ok[/green]" if not entry.problems else "[red]" + "; ".join(entry.problems) + "[/red]"
    took = "" if entry.seconds is None else f" {entry.seconds:.1f} s,"
    console.print(
        f"{place:>9} {entry.kind}, {entry.point}, after step {entry.step}:{took} {entry.replayed} steps replayed, "
        f"{end}; about {duration(left)} left",
        highlight=False,
    )


def show(console: Console, entries: list[runs.Entry]) -> None:
    """Kinds by points: steps replayed and seconds until the run went on, or what failed."""
    table = Table(title="steps replayed / seconds until the next step", title_justify="left", show_edge=False)
    table.add_column("")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    for point in (*points.POINTS, runs.UNDER_TLS):
        cells = []
        for kind in KINDS:
            entry = next((e for e in entries if (e.kind, e.point) == (kind, point)), None)
            good = entry and not entry.problems
            cells.append("" if not entry else f"{entry.replayed} / {entry.seconds:.1f}" if good else "[red]fails[/red]")
        table.add_row(point, *cells)
    Console(width=max(console.width, 180)).print(table)


def merged(entries: list[runs.Entry], only: str | None) -> list[dict[str, Any]]:
    """The matrix's entries, each with its date; with `only` in place of those of that point, and beside the others."""
    fresh = [asdict(entry) | {"date": date.today().isoformat()} for entry in entries]
    if only is None or not RESULT.is_file():
        return fresh
    before = json.loads(RESULT.read_text()).get("matrix", {}).get("all", {"entries": []})
    return [{"date": before["date"]} | entry for entry in before["entries"] if entry["point"] != only] + fresh


def keep(part: str, name: str, value: dict[str, Any]) -> None:
    """Put one part into the result file; the others stay."""
    result = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    result.setdefault(part, {})[name] = {"date": date.today().isoformat(), "machine": machine()} | value
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def verdict(count: int, kinds: dict[str, int], replayed: int, equal: bool, failed: int) -> str:
    by_kind = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    end = "weights equal" if equal else "weights NOT equal"
    return f"{count} faults ({by_kind}); {replayed} steps replayed; {end}" + (f"; {failed} failed" if failed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="faults of the random run")
    parser.add_argument(
        "--point", choices=points.POINTS, help="the matrix at this point alone, beside the recorded rest"
    )
    parser.add_argument("--seed", type=int, help="of the random run; default: a new one, which is printed")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--matrix", action="store_true", help="the matrix alone")
    alone.add_argument("--random", action="store_true", help="the random run alone")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    console = Console(soft_wrap=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    lines, failed = [], 0
    if not options.random:
        entries = matrix(console, options.point)
        show(console, entries)
        bad = [entry for entry in entries if entry.problems]
        equal = all(entry.weights_equal for entry in entries)
        kinds = {kind: sum(entry.kind == kind for entry in entries) for kind in KINDS}
        replayed = sum(entry.replayed for entry in entries)
        lines.append("Matrix: " + verdict(len(entries), kinds, replayed, equal, len(bad)))
        failed += len(bad)
        every = merged(entries, options.point)
        keep("matrix", "all", {"failed": sum(bool(entry["problems"]) for entry in every), "entries": every})
    if not options.matrix:
        started = time.monotonic()
        many = at_random(console, options.count, seed)
        lines.append("Random: " + verdict(
            len(many.entries), many.by(lambda e: e.kind), many.replayed, many.weights_equal, len(many.problems)
        ))  # fmt: skip
        for problem in many.problems:
            console.print(f"[red]{problem}[/red]", highlight=False)
        failed += len(many.problems)
        keep("random", str(options.count), {"took_s": round(time.monotonic() - started)} | many.summary())
    for line in lines:
        console.print(line, highlight=False)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
