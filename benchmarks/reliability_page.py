"""What docs/reliability.md shows, from benchmarks/results/*.json: `python -m benchmarks.reliability_page`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.faults import points, runs
from benchmarks.tables import table
from common.words import size

PAGE = Path("docs/reliability.md")
RESULTS = Path("benchmarks/results")


def _read(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _where(found: dict[str, Any]) -> str:
    return f"{found['machine']}, {found['date']}"


def matrix(found: dict[str, Any]) -> str:
    """A row a place in the protocol, a column a kind of fault: steps sent again / seconds until the next step."""
    entries = found["entries"]
    kinds = list(dict.fromkeys(entry["kind"] for entry in entries))
    rows = []
    for point in (*points.POINTS, runs.UNDER_TLS):
        cells = []
        for kind in kinds:
            entry = next((e for e in entries if (e["kind"], e["point"]) == (kind, point)), None)
            good = entry and not entry["problems"]
            cells.append(
                f"{entry['replayed']} / {entry['seconds']:.1f}" if entry and good else "fails" if entry else ""
            )
        rows.append([point, *cells])
    failed = found["failed"]
    sentence = (
        f"**Every kind of fault at every place**, {len(entries)} runs of `make faults ARGS=--matrix`, "
        f"{found['machine']}, {' and '.join(sorted({entry['date'] for entry in entries}))}: "
        f"{'all' if not failed else f'all but {failed}'} ended with the weights, losses, metrics and "
        f"books of the run that was left alone. Steps sent again / seconds until the next step:"
    )
    return f"{sentence}\n\n{table(['', *kinds], rows)}"


def at_random(found: dict[str, Any]) -> str:
    by_kind = ", ".join(f"{number} {kind}" for kind, number in found["by_kind"].items())
    recovery, drain = found["recovery_s"], found["longest_drain_s"]
    restarts = " and ".join(f"the {side} {number} times" for side, number in found["restarts"].items())
    runs_ = "one run" if found["runs"] == 1 else f"{found['runs']} runs"
    ended = f"; a server told to stop was gone within {drain:.1f} s" if drain else ""
    verdict = "weights equal, and losses, steps and books" if found["weights_equal"] else "**weights not equal**"
    if found["problems"]:
        verdict = f"{'weights equal' if found['weights_equal'] else verdict}, but {'; '.join(found['problems'])}"
    return (
        f"**{found['count']} faults at random in {runs_}**, `make faults COUNT={found['count']} "
        f"ARGS='--random --seed {found['seed']}'`, {_where(found)}, in {found['took_s'] / 60:.0f} minutes: "
        f"{by_kind}. Started again: {restarts}. {found['steps_replayed']} steps sent again; the next step came after "
        f"{recovery['median']:.1f} s in the median, {recovery['longest']:.1f} s at most{ended}. At the end: {verdict}."
    )


def soak(found: dict[str, Any]) -> str:
    grown = "; ".join(
        f"{side}: " + ", ".join(f"{name} {share:+.2%}" for name, share in shares.items())
        for side, shares in found["growth"].items()
    )
    return (
        f"**A soak of {found['minutes']:g} minutes**, `make soak`, {_where(found)}: "
        f"{found['steps']:,} steps, the link broken {found['breaks']} times. "
        f"Growth after the first five minutes ({grown}):\n\n"
        f"![memory, descriptors and threads over the soak](images/soak.png)"
    )


def cost(found: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['model']}, batch {row['batch']}", f"{1000 * row['step_s']:,.0f}", f"{1000 * row['device_s']:,.0f}",
            f"{1000 * row['server_s']:,.0f}", size(row["bytes"]), f"{row['share']:.2%}",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    head = ["", "step, ms", "checkpoint, ms: device", "server", "size", "share of training at the default distance"]
    return (
        f"**What checkpoints cost** (`make bench-checkpoint`, {_where(found)}; 32x32 pictures):\n\n{table(head, rows)}"
    )


def main() -> None:
    faults = _read("faults") or {}
    shown = [matrix(faults["matrix"]["all"])] if "matrix" in faults else []
    shown += [at_random(faults["random"][count]) for count in sorted(faults.get("random", ()), key=int)]
    if soaked := _read("soak"):
        shown.append(soak(soaked))
    parts = {"faults": "\n\n".join(shown), "cost": cost(_read("checkpoint"))}
    text = PAGE.read_text()
    for name, content in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
