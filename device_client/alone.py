"""What a device can tell without a server: its head as it learnt alone, and the classifier by which it did.

`evaluate alone` and `predict alone` ask it, where no server can be reached or where it is right as often. What the head
learns afterwards, with the server, is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common import halves, weights
from common.errors import MismatchError, RunFolderError
from common.processor import fits
from common.progress import Counted, untold
from common.recipe import Recipe
from common.run import ALONE_FILE, RunFolder
from common.words import unlike
from device_client.data import Dataset, Part
from device_client.inputs import batches_of, computing

_WIDTHS = 64, 128


@dataclass(frozen=True)
class Verdict:
    """As a server's."""

    accuracy: float  # 0 to 1
    loss: float
    count: int


class Classifier(nn.Module):
    """Logits [B, classes] from all channels at the cut [B, C, ...]: two strided convolutions and the mean over places.

    Seven million multiplications a picture at 16x32x32, under one at 64x8x8.
    """

    def __init__(self, channels: int, dimensions: int, classes: int) -> None:
        """`dimensions` of the activation, beside batch and channels: 0 to 2."""
        super().__init__()
        norm = nn.BatchNorm2d if dimensions == 2 else nn.BatchNorm1d
        layers: list[nn.Module] = []
        for inputs, outputs in zip((channels, *_WIDTHS), _WIDTHS, strict=False):
            if dimensions:
                convolution = nn.Conv2d if dimensions == 2 else nn.Conv1d
                layers.append(convolution(inputs, outputs, 3, 2, padding=1, bias=False))
            else:
                layers.append(nn.Linear(inputs, outputs, bias=False))
            layers += [norm(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(_WIDTHS[-1], classes)

    def forward(self, activation: Tensor) -> Tensor:
        maps = self.layers(activation)
        return self.last(maps.flatten(2).mean(dim=2) if maps.dim() > 2 else maps)


class Alone(nn.Module):
    """Pictures [B, *input] to logits [B, classes], fp32 whatever the arithmetic inside."""

    def __init__(self, recipe: Recipe, classes: tuple[str, ...], layers: nn.Module, cut: tuple[int, ...]) -> None:
        """`layers`: the head's, shared; `cut`: [C, ...] of one picture."""
        super().__init__()
        self.recipe, self.classes = recipe, classes
        self.layers = layers
        self.classifier = Classifier(cut[0], len(cut) - 1, recipe.model.classes)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.classifier(self.layers(pictures)).float()

    def judge(self, data: Dataset, progress: Counted = untold) -> Verdict:
        """Its answers on the test part; MismatchError where that is of other classes."""
        if what := unlike(data.classes, self.classes):
            raise MismatchError(
                f"the pictures' classes are not those of the run: {what}; use data with classes of those names"
            )
        logits = torch.from_numpy(self.logits(data.test, progress))
        truth = torch.from_numpy(data.test.labels).long()
        right = int((logits.argmax(1) == truth).sum())
        return Verdict(right / max(1, len(truth)), functional.cross_entropy(logits, truth).item(), len(truth))

    @torch.no_grad()
    def logits(self, part: Part, progress: Counted = untold) -> np.ndarray:
        """Those of a part [pictures, classes], unaugmented and in order."""
        self.eval()
        found, done = np.empty((len(part), self.recipe.model.classes), np.float32), 0
        processor = self.classifier.last.weight.device
        for inputs, _ in batches_of(part, self.recipe, self.recipe.data.batch):
            with computing(processor, self.recipe, "an evaluation's batch"):
                found[done : done + len(inputs)] = self(inputs.to(processor)).cpu().numpy()
            done += len(inputs)
            progress(done, len(part))
        return found


def open_alone(folder: RunFolder, allowed: tuple[str, ...], processor: torch.device) -> Alone:
    """What the head of the finished run in `folder` had learnt alone, on `processor`.

    Raises:
        RunFolderError: there is no finished run, or its head has learnt nothing alone.
    """
    recipe, _, manifest = folder.read()
    path = folder.path / ALONE_FILE
    if not path.is_file():
        learnt = recipe.local.epochs
        why = "it was not kept, as on a full disk" if learnt else "the head of this run learnt nothing alone"
        raise RunFolderError(f"{path} is not there: {why}; give the address of the run's server")
    built = halves.build(recipe, allowed)
    network = Alone(recipe, manifest.classes, built.head.layers, built.cut)
    weights.fill(network, weights.read(path), str(path))
    with fits("the head", processor):
        return network.to(processor)
