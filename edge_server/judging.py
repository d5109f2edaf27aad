"""What a tail says of what a device sent, without learning: logits, and how many were right. Plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from common import optim
from common.halves import Halves
from common.processor import fits


@dataclass(frozen=True)
class Judgement:
    """Sums over the pictures of one batch or of a whole evaluation."""

    count: int = 0
    loss: float = 0.0
    correct: int = 0

    def __add__(self, other: Judgement) -> Judgement:
        return Judgement(self.count + other.count, self.loss + other.loss, self.correct + other.correct)

    @property
    def mean_loss(self) -> float:
        return self.loss / max(1, self.count)

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.count)


def logits_of(halves: Halves, sent: np.ndarray, width: int, precision: str) -> torch.Tensor:
    """Logits [B, classes] for what a device sent [B, width, ...], in eval mode and without gradient."""
    # Devices that are served at the same time may have different widths.
    computing = optim.arithmetic(precision, halves.processor.type)
    with halves.lock, torch.no_grad(), fits("an evaluation's batch", halves.processor), computing:
        halves.tail.resize(width)
        return halves.tail(torch.from_numpy(sent).to(halves.processor)).cpu()


def judge(halves: Halves, sent: np.ndarray, labels: np.ndarray, width: int, precision: str) -> Judgement:
    logits = logits_of(halves, sent, width, precision)
    truth = torch.from_numpy(labels)
    loss = functional.cross_entropy(logits, truth, reduction="sum")
    return Judgement(len(labels), float(loss), int((logits.argmax(1) == truth).sum()))
