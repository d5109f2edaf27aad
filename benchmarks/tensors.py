"""Real activations and gradients to measure codecs on: trains ResNet-20 with the project's own halves and keeps some.

Called by benchmarks.codec. The tensors are fp32 as they cross the link in plain split learning, of the first steps
and of late ones, for two cuts and two batch sizes; a folder of .npz holds them for the next time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import inprocess
from common.schedule import Phase
from device_client.data import Dataset, Part
from device_client.remote_tail import RemoteTail

# After 20 steps the network has only just begun to learn; after 551 its activations are sparse and structured.
EARLY, LATE = 20, 551
CUTS = {"16x32x32": "stage1_2_relu2", "32x16x16": "stage2_2_relu2"}
BATCHES = (128, 32)
RECIPE = """
name = "tensors"
method = "plain"
[model]
name = "resnet20"
input = [3, 32, 32]
classes = 10
cut = "{cut}"
[data]
batch = {batch}
crop = 4
flip = true
mean = [0.49, 0.48, 0.45]
std = [0.25, 0.24, 0.26]
[schedule]
phases = [[0, {epochs}]]
[optimiser]
lr = 0.1
warmup = 50
"""


@dataclass(frozen=True)
class Sample:
    """The two tensors of one step, both [B, C, H, W]."""

    cut: str
    batch: int
    step: int
    activation: np.ndarray
    gradient: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.cut} b{self.batch} step {self.step}"


class _Recorder(RemoteTail):
    """Keeps what is sent and what comes back at the steps EARLY and LATE."""

    def __init__(self, *arguments: Any, kept: dict[int, dict[str, np.ndarray]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kept = kept

    def learn(self, step: int, phase: Phase, sent: np.ndarray, *rest: Any) -> Any:
        answer = super().learn(step, phase, sent, *rest)
        if step in (EARLY, LATE):
            self._kept[step] = {"activation": sent.copy(), "gradient": answer[0].copy()}
        return answer


def record(data: Dataset, cut: str, batch: int) -> list[Sample]:
    """Train LATE steps and a little, and return the samples kept on the way."""
    kept: dict[int, dict[str, np.ndarray]] = {}
    per_epoch = len(data.train) // batch
    epochs = round((LATE + 1) / per_epoch, 6)
    few = Part(data.test.pictures[:256], data.test.labels[:256])
    short = dataclasses.replace(data, test=few)
    inprocess.train(RECIPE.format(cut=CUTS[cut], batch=batch, epochs=epochs), short, _Recorder, kept=kept)
    return [Sample(cut, batch, step, **kept[step]) for step in (EARLY, LATE)]


def samples(folder: Path, data: Callable[[], Dataset]) -> list[Sample]:
    """All samples, from `folder` where they lie there already; else `data()` is trained on and they are put there."""
    folder.mkdir(parents=True, exist_ok=True)
    result = []
    for cut in CUTS:
        for batch in BATCHES:
            path = folder / f"{cut}-{batch}.npz"
            if not path.is_file():
                made = record(data(), cut, batch)
                np.savez(
                    path, **{f"{kind}-{s.step}": getattr(s, kind) for s in made for kind in ("activation", "gradient")}
                )
            with np.load(path) as kept:
                result += [
                    Sample(cut, batch, step, kept[f"activation-{step}"], kept[f"gradient-{step}"])
                    for step in (EARLY, LATE)
                ]
    return result
