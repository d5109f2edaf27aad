"""One device's training on the server: tail, optimiser, step and phase. Plain torch; knows nothing of gRPC."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from common import optim
from common.bottleneck import LinearDecoder
from common.errors import DivergedError
from common.halves import Halves, reseed
from common.recipe import Recipe
from common.rpc import split_pb2 as pb
from common.schedule import RANK, RECALL, STORE, Phase
from edge_server.coordinator import Coordinator, Decision
from edge_server.store import Store


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
    with halves.lock, torch.no_grad(), optim.arithmetic(precision):
        halves.tail.resize(width)
        return halves.tail(torch.from_numpy(sent))


def judge(halves: Halves, sent: np.ndarray, labels: np.ndarray, width: int, precision: str) -> Judgement:
    logits = logits_of(halves, sent, width, precision)
    truth = torch.from_numpy(labels)
    loss = functional.cross_entropy(logits, truth, reduction="sum")
    return Judgement(len(labels), float(loss), int((logits.argmax(1) == truth).sum()))


@dataclass
class Training:
    """The state of one run in training, from its first step to its last."""

    recipe: Recipe
    halves: Halves
    coordinator: Coordinator
    classes: tuple[str, ...]
    samples: int  # pictures in an epoch
    folder: Path  # where a store may lie
    store_limit: int  # bytes that it may have
    step: int = 0  # the next to come
    trained: int = 0  # pictures trained on so far
    started: float = field(default_factory=time.monotonic)
    test: Judgement | None = None
    store: Store | None = None
    stored: int = 0  # steps kept in the run so far
    busy_s: float = 0.0  # spent computing
    # Held while the tail computes: an evaluation waits for the step before it to be applied.
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        tail = self.halves.tail
        self._optimiser = optim.build(self.recipe.optimiser, tail.layers, tail.bottleneck)
        tail.train()
        self.switch(self.phase)

    @property
    def phase(self) -> Phase:
        return self.coordinator.phase

    @property
    def batch(self) -> int:
        return min(self.recipe.data.batch, self.samples)

    @property
    def sent_shape(self) -> tuple[int, ...]:
        """Shape of the activation that the next step must bring."""
        return self.halves.sent_shape(self.batch, self.phase.width_at(self.recipe.seed, self.step))

    @property
    def epochs(self) -> float:
        return round(self.step / max(1, self.samples // self.batch), 4)

    def rotate(self, basis: np.ndarray) -> None:
        """Start from the device's principal components: `basis` [w + 1, w], components as rows, then the mean."""
        decoder = self.halves.tail.bottleneck
        assert isinstance(decoder, LinearDecoder)
        decoder.rotate(torch.from_numpy(basis[:-1].copy()), torch.from_numpy(basis[-1].copy()))

    def switch(self, phase: Phase) -> None:
        self.halves.tail.resize(phase.width, phase.order)
        if phase.kind != RECALL:
            self.close()
        if phase.kind == STORE:
            self.store = Store(self.folder, phase, self.sent_shape, self.recipe.seed, self.store_limit)

    def keep(self, payload: bytes | bytearray, labels: np.ndarray) -> None:
        """Store what a step of a STORE phase brought; StoreError without room."""
        assert self.store
        self.store.add(payload, labels)
        self.stored += 1

    def recall(self) -> tuple[np.ndarray, np.ndarray]:
        """What the next step of a RECALL phase learns from: activation [B, width, ...] and labels [B]."""
        assert self.store
        return self.store.draw(self.step - self.phase.from_step, self.phase.flip, self.phase.shift)

    def close(self) -> None:
        """Drop what was kept."""
        if self.store:
            self.store.close()
            self.store = None

    def learn(self, sent: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray | None, float, int]:
        """Forward and backward of one step: dLoss/dActivation (shape of `sent`), mean loss, right answers.

        No gradient where the head is frozen. The weights move in `apply`, so that it can be on its way meanwhile.
        """
        reseed(self.recipe.seed, self.step, "tail")
        self.halves.tail.resize(self.phase.width_at(self.recipe.seed, self.step))
        activation = torch.from_numpy(sent).requires_grad_(not self.phase.frozen)
        truth = torch.from_numpy(labels)
        with optim.arithmetic(self.recipe.precision):
            logits = self.halves.tail(activation)
            loss = functional.cross_entropy(logits, truth)
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss of step {self.step} is not finite: training has diverged; lower optimiser.lr "
                f"(now {self.recipe.optimiser.lr}) or choose a finer codec"
            )
        self._optimiser.zero_grad()
        loss.backward()
        correct = int((logits.argmax(1) == truth).sum())
        if activation.grad is None:
            return None, loss.item(), correct
        if self.phase.kind == RANK:
            self.coordinator.observe(activation.detach(), activation.grad)
        return activation.grad.numpy(), loss.item(), correct

    def apply(self) -> Decision:
        """Move the weights, count the step, and say what comes next."""
        rate = optim.learning_rate(self.recipe.optimiser, self.step, self.phase)
        optim.set_learning_rate(self._optimiser, rate)
        self._optimiser.step()
        decision = self.coordinator.after_step(self.step)
        self.step += 1
        self.trained += self.batch
        if decision.phase:
            self.switch(decision.phase)
        return decision

    def judged(self, result: Judgement, on_test: bool) -> Decision:
        """Take in a finished evaluation; the test part decides nothing."""
        if on_test:
            self.test = result
            return Decision(pb.STEP)
        decision = self.coordinator.after_validation(self.step - 1, result.mean_loss)
        if decision.phase:
            self.switch(decision.phase)
        return decision
