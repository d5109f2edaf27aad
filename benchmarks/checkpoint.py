"""`make bench-checkpoint`: what checkpoints cost, as a share of training at the default distance between two.

Trains a few steps of each built-in model in process (32x32 noise: what a picture shows costs nothing), and has both
sides keep a checkpoint now and then, as they do in a run. Writes benchmarks/results/checkpoint.json.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import inprocess
from benchmarks.machine import machine
from common.checkpoint import EVERY, Checkpoints
from common.schedule import Phase
from common.words import size
from device_client.data import Dataset, Part
from device_client.trainer import Trainer
from edge_server.training import Training

RESULT = Path("benchmarks/results/checkpoint.json")
# Model, cut and batch.
CASES = (
    ("tiny", "stage1_relu2", 128),
    ("resnet20", "stage1_2_relu2", 128),
    ("mobilenetv2", "stage1_0_out", 64),
    ("vgg11", "stage2_pool", 64),
)
_STEPS, _KEPT = 12, (4, 6, 8, 10)
RECIPE = """
name = "checkpoint"
method = "fixed"
[model]
name = "{model}"
input = [3, 32, 32]
classes = 10
cut = "{cut}"
[data]
batch = {batch}
[bottleneck]
kind = "none"
[codec]
activation = "step:20"
gradient = "step:5"
[schedule]
phases = [[0, {epochs}]]
"""


def measure(model: str, cut: str, batch: int, folder: Path) -> dict[str, Any]:
    """Seconds of a step, and of a checkpoint on each side; the share of training that checkpoints take."""
    random = np.random.default_rng(0)
    part = Part(random.integers(0, 256, (2 * batch, 3, 32, 32), dtype=np.uint8), np.arange(2 * batch) % 10)
    few = Part(part.pictures[:10], part.labels[:10])
    data = Dataset(tuple("0123456789"), part, Part(part.pictures[:0], part.labels[:0]), few, ())
    server = Checkpoints(folder / "checkpoints", "run", "digest")
    seconds: dict[str, list[float]] = {"step": [], "device": [], "server": []}
    begun = time.perf_counter()

    def watch(step: int, _phase: Phase, trainer: Trainer, training: Training) -> None:
        nonlocal begun
        now = time.perf_counter()
        if step > 1:  # the first two warm up
            seconds["step"].append(now - begun)
        if step in _KEPT:
            trainer.keep(anew=True)
            middle = time.perf_counter()
            server.write(training.step, *training.state())
            seconds["device"].append(middle - now)
            seconds["server"].append(time.perf_counter() - middle)
        begun = time.perf_counter()

    inprocess.train(
        RECIPE.format(model=model, cut=cut, batch=batch, epochs=_STEPS / 2), data, watch=watch, folder=folder
    )
    largest = max(path.stat().st_size for path in server.folder.iterdir())
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    # The two sides write at the same time.
    share = max(middle["device"], middle["server"]) / (EVERY * middle["step"])
    times = {f"{name}_s": round(value, 4) for name, value in middle.items()}
    return {
        "model": model,
        "cut": cut,
        "batch": batch,
        "every": EVERY,
        **times,
        "bytes": largest,
        "share": round(share, 5),
    }


def main() -> None:
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            rows.append(measure(*case, Path(folder)))
    RESULT.write_text(json.dumps({"machine": machine(), "date": str(date.today()), "rows": rows}, indent=1) + "\n")
    table = Table(show_edge=False, pad_edge=False)
    for name in ("model", "step, ms", "checkpoint, ms (device)", "(server)", "size", f"share at {EVERY} steps"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        milliseconds = (f"{1000 * row[key]:,.1f}" for key in ("step_s", "device_s", "server_s"))
        table.add_row(row["model"], *milliseconds, size(row["bytes"]), f"{row['share']:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
