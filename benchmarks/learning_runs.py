"""How a worker of `make bench-learning` trains one row: its pictures, its curve, the run itself."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import inprocess, whole
from benchmarks.learning_cases import ALL, CASES, EPOCHS, LAST_FIVE, OTHERS, Case, precision, share
from benchmarks.machine import machine
from benchmarks.priced import Priced, Prices
from common import optim, processor, recipe
from common.codecs import codec
from common.halves import Head
from common.meter import DOWN, UP, Meter
from common.schedule import Phase
from device_client import batches
from device_client.data import Dataset, Part, load
from device_client.inputs import sent_batches
from device_client.trainer import Trainer
from edge_server.judging import Judgement, judge
from edge_server.training import Training

NETWORKS = Path("runs/learning")  # the trained networks that prune starts from
Job = tuple[str, int, str, bool]  # case, seed, model, quick


class _Pictures:
    """The worker's pictures: read once, dealt into the parts that cases name."""

    def __init__(self, source: str, count: int) -> None:
        loaded = load(source, (3, 32, 32), 0, 0.0, limit=2 * count)
        order = np.random.default_rng(0).permutation(len(loaded.train))
        self._halves = {
            name: Part(loaded.train.pictures[chosen], loaded.train.labels[chosen])
            for name, chosen in ((ALL, order[:count]), (OTHERS, order[count : 2 * count]))
        }
        self._loaded = loaded
        folder = Path(source.partition(":")[2]) / "train"
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        self.upload = round(statistics.mean(sizes))  # bytes of one picture's file

    def part(self, name: str) -> Dataset:
        """The Dataset of ALL or OTHERS; LAST_FIVE classes of the first, FIRST_FIVE of the other pictures."""
        if name in self._halves:
            train, test, classes = self._halves[name], self._loaded.test, self._loaded.classes
        else:
            low = 5 if name == LAST_FIVE else 0

            def five(part: Part) -> Part:
                chosen = (part.labels >= low) & (part.labels < low + 5)
                return Part(part.pictures[chosen], part.labels[chosen] - low)

            train = five(self._halves[ALL if name == LAST_FIVE else OTHERS])
            test, classes = five(self._loaded.test), self._loaded.classes[low : low + 5]
        return Dataset(classes, train, self._loaded.validation, test, ())


_pictures: _Pictures
_processor = torch.device("cpu")  # where all that a worker trains is computed


def start(source: str, count: int, device: str) -> None:
    global _pictures, _processor
    torch.set_num_threads(1)
    _pictures, _processor = _Pictures(source, count), processor.choose(device)


class _Curve:
    """Test accuracy every second epoch, with the bytes and seconds until then; its own time and that of pricing are
    not counted."""

    def __init__(self, per_epoch: int, prices: Prices | None = None) -> None:
        self.points: list[dict[str, float]] = []
        self.spent = 0.0
        self._every = 2 * per_epoch
        self.prices = prices or Prices()
        self._started = time.monotonic()

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._started - self.spent - self.prices.spent

    def due(self, step: int) -> bool:
        return (step + 1) % self._every == 0

    def add(self, step: int, accuracy: float, up: int, down: int, **more: float) -> None:
        self.points.append({
            "step": step + 1, "accuracy": accuracy, "bytes": up + down,
            "context": up + down - self.prices.saved(UP) - self.prices.saved(DOWN),
            "wall_s": round(self.wall_s, 1), **more,
        })  # fmt: skip


def _sent(meter: Meter) -> tuple[int, int]:
    """Message bytes up and down, evaluations left out."""
    ways = meter.report(None, None)
    up, down = (
        sum(count["message"] for role, count in ways[way]["by_role"].items() if role != "evaluation")
        for way in ("up", "down")
    )
    return up, down


def _split(case: Case, text: str, data: Dataset, folder: Path) -> dict[str, Any]:
    """A row of ours."""
    prices = Prices()
    curve = _Curve(len(data.train) // 128, prices)
    last: list[Meter] = []

    def accuracy(head: Head, training: Training, phase: Phase) -> float:
        head.eval()
        training.halves.tail.eval()
        # Where this step was its phase's last, the server has gone on already and the device has not.
        training.halves.tail.resize(phase.width, phase.order)
        head.bottleneck.resize(phase.width)
        total, name = Judgement(), codec(phase.activation_codec)
        for sent, labels in sent_batches(head, data.test, training.recipe):
            total += judge(
                training.halves,
                name.decode(name.encode(sent), sent.shape),
                labels,
                phase.width,
                training.recipe.precision,
            )
        head.train(not phase.frozen)
        training.halves.tail.train()
        training.halves.tail.resize(training.phase.width, training.phase.order)
        return total.accuracy

    def watch(step: int, phase: Phase, trainer: Trainer, training: Training) -> None:
        last[:] = [trainer.remote.meter]
        if curve.due(step):
            started = time.monotonic()
            found = accuracy(trainer.head, training, phase)
            curve.spent += time.monotonic() - started
            curve.add(step, found, *_sent(trainer.remote.meter), width=phase.width)

    summary = inprocess.train(text, data, Priced, folder=folder, watch=watch, processor=_processor, prices=prices)
    up, down = _sent(last[0])
    return {
        "accuracy": summary["accuracy"], "bytes_up": up, "bytes_down": down,
        "context_up": up - prices.saved(UP), "context_down": down - prices.saved(DOWN),
        "wall_s": round(summary["wall_s"] - curve.spent - prices.spent, 1),
        "device_s": round(summary["busy_s"] - prices.seconds[UP], 1),
        "steps": summary["steps"], "phases": summary["phases"], "local": summary.get("local"), "curve": curve.points,
    }  # fmt: skip


def _whole(case: Case, text: str, data: Dataset, epochs: int) -> dict[str, Any]:
    """Federated averaging, or training on pictures that were uploaded."""
    parsed, curve = recipe.parse(text), _Curve(len(data.train) // 128)
    now: list[tuple[int, nn.Module, Meter]] = []

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        model.eval()
        right = 0
        for start in range(0, len(data.test), 256):
            pictures = batches.normalise(data.test.pictures[start:][:256], parsed.data.mean, parsed.data.std)
            with optim.arithmetic(parsed.precision, _processor.type):
                found = model(torch.from_numpy(pictures).to(_processor)).argmax(1)
            right += int((found.cpu().numpy() == data.test.labels[start:][:256]).sum())
        model.train()
        return right / len(data.test)

    def judge_now(step: int, model: nn.Module, meter: Meter) -> None:
        started = time.monotonic()
        found = accuracy(model)
        curve.spent += time.monotonic() - started
        curve.add(step, found, *_sent(meter))

    def watch(step: int, model: nn.Module, meter: Meter) -> None:
        now[:] = [(step, model, meter)]
        if curve.due(step):
            judge_now(*now[0])

    if case.method == "federated":
        busy = whole.federated(parsed, data, epochs, watch, _processor)
    else:
        busy = whole.central(parsed, data, epochs, _pictures.upload, watch, _processor)
    step, _, meter = now[0]
    if not curve.points or curve.points[-1]["step"] != step + 1:
        judge_now(*now[0])
    (up, down), wall = _sent(meter), curve.wall_s
    return {
        "accuracy": curve.points[-1]["accuracy"], "bytes_up": up, "bytes_down": down,
        "context_up": up, "context_down": down, "wall_s": round(wall, 1),
        "device_s": round(busy, 1), "steps": curve.points[-1]["step"], "phases": [], "curve": curve.points,
    }  # fmt: skip


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def epochs(job: Job) -> float:
    """Of training, recalled ones too: how long a run takes beside others."""
    name, _, model, quick = job
    case = _case(name)
    return (case.epochs + case.local) * (1 if case.start else share(model, quick))


def recipe_of(job: Job) -> str:
    name, seed, model, quick = job
    start = _case(name).start
    return _case(name).recipe(
        model, seed, str(_network(start, seed, model, quick)) if start else "", quick, _processor.type
    )


def run(job: Job) -> dict[str, Any]:
    name, seed, model, quick = job
    case, text = _case(name), recipe_of(job)
    data = _pictures.part(case.part)
    if case.method in ("federated", "jpeg"):
        found = _whole(case, text, data, round(EPOCHS * share(model, quick)))
    else:
        found = _split(case, text, data, _network(*job))
    head = {"name": name, "method": case.method, "model": model, "seed": seed, "pictures": len(data.train)}
    return {
        **head,
        **found,
        "recipe": text,
        "machine": f"{machine()}{_card()}, one thread, {precision(_processor.type)}",
        "date": str(date.today()),
    }


def _card() -> str:
    return f", {torch.cuda.get_device_name(_processor)}" if _processor.type == "cuda" else ""


def _network(name: str, seed: int, model: str, quick: bool) -> Path:
    """Where the run folders of a job are."""
    return NETWORKS / ("quick" if quick else "full") / model / f"{name.replace(' ', '-')}-{seed}"


def is_kept(job: Job) -> bool:
    """Whether the network that this job trains is on the disk, for others to start from."""
    folder = _network(*job) / "device"
    return (folder / "head.safetensors").is_file() and alike((folder / "recipe.toml").read_text(), recipe_of(job))


def alike(text: str, other: str) -> bool:
    """Whether two recipes train the same but for the machine's arithmetic."""
    one, two = (replace(recipe.parse(written), precision="fp32") for written in (text, other))
    return one == two
