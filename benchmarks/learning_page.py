"""Tables and plots of docs/results.md from benchmarks/results/learning.json: `python -m benchmarks.learning_page`."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.learning import RESULTS, grouped
from benchmarks.tables import table

PAGE = Path("docs/results.md")
IMAGES = Path("docs/images")
COLOURS = {
    "plain": "black", "fixed": "tab:blue", "deprune": "tab:orange", "prune": "tab:green", "federated": "tab:purple",
    "jpeg": "tab:gray",
}  # fmt: skip
Rows = list[dict[str, Any]]


def _mean(rows: Rows, key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _bytes(rows: Rows) -> float:
    return statistics.mean(row["bytes_up"] + row["bytes_down"] for row in rows)


def rows_table(rows: Rows) -> str:
    """A line for each row of the benchmark, means over its seeds."""
    result = []
    for (name, model), group in grouped(rows).items():
        plain = [row for row in rows if row["model"] == model and row["method"] == "plain"]
        reached = [row["bytes_to_target"] for row in group if row.get("bytes_to_target")]
        values = [100 * row["accuracy"] for row in group]
        result.append([
            name, model, str(len(group)), f"{statistics.mean(values):.1f}", f"{min(values):.1f} to {max(values):.1f}",
            f"{_mean(group, 'bytes_up') / 1e6:,.1f}", f"{_mean(group, 'bytes_down') / 1e6:,.1f}",
            f"{_bytes(plain) / _bytes(group):,.1f}" if plain else "",
            f"{statistics.mean(reached) / 1e6:,.0f}" if len(reached) == len(group) else "not met",
            f"{_mean(group, 'wall_s'):,.0f}", f"{_mean(group, 'device_s'):,.0f}",
        ])  # fmt: skip
    head = ["row", "model", "seeds", "accuracy", "from, to", "MB up", "MB down", "times fewer than plain",
            "MB to target", "wall s", "device s"]  # fmt: skip
    return table(head, result)


def _curve(group: Rows, key: str) -> tuple[list[float], list[float]]:
    """Mean over the seeds of `key` and of the accuracy in percent, point by point."""
    points = list(zip(*(row["curve"] for row in group), strict=False))
    return (
        [statistics.mean(point[key] for point in at) for at in points],
        [100 * statistics.mean(point["accuracy"] for point in at) for at in points],
    )


def _lines(axes: Axes, rows: Rows, key: str, scale: float) -> None:
    for (name, _), group in grouped(rows).items():
        method = group[0]["method"]
        if method not in COLOURS:
            continue
        x, y = _curve(group, key)
        axes.plot([value / scale for value in x], y, color=COLOURS[method], linewidth=1, alpha=0.8)
        axes.plot(x[-1] / scale, y[-1], "o", color=COLOURS[method], markersize=3)
        axes.annotate(name, (x[-1] / scale, y[-1]), fontsize=6, xytext=(3, 0), textcoords="offset points", va="center")


def plots(rows: Rows) -> None:
    """learning-bytes.png, learning-seconds.png, learning-widths.png."""
    tiny = [row for row in rows if row["model"] == "tiny"]
    for name, key, scale, label in (
        ("bytes", "bytes", 1e6, "MB on the link, both ways"),
        ("seconds", "wall_s", 1.0, "seconds, device and server on one thread, no link"),
    ):
        figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
        _lines(axes, tiny, key, scale)
        axes.set(xscale="log", xlabel=label, ylabel="test accuracy, %", title=f"accuracy against {name}, tiny")
        for method, colour in COLOURS.items():
            axes.plot([], [], color=colour, label=method)
        axes.legend(loc="lower right", fontsize=8)
        axes.grid(alpha=0.3)
        figure.savefig(IMAGES / f"learning-{name}.png", dpi=110)
    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for (name, _), group in grouped(tiny).items():
        phases, steps = group[0]["phases"], group[0]["steps"]
        if group[0]["method"] in ("deprune", "prune") and phases:
            x = [phase["from_step"] for phase in phases] + [steps]
            axes.step(x, [phase["width"] for phase in phases] + [phases[-1]["width"]], where="post", label=name)
    axes.set(xlabel="step", ylabel="width, channels sent", yscale="log", title="width over steps, tiny")
    axes.set_yticks([1, 2, 4, 8, 16, 32], labels=["1", "2", "4", "8", "16", "32"])
    axes.legend(fontsize=7)
    figure.savefig(IMAGES / "learning-widths.png", dpi=110)


def main() -> None:
    rows = json.loads((RESULTS / "learning.json").read_text())
    text = PAGE.read_text()
    begin, end = "<!-- learning rows -->", "<!-- /learning rows -->"
    PAGE.write_text(re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{rows_table(rows)}\n{end}", text, flags=re.S))
    plots(rows)


if __name__ == "__main__":
    main()
