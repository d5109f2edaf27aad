"""`make bench-ways`: ways to send less that were tried and left out, and what they would have been worth.

*Differences*: send only by how much a picture's activation differs from what the server has of it (AQ-SGD, Wang et
al., arXiv 2206.01299), coded as coarsely. That needs the same picture each epoch, so nothing may be augmented. *Every
k-th gradient*: the head learns in every k-th step only, and nothing comes down in the others. On 4,000 pictures, 10
epochs at width 8, 10 dB up and 5 dB down. *A step of its own for each channel*, finer where the loss feels more: what
the same harm to the loss would cost less, from the gradients. *Distilled*: a prune with the head frozen whose tail
also learns from what it said before, of what crosses now. Writes benchmarks/results/ways.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections import defaultdict
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import inprocess
from benchmarks.learning import QUICK_PICTURES, RESULTS
from benchmarks.learning_cases import Case
from benchmarks.machine import machine
from benchmarks.options import add_source
from common.codecs.step import Step
from common.files import write_atomically
from common.schedule import Phase
from device_client import batches
from device_client.data import Dataset, Part, load
from device_client.remote_tail import RemoteTail, StepResult
from device_client.trainer import Trainer
from edge_server.training import Training

EPOCHS, UP_DB, DOWN_DB = 10, 10, 5
CASE = Case("ways", "fixed", f"[8, {EPOCHS}]", "linear", f"step:{UP_DB}", f"step:{DOWN_DB}", warmup=30)
AUGMENTED = "crop = 4\nflip = true"
FULL = Case("full", "pretrained", f"[0, {EPOCHS}]", warmup=30)
PRUNED = Case(
    "pruned", "prune", "{ width = 8, epochs = 12, views = 1, flip = true, shift = 2 }", "linear", f"step:{UP_DB}",
    basis="weighted", start="full", lr=0.05, warmup=0,
)  # fmt: skip
TEACHER_SHARE, TEMPERATURE = 0.5, 2.0


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


class Felt(RemoteTail):
    """Also adds up the gradient's energy, channel by channel."""

    energy: Any = 0.0

    def learn(self, *arguments: Any, **options: Any) -> tuple[np.ndarray | None, StepResult, dict[str, float]]:
        gradient, result, seconds = super().learn(*arguments, **options)
        assert gradient is not None
        self.energy = self.energy + np.square(gradient, dtype=np.float64).mean(axis=(0, 2, 3))
        return gradient, result, seconds

    def gain_db(self) -> float:
        """How much coarser channels may be on average, each by what the loss feels of it, for the same harm to it.

        A step D of a channel whose gradient has energy e harms by e D² / 12 and saves log2 D bits: at the best e D² is
        the same everywhere, and the gain is the arithmetic over the geometric mean of e.
        """
        return float(10 * np.log10(self.energy.mean() / np.exp(np.log(self.energy).mean())))


def distil(training: Training) -> None:
    """From now on have the tail learn half from what it says at this moment of the same activation."""
    teacher = copy.deepcopy(training.halves.tail).eval()

    def listen(_tail: Any, inputs: tuple[torch.Tensor, ...], logits: torch.Tensor) -> None:
        if not logits.requires_grad:
            return
        with torch.no_grad():
            said = (teacher(inputs[0]).float() / TEMPERATURE).softmax(1)
        student = logits.detach().float()

        def mixed(gradient: torch.Tensor) -> torch.Tensor:
            # That of T² KL(said, student at T), mean over the batch.
            soft = TEMPERATURE * ((student / TEMPERATURE).softmax(1) - said) / len(said)
            return (1 - TEACHER_SHARE) * gradient + TEACHER_SHARE * soft.to(gradient.dtype)

        logits.register_hook(mixed)

    training.halves.tail.register_forward_hook(listen)


def trained(data: Dataset, seed: int, augmented: bool, remote: type[RemoteTail], **options: Any) -> dict[str, Any]:
    text = CASE.recipe("tiny", seed, "")
    text = text if augmented else text.replace(AUGMENTED, "crop = 0\nflip = false")
    tails: list[RemoteTail] = []

    def watch(_step: int, _phase: Phase, trainer: Trainer, _training: Training) -> None:
        tails[:] = [trainer.remote]

    summary = inprocess.train(text, data, remote, watch=watch, **options)
    return result_of(summary) | {"tail": tails[0]}


def result_of(summary: dict[str, Any]) -> dict[str, Any]:
    up, down = (
        sum(count["message"] for role, count in summary["bytes"][way]["by_role"].items() if role in roles)
        for way, roles in (("up", ("activation", "label")), ("down", ("gradient",)))
    )
    return {"accuracy": summary["accuracy"], "bytes_up": up, "bytes_down": down}


def pruned(data: Dataset, seed: int, network: Path, distilled: bool) -> dict[str, Any]:
    def watch(step: int, _phase: Phase, _trainer: Trainer, training: Training) -> None:
        if distilled and step == 0:
            distil(training)

    return result_of(inprocess.train(PRUNED.recipe("tiny", seed, str(network / "server")), data, watch=watch))


def measure(data: Dataset, others: Dataset, seed: int) -> list[dict[str, Any]]:
    row = trained(data, seed, True, Felt)
    rows = [{"way": "as it is"} | row | {"gain_db": row["tail"].gain_db()}]
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
    with tempfile.TemporaryDirectory() as place:
        inprocess.train(FULL.recipe("tiny", seed, ""), others, folder=Path(place))
        for distilled in (False, True):
            way = "prune with the head frozen" + ", distilled" * distilled
            rows.append({"way": way} | pruned(data, seed, Path(place), distilled))
    for row in rows:
        row.pop("tail", None)
        row |= {"seed": seed, "machine": machine(), "date": str(date.today())}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_source(parser)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    both = load(options.source, (3, 32, 32), 0, 0.0, limit=2 * QUICK_PICTURES)
    data, others = (
        replace(both, train=Part(both.train.pictures[half::2], both.train.labels[half::2])) for half in (0, 1)
    )
    rows = []
    for seed in range(options.seeds):
        rows += measure(data, others, seed)
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
    gains = [row["gain_db"] for row in rows if "gain_db" in row]
    each = ", ".join(f"{gain:.2f}" for gain in gains)
    console.print(f"a step of its own for each channel: worth {statistics.mean(gains):.2f} dB ({each})")


if __name__ == "__main__":
    main()
