"""`make bench-ways`: ways to send less that were tried and left out, and what they would have been worth.

*Differences*: send only by how much a picture's activation differs from what the server has of it (AQ-SGD, Wang et
al., arXiv 2206.01299), coded as coarsely. That needs the same picture each epoch, so nothing may be augmented. *Every
k-th gradient*: the head learns in every k-th step only, and nothing comes down in the others. On 4,000 pictures, 10
epochs at width 8, 10 dB up and 5 dB down. Writes benchmarks/results/ways.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from datetime import date
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import inprocess
from benchmarks.learning import QUICK_PICTURES, RESULTS
from benchmarks.learning_cases import Case
from benchmarks.machine import machine
from common.codecs.step import Step
from common.files import write_atomically
from common.schedule import Phase
from device_client import batches
from device_client.data import Dataset, load
from device_client.remote_tail import RemoteTail, StepResult
from device_client.trainer import Trainer
from edge_server.training import Training

EPOCHS, UP_DB, DOWN_DB = 10, 10, 5
CASE = Case("ways", "fixed", f"[8, {EPOCHS}]", "linear", f"step:{UP_DB}", f"step:{DOWN_DB}", warmup=30)
AUGMENTED = "crop = 4\nflip = true"


class Differing(RemoteTail):
    """Also counts what differences from the last time would have taken, picture by picture."""

    def __init__(self, *arguments: Any, pictures: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._pictures, self._known = pictures, np.zeros(0, np.float32)
        self.bytes: defaultdict[int, int] = defaultdict(int)  # of each epoch
        self.apart: defaultdict[int, list[float]] = defaultdict(list)  # dB by which activations are larger

    def learn(self, step: int, phase: Phase, sent: np.ndarray, *arguments: Any, **options: Any) -> Any:
        batch = len(sent)
        chosen = batches.indices(self.opened.recipe.seed, step, self._pictures, batch)
        if not self._known.size:
            self._known = np.zeros((self._pictures, *sent.shape[1:]), np.float32)
        epoch, difference = step // (self._pictures // batch), sent - self._known[chosen]
        apart = float(10 * np.log10(np.square(sent).sum() / np.square(difference).sum()))
        # As much noise as where all of it is sent.
        coder = Step("step", UP_DB - apart)
        payload = coder.encode(difference)
        self._known[chosen] += coder.decode(payload, sent.shape)
        self.bytes[epoch] += len(payload)
        self.apart[epoch].append(apart)
        return super().learn(step, phase, sent, *arguments, **options)


class Seldom(RemoteTail):
    """The head is given every k-th gradient; the others are counted, and taken off afterwards."""

    def __init__(self, *arguments: Any, every: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._every = every
        self.needless = 0

    def learn(
        self, step: int, *arguments: Any, **options: Any
    ) -> tuple[np.ndarray | None, StepResult, dict[str, float]]:
        before = self._gradients()
        gradient, result, seconds = super().learn(step, *arguments, **options)
        if step % self._every == 0:
            return gradient, result, seconds
        self.needless += self._gradients() - before
        return None, result, seconds

    def _gradients(self) -> int:
        return int(self.meter.report(None, None)["down"]["by_role"].get("gradient", {}).get("message", 0))


def trained(data: Dataset, seed: int, augmented: bool, remote: type[RemoteTail], **options: Any) -> dict[str, Any]:
    text = CASE.recipe("tiny", seed, "")
    text = text if augmented else text.replace(AUGMENTED, "crop = 0\nflip = false")
    tails: list[RemoteTail] = []

    def watch(_step: int, _phase: Phase, trainer: Trainer, _training: Training) -> None:
        tails[:] = [trainer.remote]

    summary = inprocess.train(text, data, remote, watch=watch, **options)
    up, down = (
        sum(count["message"] for role, count in summary["bytes"][way]["by_role"].items() if role in roles)
        for way, roles in (("up", ("activation", "label")), ("down", ("gradient",)))
    )
    return {"accuracy": summary["accuracy"], "bytes_up": up, "bytes_down": down, "tail": tails[0]}


def measure(data: Dataset, seed: int) -> list[dict[str, Any]]:
    rows = [{"way": "as it is"} | trained(data, seed, True, RemoteTail)]
    row = trained(data, seed, False, Differing, pictures=len(data.train))
    tail = row["tail"]
    rows.append({"way": "nothing augmented"} | row)
    apart = [statistics.mean(tail.apart[epoch]) for epoch in tail.apart]
    counted = {"bytes_up": sum(tail.bytes.values()), "bytes_up_by_epoch": list(tail.bytes.values()), "apart_db": apart}
    rows.append({"way": "nothing augmented, differences"} | row | counted)
    for every in (2, 4, 8):
        row = trained(data, seed, True, Seldom, every=every)
        row["bytes_down"] -= row["tail"].needless
        rows.append({"way": f"one gradient of {every}"} | row)
    for row in rows:
        del row["tail"]
        row |= {"seed": seed, "machine": machine(), "date": str(date.today())}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder:PATH with train/CLASS and test/CLASS")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    data = load(options.source, (3, 32, 32), 0, 0.0, limit=QUICK_PICTURES)
    rows = []
    for seed in range(options.seeds):
        rows += measure(data, seed)
        write_atomically(RESULTS / "ways.json", (json.dumps(rows, indent=1) + "\n").encode())
        console.print(f"{seed + 1} of {options.seeds} seeds done")
    table = Table(show_edge=False, pad_edge=False)
    for name in ("way", "accuracy, mean (each)", "MB up", "MB down"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for way in dict.fromkeys(row["way"] for row in rows):
        group = [row for row in rows if row["way"] == way]
        each = [100 * row["accuracy"] for row in group]
        table.add_row(
            way, f"{statistics.mean(each):.1f} ({', '.join(f'{value:.1f}' for value in each)})",
            *(f"{statistics.mean(row[key] for row in group) / 1e6:.2f}" for key in ("bytes_up", "bytes_down")),
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
