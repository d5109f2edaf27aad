"""Tables and plots of docs/results.md from benchmarks/results/learning*.json: `python -m benchmarks.learning_page`."""

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
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from benchmarks.learning import RESULTS, grouped, reached, sent
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


def _epochs(row: dict[str, Any]) -> float:
    """Steps that were trained, those on kept activations too, in passes over the row's pictures."""
    return round(row["steps"] / (row["pictures"] // 128), 1)


def _alone(rows: Rows) -> dict[float, float]:
    """What the device by itself is right on, in percent, by the epochs that its head had learnt alone."""
    found: dict[float, dict[tuple[int, str], float]] = {}  # a head is the same in all rows of a seed and a machine
    for row in rows:
        if local := row.get("local"):
            found.setdefault(local["epochs"], {})[row["seed"], row["machine"]] = 100 * local["accuracy"]
    return {epochs: statistics.mean(values.values()) for epochs, values in sorted(found.items())}


def _passes(group: Rows) -> str:
    """The epochs of a row; before them those that its head learnt alone, and what the device then had by itself."""
    alone = "".join(f"{epochs:g} alone ({accuracy:.1f} %) + " for epochs, accuracy in _alone(group).items())
    return f"{alone}{_epochs(group[0]):g}"


_OF_PLAIN = ("times fewer than plain", "times fewer by it", "MB to target")
_SECONDS = ("wall s", "device s")


def rows_table(rows: Rows, one_run: bool = False) -> str:
    """A line for each row of the benchmark, means over its seeds. `one_run`: on one machine, whose seconds compare."""
    result = []
    for (name, model), group in grouped(rows).items():
        plain = [row for row in rows if row["model"] == model and row["name"] == "plain"]
        coded = sent(group, "context") != sent(group)
        # Seconds of another machine than plain's say nothing beside it.
        timed = not plain or group[0]["machine"] == plain[0]["machine"]
        values = [100 * row["accuracy"] for row in group]
        result.append([
            name, model, str(len(group)), _passes(group),
            f"{statistics.mean(values):.1f}", f"{min(values):.1f} to {max(values):.1f}",
            f"{_mean(group, 'bytes_up') / 1e6:,.1f}", f"{_mean(group, 'bytes_down') / 1e6:,.1f}",
            f"{sent(plain) / sent(group):,.1f}" if plain else "",
            f"{sent(group, 'context') / 1e6:,.1f}" if coded else "",
            f"{sent(plain) / sent(group, 'context'):,.1f}" if coded and plain else "",
            reached(group, "context"),
            *(f"{_mean(group, key):,.0f}" if timed else "" for key in ("wall_s", "device_s")),
        ])  # fmt: skip
    head = ["row", "model", "seeds", "epochs", "accuracy", "from, to", "MB up", "MB down", "times fewer than plain",
            "MB by `context`", "times fewer by it", "MB to target", "wall s", "device s"]  # fmt: skip
    # Without plain there is nothing to compare with, and seconds that were not taken by themselves say nothing.
    compared = any(row["name"] == "plain" for row in rows)
    left_out = () if compared else _OF_PLAIN if one_run else _OF_PLAIN + _SECONDS
    kept = [place for place, name in enumerate(head) if name not in left_out]
    return table([head[place] for place in kept], [[line[place] for place in kept] for line in result])


def _curve(group: Rows, key: str) -> tuple[list[float], list[float]]:
    """Mean over the seeds of `key` and of the accuracy in percent, point by point, to the end of the run."""
    ends = [row | {"context": row["context_up"] + row["context_down"], "step": row["steps"]} for row in group]
    points = list(zip(*(row["curve"] for row in group), strict=False))
    if not points or points[-1][0]["step"] < ends[0]["step"] - 1:
        points.append(tuple(ends))
    return (
        [statistics.mean(point[key] for point in at) for at in points],
        [100 * statistics.mean(point["accuracy"] for point in at) for at in points],
    )


def _lines(axes: Axes, rows: Rows, key: str, scale: float) -> list[tuple[str, str, float, float]]:
    """A line for each row of the benchmark; their names, colours and ends."""
    ends = []
    for (name, _), group in grouped(rows).items():
        method = group[0]["method"]
        if method not in COLOURS:
            continue
        x, y = _curve(group, key)
        axes.plot([value / scale for value in x], y, color=COLOURS[method], linewidth=1, alpha=0.8)
        axes.plot(x[-1] / scale, y[-1], "o", color=COLOURS[method], markersize=3)
        ends.append((name, COLOURS[method], x[-1] / scale, y[-1]))
    return ends


def _names(axes: Axes, ends: list[tuple[str, str, float, float]]) -> None:
    """A number beside the end of each line, lower where it would cover another or an end, and beside the plot whose it
    is: from the left, the fewest first."""
    axes.figure.canvas.draw()
    ends = sorted(ends, key=lambda end: end[2])
    taken = [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in axes.transData.transform([end[2:] for end in ends])]
    for number, (_, colour, x, y) in enumerate(ends, 1):
        text = axes.annotate(
            str(number), (x, y), fontsize=7, color=colour, xytext=(3, 0), textcoords="offset points", va="center"
        )
        places = ((3 + right, up) for distance in range(30) for right in (0, distance) for up in (distance, -distance))
        while any(text.get_window_extent().overlaps(box) for box in taken):
            text.set_position(next(places))
        taken.append(text.get_window_extent())
    handles = [Line2D([], [], color=colour) for _, colour, _, _ in ends]
    names = [f"{number}  {name}, {y:.1f} %" for number, (name, _, _, y) in enumerate(ends, 1)]
    axes.figure.add_artist(axes.legend(handles, names, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0)))


def plots(rows: Rows) -> None:
    """learning-bytes.png, learning-seconds.png, learning-widths.png."""
    machine = next(row["machine"] for row in rows if row["name"] == "plain")
    tiny = [row for row in rows if row["model"] == "tiny" and "target" in row]  # five classes are another task
    for name, key, scale, label in (
        ("bytes", "context", 1e6, "MB on the link, both ways, coded by context where a row is coded"),
        ("seconds", "wall_s", 1.0, "seconds, device and server in turn, no link"),
    ):
        figure, axes = plt.subplots(dpi=110)
        # Seconds of different machines say nothing of the rows.
        shown = tiny if key == "context" else [row for row in tiny if row["machine"] == machine]
        ends = _lines(axes, shown, key, scale)
        figure.set_size_inches(11, max(6.0, 0.17 * len(ends)))  # for as many names
        axes.set(xscale="log", xlabel=label, ylabel="test accuracy, %", title=f"accuracy against {name}, tiny")
        axes.grid(alpha=0.3)
        if key == "context":
            for epochs, accuracy in _alone(shown).items():
                axes.axhline(accuracy, color="gray", linestyle=":", linewidth=1)
                label = f"the device alone, {epochs:g} epochs: {accuracy:.1f} %"
                axes.annotate(label, (0.01, accuracy), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
        figure.subplots_adjust(0.06, 0.09, 0.68, 0.94)
        _names(axes, ends)
        methods = [method for method in COLOURS if method in {row["method"] for row in shown}]
        handles = [Line2D([], [], color=COLOURS[method]) for method in methods]
        axes.legend(handles, methods, loc="lower right", fontsize=8)
        figure.savefig(IMAGES / f"learning-{name}.png")
    figure, both = plt.subplots(2, 1, figsize=(9, 8), layout="constrained")
    for axes, method in zip(both, ("deprune", "prune"), strict=True):
        _widths(axes, [row for row in tiny if row["method"] == method], f"width over steps, {method}, tiny")
    figure.savefig(IMAGES / "learning-widths.png", dpi=110)


def _courses(rows: Rows) -> list[tuple[str, Rows]]:
    """Rows whose width or kind of phase changes; of those that differ by one factor in width alone, the first."""
    result: dict[tuple[object, int], tuple[str, Rows]] = {}
    for (name, _), group in grouped(rows).items():
        phases = group[0]["phases"]
        course = tuple((phase["from_step"], phase["kind"], phase["width"] / phases[0]["width"]) for phase in phases)
        if len({(kind, width) for _, kind, width in course}) > 1:
            result.setdefault((course, group[0]["steps"]), (name, group))
    return list(result.values())


def _widths(axes: Axes, rows: Rows, title: str) -> None:
    """Channels sent at each step; dotted where nothing is sent and the server recalls what it has kept."""
    for number, (name, group) in enumerate(_courses(rows)):
        phases = group[0]["phases"]
        ends = [*(phase["from_step"] for phase in phases[1:]), group[0]["steps"]]
        colour, lift = f"C{number}", 1 + 0.025 * number  # lines of the same width lie beside each other
        axes.plot([], [], color=colour, label=name)
        last = None
        for phase, end in zip(phases, ends, strict=True):
            start, width = phase["from_step"], phase["width"] * lift
            style = ":" if phase["kind"] == "recall" else "-"
            if last:
                axes.plot([start, start], [last, width], color=colour, linewidth=1)
            axes.plot([start, end], [width, width], style, color=colour)
            last = width
    axes.set(xlabel="step", ylabel="width, channels sent", yscale="log", title=title)
    axes.set_yticks([1, 2, 4, 8, 16, 32, 64], labels=["1", "2", "4", "8", "16", "32", "64"])
    axes.minorticks_off()
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def main() -> None:
    text = PAGE.read_text()
    for name in ("learning", "learning-snr", "learning-time", "learning-weighted", "learning-local", "learning-rates"):
        rows = json.loads((RESULTS / f"{name}.json").read_text())
        written = rows_table(rows, one_run=name == "learning-time")
        begin, end = f"<!-- {name} rows -->", f"<!-- /{name} rows -->"
        text = re.sub(f"{begin}.*?{end}", f"{begin}\n{written}\n{end}", text, flags=re.S)
    PAGE.write_text(text)
    plots(json.loads((RESULTS / "learning.json").read_text()))


if __name__ == "__main__":
    main()
