"""`make bench-start`: what either side takes to start, in seconds and memory, beside torch alone.

A small device loads programs slowly and has little memory, and each restart after a fault pays again. Both sides train
some steps of the digits, with the default codec, whose loops are compiled, and with fp16, which needs none; each of the
programs is started in turn, several times. Writes benchmarks/results/start.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import pair
from benchmarks.machine import machine
from benchmarks.recipes import recipe_text

RESULT = Path("benchmarks/results/start.json")
_REPEATS = 5
_STEPS = "phases = [[4, 0.5]]"
TORCH = "import torch"
CODECS = {"auto": "", "fp16": 'activation = "fp16"\ngradient = "fp16"'}


class Watched:
    """A process that was just started: the seconds until `ready`, and the most memory that it had at its end."""

    def __init__(self, process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
        self._process, self._ready = process, ready
        self._begun = time.perf_counter()
        self.seconds: float | None = None
        self.most = 0

    def look(self) -> bool:
        """Note how it stands; false where it has ended."""
        if self.seconds is None and self._ready():
            self.seconds = time.perf_counter() - self._begun
        try:
            self.most = max(self.most, psutil.Process(self._process.pid).memory_info().rss)
        except psutil.Error:  # it has ended between two looks
            return False
        return self._process.poll() is None

    def require(self, told: str) -> None:
        """End with what it `told` where it has failed."""
        if code := self._process.wait():
            raise SystemExit(f"{told}\nended with {code}")


Found = dict[str, tuple[float, int]]  # seconds and bytes of each program


def alone(folder: Path) -> Found:
    flag = folder / "torch"
    code = f"import torch, pathlib, time; pathlib.Path({str(flag)!r}).touch(); time.sleep(0.2)"
    torch = Watched(subprocess.Popen([sys.executable, "-c", code]), flag.exists)
    while torch.look():
        time.sleep(0.01)
    torch.require(code)
    return {TORCH: found(torch)}


def found(watched: Watched) -> tuple[float, int]:
    return watched.seconds or float("nan"), watched.most


def both(codec: str, folder: Path) -> Found:
    """Server and device, which train with `codec`."""
    folder.mkdir()
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe_text("deprune", bottleneck='kind = "linear"', codec=CODECS[codec], schedule=_STEPS))
    log = folder / "server.log"
    options = ("--once", "--threads", 1, "--listen", "127.0.0.1:0")
    process = pair.start("edge-server", "serve", recipe, "--run", folder / "server", *options, log=log)
    server = Watched(process, lambda: "listens on" in log.read_text())
    try:
        while server.seconds is None and server.look():
            time.sleep(0.01)
        address = pair.address_of(process, log)
        metrics = folder / "device" / "metrics.jsonl"
        train = ("train", address, "--data", "digits", "--run", folder / "device", "--threads", 1)
        device = Watched(
            pair.start("device-client", *train, log=folder / "device.log"),
            lambda: metrics.is_file() and metrics.stat().st_size > 0,
        )
        while device.look():
            server.look()
            time.sleep(0.01)
        device.require((folder / "device.log").read_text())  # else its server waits for another
        while server.look():
            time.sleep(0.01)
        server.require(log.read_text())
    finally:
        process.kill()
        process.wait()
    return {
        f"server, until it listens, {codec}": found(server),
        f"device, until its first step is done, {codec}": found(device),
    }


def main() -> None:
    console, runs = Console(), []
    for number in range(_REPEATS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            runs.append(alone(folder) | both("auto", folder / "auto") | both("fp16", folder / "fp16"))
        console.print(f"{number + 1}/{_REPEATS}")
    rows: list[dict[str, Any]] = []
    for name in runs[0]:
        seconds = [run[name][0] for run in runs]
        rows.append({
            "program": name,
            "seconds": round(statistics.median(seconds), 2),
            "from": round(min(seconds), 2),
            "to": round(max(seconds), 2),
            "times_torch": round(statistics.median(run[name][0] / run[TORCH][0] for run in runs), 2),
            "memory_mb": round(statistics.median(run[name][1] for run in runs) / 1e6),
        })  # fmt: skip
    RESULT.write_text(json.dumps({"machine": machine(), "date": str(date.today()), "rows": rows}, indent=1) + "\n")
    table = Table(show_edge=False, pad_edge=False)
    for head in ("program", "seconds", "times torch alone", "most memory"):
        table.add_column(head, justify="left" if head == "program" else "right")
    for row in rows:
        table.add_row(
            row["program"], f"{row['seconds']:.1f} ({row['from']:.1f} to {row['to']:.1f})", f"{row['times_torch']:.2f}",
            f"{row['memory_mb']} MB",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
