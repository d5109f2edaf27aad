"""Real activations and gradients to measure codecs on: trains ResNet-20 with the project's own halves and keeps some.

Called by benchmarks.codec. The tensors are fp32 as they cross the link, of the first steps and of late ones: in plain
split learning for two cuts and two batch sizes, and behind a linear bottleneck of width 8. A folder of .npz holds them
for the next time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import inprocess
from common.schedule import Phase, steps_per_epoch
from device_client.data import Dataset, Part
from device_client.remote_tail import RemoteTail

# After 20 steps the network has only just begun to learn; after 551 its activations are sparse and structured.
EARLY, LATE = 20, 551
# Name, cut, width behind a linear bottleneck (none where it is 0), batch.
CASES = (
    ("16x32x32", "stage1_2_relu2", 0, 128), ("16x32x32", "stage1_2_relu2", 0, 32),
    ("32x16x16", "stage2_2_relu2", 0, 128), ("32x16x16", "stage2_2_relu2", 0, 32),
    ("8x16x16", "stage2_2_relu2", 8, 32),
)  # fmt: skip
RECIPE = """
name = "tensors"
method = "{method}"
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
{bottleneck}
[codec]
activation = "fp32"
gradient = "fp32"
[schedule]
phases = [[{width}, {epochs}]]
[optimiser]
lr = 0.1
warmup = 50
"""


@dataclass(frozen=True)
class Sample:
    """The two tensors of one step, both [B, C, H, W]."""

    shape: str
    batch: int
    step: int
    bottleneck: bool
    activation: np.ndarray
    gradient: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.shape} b{self.batch} step {self.step}"


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


def record(data: Dataset, cut: str, width: int, batch: int) -> dict[int, dict[str, np.ndarray]]:
    """Train LATE steps and a little, and return what was kept on the way."""
    kept: dict[int, dict[str, np.ndarray]] = {}
    epochs = round((LATE + 1) / steps_per_epoch(len(data.train), batch), 6)
    few = Part(data.test.pictures[:256], data.test.labels[:256])
    short = dataclasses.replace(data, test=few)
    recipe = RECIPE.format(
        cut=cut, batch=batch, epochs=epochs, width=width, method="fixed" if width else "plain",
        bottleneck='[bottleneck]\nkind = "linear"' if width else "",
    )  # fmt: skip
    inprocess.train(recipe, short, _Recorder, kept=kept)
    return kept


def samples(folder: Path, data: Callable[[], Dataset]) -> list[Sample]:
    """All samples, from `folder` where they lie there already; else `data()` is trained on and they are put there."""
    folder.mkdir(parents=True, exist_ok=True)
    result = []
    for shape, cut, width, batch in CASES:
        path = folder / f"{shape}-{batch}.npz"
        if not path.is_file():
            kept = record(data(), cut, width, batch)
            whole = path.with_suffix(".part.npz")
            np.savez(whole, **{f"{kind}-{step}": part for step, parts in kept.items() for kind, part in parts.items()})
            whole.replace(path)  # half a file would be one that cannot be read, at every start from now on
        with np.load(path) as stored:
            for step in (EARLY, LATE):
                parts = stored[f"activation-{step}"], stored[f"gradient-{step}"]
                result.append(Sample(shape, batch, step, bool(width), *parts))
    return result
