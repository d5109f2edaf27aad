"""`python -m benchmarks.plot RUN/device OUT.png`: a run's accuracy and bytes over its steps, with its widths."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

try:
    import matplotlib
except ModuleNotFoundError:
    sys.exit("Error: plots need matplotlib: pip install matplotlib, or copy the run's folder to a machine that has it")
matplotlib.use("Agg")
from matplotlib import pyplot as plt

_BESIDE = 0.035  # of the steps, between two labels
_KINDS = {"learn": "", "rank": ", ranking", "store": ", sent once", "recall": ", recalled"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run, the device's")
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    folder, target = options.run, options.target
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
    except OSError as error:
        parser.error(f"{folder} holds no finished run: {error.filename} cannot be read ({error.strerror})")
    if not lines:
        parser.error(f"{folder / 'metrics.jsonl'} has no lines: there is nothing to draw")
    steps = np.array([line["step"] for line in lines])
    accuracy = np.array([line["accuracy"] for line in lines])
    ours = np.cumsum([line["bytes"]["up"] + line["bytes"]["down"] for line in lines]) / 1e6
    # By the run's steps: where a disk was full, lines are missing.
    plain = (steps + 1) / summary["steps"] * sum(summary["plain_bytes"].values()) / 1e6
    window = min(50, len(lines))
    smooth = np.convolve(accuracy, np.ones(window) / window, "valid")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(steps[window - 1 :], 100 * smooth)
    left.axhline(100 * summary["accuracy"], color="gray", linestyle=":")
    left.annotate(
        f"test {summary['accuracy']:.2%} ", (1, 100 * summary["accuracy"]), xycoords=("axes fraction", "data"),
        ha="right", va="bottom", color="gray", xytext=(0, 2), textcoords="offset points",
    )  # fmt: skip
    left.margins(y=0.12)  # for those words, where the line is the highest
    left.set(xlabel="step", ylabel=f"training accuracy, % (mean of {window})", title=summary["name"])
    right.plot(steps, plain, color="gray", label="plain split learning")
    right.plot(steps, ours, label=f"{summary['method']}, {summary['times_fewer']['total']:.1f} times fewer")
    right.set(xlabel="step", ylabel="MB on the link, both ways", yscale="log", title="bytes so far")
    right.legend(loc="lower right", bbox_to_anchor=(1, 0.08))
    for axes in (left, right):
        said, codec, place = "", summary["phases"][0].get("activation"), -math.inf
        for phase in summary["phases"]:
            axes.axvline(phase["from_step"], color="tab:orange", alpha=0.4, linewidth=1)
            other, codec = phase.get("activation") != codec, phase.get("activation")
            text = f"width {phase['width']}{_KINDS[phase['kind']]}{f', {codec}' if other else ''}"
            if text != said and axes is left:  # else its learning rate is another
                place = max(phase["from_step"], place + _BESIDE * len(steps))
                axes.annotate(
                    text, (place, 0.03), xycoords=("data", "axes fraction"), xytext=(2, 0),
                    textcoords="offset points", rotation=90, fontsize=8, color="tab:orange",
                )  # fmt: skip
            said = text
    try:
        figure.savefig(target, dpi=110)
    except OSError as error:
        parser.error(f"{target} cannot be written: {error.strerror}")
    except ValueError as error:  # no such kind of file
        parser.error(f"{target} cannot be written: {error}")
    print(f"{target} is drawn.")


if __name__ == "__main__":
    main()
