"""`make bench-step`: pictures a second of ResNet-20 cut after its first stage, unsplit and split, in one run.

(i) unsplit in one process, (ii) ours over loopback with raw fp32, (iii) ours with codec `step`; batch 128, 3x32x32. All
three may use the same cores and as many threads: device and server take turns, so that never more threads compute
than in (i), given that waiting threads sleep (OMP_WAIT_POLICY=PASSIVE). The three are measured in turn, several
times, and compared by the median of the ratios, because machines are noisy. Writes benchmarks/results/step.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import pair
from benchmarks.machine import machine
from benchmarks.options import cores

BATCH, STEPS, WARMUP, ROUNDS = 128, 20, 4, 4
CODECS = {"fp32": ("fp32", "fp32"), "step": ("step:20", "step:5")}
RECIPE = """
name = "bench-step"
method = "fixed"
[model]
name = "resnet20"
input = [3, 32, 32]
classes = 10
cut = "stage1_2_relu2"
[data]
batch = 128
[codec]
activation = "{up}"
gradient = "{down}"
[schedule]
phases = [[0, 1]]
"""
UNSPLIT = """
import statistics, sys, time, torch
from torch.nn import functional
from common import models, optim
from common.recipe import OptimiserRecipe
steps, warmup, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
torch.manual_seed(0)
model = models.channels_last(models.build("resnet20", (3, 32, 32), 10)).train()
optimiser = optim.build(OptimiserRecipe(), model, torch.nn.Identity())
pictures, labels = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
times = []
for step in range(steps):
    started = time.perf_counter()
    optimiser.zero_grad()
    functional.cross_entropy(model(pictures), labels).backward()
    optimiser.step()
    times.append(time.perf_counter() - started)
print(statistics.median(times[warmup:]))
"""


def unsplit(threads: int) -> float:
    """Seconds a step of the whole model in one process, in the median."""
    line = [sys.executable, "-c", UNSPLIT, str(STEPS), str(WARMUP), str(threads)]
    return float(subprocess.run(line, env=pair.environment(), check=True, capture_output=True, text=True).stdout)


def split(codec: str, threads: int, folder: Path, data: Path) -> tuple[float, dict[str, float]]:
    """Seconds a step of the two processes, in the median, and where they go."""
    recipe = folder / "recipe.toml"
    up, down = CODECS[codec]
    recipe.write_text(RECIPE.format(up=up, down=down))
    serve = (recipe, "--run", folder / "server", "--overwrite", "--once", "--threads", threads)
    with pair.server(*serve, log=folder / "log") as (process, address):
        train = ("train", address, "--data", f"npz:{data}", "--run", folder / "device", "--overwrite")
        pair.device(*train, "--threads", threads, capture_output=True, check=True)
        process.wait(timeout=60)
    steps, sides = {}, {}
    for side in ("device", "server"):
        lines = [json.loads(line) for line in (folder / side / "metrics.jsonl").read_text().splitlines()][WARMUP:]
        steps[side] = [line["seconds"] for line in lines]
        sides[side] = {name: statistics.median(step[name] for step in steps[side]) for name in steps[side][0]}
    device, server = sides["device"], sides["server"]
    ours = {"head": device["head"], "tail": server["tail"]}
    for name in ("encode", "decode"):
        ours |= {f"{name} on {side}": sides[side][name] for side in sides}
    total = statistics.median(sum(step.values()) for step in steps["device"])
    # What the device waited for beyond the server's own work: gRPC, copies, the kernel, switching processes.
    beyond = [
        sum(mine.values()) - mine["head"] - mine["encode"] - mine["decode"]
        - other["tail"] - other["encode"] - other["decode"]
        for mine, other in zip(steps["device"], steps["server"], strict=True)
    ]  # fmt: skip
    return total, ours | {"wire": statistics.median(beyond)}


def main() -> None:
    console = Console()
    threads = cores()
    rows: dict[str, list[float]] = {"unsplit": [], **{f"split {name}": [] for name in CODECS}}
    by_round: dict[str, list[dict[str, float]]] = {name: [] for name in CODECS}
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.monotonic()
        generator = np.random.default_rng(0)
        pictures = generator.integers(0, 256, (BATCH * STEPS, 32, 32, 3), np.uint8)
        labels = np.arange(len(pictures)) % 10
        np.savez(folder / "data.npz", train_x=pictures, train_y=labels, test_x=pictures[:64], test_y=labels[:64])
        unsplit(threads)  # the first reads torch and data from the disk, and was once two thirds slower than the next
        for turn in range(ROUNDS):
            rows["unsplit"].append(unsplit(threads))
            for codec in CODECS:
                seconds, found = split(codec, threads, folder, folder / "data.npz")
                rows[f"split {codec}"].append(seconds)
                by_round[codec].append(found)
            left = (time.monotonic() - started) / (turn + 1) * (ROUNDS - turn - 1)
            console.print(f"round {turn + 1} of {ROUNDS} done, about {left:.0f} s left")
    parts = {
        codec: {part: statistics.median(one[part] for one in rounds) for part in rounds[0]}
        for codec, rounds in by_round.items()
    }
    ratios = {
        row: statistics.median(a / b for a, b in zip(rows["unsplit"], seconds, strict=True))
        for row, seconds in rows.items()
    }
    table = Table(title=f"ResNet-20, batch {BATCH}, the same {threads} threads", title_justify="left", show_edge=False)
    for column in ("", "pictures/s (median)", "of unsplit (median of ratios)"):
        table.add_column(column, justify="right" if column else "left")
    for row, seconds in rows.items():
        table.add_row(row, f"{BATCH / statistics.median(seconds):.0f}", f"{ratios[row]:.2f}")
    console.print(table)
    times = Table(title="Where a step's time goes, ms", title_justify="left", show_edge=False)
    times.add_column("")
    for codec in parts:
        times.add_column(codec, justify="right")
    for part in parts["fp32"]:
        times.add_row(part, *(f"{parts[codec][part] * 1e3:.1f}" for codec in parts))
    console.print(times)
    result = {
        "machine": machine(), "date": date.today().isoformat(), "threads": threads, "batch": BATCH, "rounds": ROUNDS,
        "seconds_per_step": rows, "of_unsplit": ratios, "parts_s": parts,
    }  # fmt: skip
    target = Path("benchmarks/results/step.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
