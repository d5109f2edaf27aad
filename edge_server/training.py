"""One device's training on the server: tail, optimiser, step and phase. Plain torch; knows nothing of gRPC."""

from __future__ import annotations

import contextlib
import io
import itertools
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from common import optim, weights
from common.checkpoint import Checkpoint, part
from common.errors import DivergedError, FrameError, ModelError
from common.halves import Halves, reseed
from common.processor import fits
from common.progress import RunningMean
from common.recipe import Recipe
from common.rpc import split_pb2 as pb
from common.schedule import RANK, RECALL, STORE, Phase, phase_of_table, steps_per_epoch
from edge_server.budget import Beside
from edge_server.coordinator import Coordinator, Decision
from edge_server.judging import Judgement
from edge_server.store import Store

_NOTED_EVERY = 8  # steps: the sensitivity changes slowly


def reached(at: int, answered: int, evaluated: Collection[tuple[int, bool]]) -> set[int]:
    """Steps at which a device can take up a run that stands at step `at` with so many answers kept; `evaluated` as in
    Training."""
    return {step for step in range(at - answered, at + 1) if step == at or (step, False) not in evaluated}


@dataclass
class Training:
    """The state of one run in training, from its first step to its last."""

    recipe: Recipe
    halves: Halves
    coordinator: Coordinator
    classes: tuple[str, ...]
    samples: int  # pictures in an epoch
    beside: Beside
    folder: Path  # where a store may lie
    store_limit: int  # bytes that it may have
    step: int = 0  # the next to come
    rotated: bool = False  # the device's basis has come, where one is wanted
    wall_s: float = 0.0  # taken by the run before this process
    busy_s: float = 0.0  # spent computing
    mean: RunningMean = field(default_factory=RunningMean)  # as it is shown
    test: Judgement | None = None
    evaluated: set[tuple[int, bool]] = field(default_factory=set)  # evaluations made so far: (step, on the test part)
    store: Store | None = None
    # The server's answers to what the device asked for last, a list of frames for each step: if its stream breaks, it
    # may have missed them.
    answers: list[list[pb.Frame]] = field(default_factory=list)
    recalled: bool = False  # whether that was recalled steps
    # Held while the tail computes: an evaluation waits for the step before it to be applied.
    lock: threading.Lock = field(default_factory=threading.Lock)
    spoiled: bool = False  # a step has failed half-way

    def __post_init__(self) -> None:
        tail = self.halves.tail
        self._optimiser = optim.build(self.recipe.optimiser, tail.layers, tail.bottleneck)
        self._started = time.monotonic()
        self._judged_in = -1, self.phase  # step of the newest validation, and the phase that it was made in
        # Stores that learning is done with, and since which step: only checkpoints up to that still need them.
        self._outlived: dict[Path, int] = {}
        tail.train()

    @property
    def elapsed_s(self) -> float:
        return self.wall_s + time.monotonic() - self._started

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
        return round(self.step / self.per_epoch, 4)

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return steps_per_epoch(self.samples, self.batch)

    def rotate(self, basis: np.ndarray) -> None:
        """Start from the device's principal components: `basis` [w + 1, w], components as rows, then the mean."""
        moved = torch.from_numpy(basis.copy())
        try:
            self.halves.tail.rotate(moved[:-1], moved[-1])
        except ModelError as error:
            raise FrameError(f"the basis is of no use: {error}") from error
        self.rotated = True

    def switch(self, phase: Phase) -> None:
        # The norms follow with the width of each step: of that of the phase nothing is known before it is drawn.
        self.halves.tail.bottleneck.resize(phase.width, phase.order)
        if phase.kind != RECALL and self.store:
            self._outlived[self.store.path] = self.step
            self._close_store()
        if phase.kind == STORE and self.coordinator.recalls:
            self.store = Store(self.folder, phase, self.sent_shape, self.recipe.seed, self.store_limit)

    @contextlib.contextmanager
    def applying(self) -> Iterator[None]:
        """Holds the lock over one step, from its forward to its answer.

        Where that fails, some of it may be applied: the run then goes on from a checkpoint, not from here.
        """
        with self.lock:
            try:
                yield
            except BaseException:
                self.spoiled = True
                raise

    def can_go_on(self, step: int) -> bool:
        """Whether a device that stands at `step` can go on with this run as it is: what it missed is kept."""
        return not self.spoiled and self.step - len(self.answers) <= step <= self.step

    def can_be_taken_up(self, step: int) -> bool:
        """The same for a device that may be a new process, which knows only what its checkpoint of `step` holds.

        If a validation was made at that step, the checkpoint may be older than its verdict. The device then judges once
        more, and a run that has gone on from the step cannot let it.
        """
        return not self.spoiled and step in reached(self.step, len(self.answers), self.evaluated)

    def answered_from(self, step: int) -> list[list[pb.Frame]]:
        """Answers to `step` and later ones; FrameError where a device that stands there cannot go on."""
        if not self.can_go_on(step):
            raise FrameError(
                f"the device stands at step {step}, the server at step {self.step}: they cannot go on from there; if "
                f"the run was started on another device as well, stop one, and start this one again"
            )
        return self.answers[len(self.answers) - (self.step - step) :]

    def store_step(self, payload: bytes | bytearray, labels: np.ndarray) -> None:
        """Store what a step of a STORE phase brought; StoreError without room."""
        assert self.store
        self.store.add(payload, labels)

    def recall(self) -> tuple[np.ndarray, np.ndarray]:
        """What the next step of a RECALL phase learns from: activation [B, width, ...] and labels [B]."""
        assert self.store
        return self.store.draw(self.step - self.phase.from_step, self.phase.flip, self.phase.shift)

    def close(self) -> None:
        """Drop the store, and what only learning needs: the run may be served for months from now on."""
        self._optimiser.zero_grad()
        self._optimiser.state.clear()
        self._close_store()

    def _close_store(self) -> None:
        if self.store:
            self.store.close()
            self.store = None

    def learn(self, sent: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray | None, float, int]:
        """Forward and backward of one step: dLoss/dActivation (shape of `sent`), mean loss, right answers.

        No gradient where the head is frozen. The weights do not move here, but in `apply`.
        """
        reseed(self.recipe.seed, self.step, "tail")
        self.halves.tail.resize(self.phase.width_at(self.recipe.seed, self.step))
        processor = self.halves.processor
        activation = torch.from_numpy(sent).to(processor).requires_grad_(not self.phase.frozen)
        truth = torch.from_numpy(labels).to(processor)
        with fits(f"step {self.step}", processor):
            with optim.arithmetic(self.recipe.precision, processor.type):
                logits = self.halves.tail(activation)
                loss = functional.cross_entropy(logits, truth)
            if not torch.isfinite(loss):
                own = self.phase.lr != self.recipe.optimiser.lr
                raise DivergedError(
                    f"the loss of step {self.step} is not finite: training has diverged; lower "
                    f"{'lr of this phase in schedule.phases' if own else 'optimiser.lr'} (now {self.phase.lr:g}) or "
                    f"choose a finer codec"
                )
            self._optimiser.zero_grad()
            loss.backward()
            if activation.grad is not None and self.step % _NOTED_EVERY == 0 and sent.shape[1] == self.phase.width:
                # Among nested widths only at the widest, which has all directions.
                self.halves.tail.note_sensitivity(activation.grad)
        correct = int((logits.argmax(1) == truth).sum())
        if self.phase.frozen:
            return None, loss.item(), correct
        # A tail may detach what it is given.
        gradient = torch.zeros_like(activation) if activation.grad is None else activation.grad
        if self.phase.kind == RANK:
            self.coordinator.observe(activation.detach(), gradient)
        return gradient.cpu().numpy(), loss.item(), correct

    def apply(self) -> Decision:
        """Move the weights, count the step, and say what comes next."""
        rate = optim.learning_rate(self.recipe.optimiser, self.step, self.phase)
        self._optimiser.lr = rate
        with fits(f"step {self.step}", self.halves.processor):
            self._optimiser.step()
        decision = self.coordinator.after_step(self.step)
        self.step += 1
        if decision.phase:
            self.switch(decision.phase)
        return decision

    def phase_of_evaluation(self, index: int) -> Phase:
        """The phase that an evaluation is made in: this one, or the one before a validation whose verdict was lost."""
        if index == self.phase.index:
            return self.phase
        step, before = self._judged_in
        if (step, before.index) == (self.step, index):
            return before
        raise FrameError(f"an evaluation in phase {index} was asked for; the run is in phase {self.phase.index}")

    def judged(self, result: Judgement, on_test: bool) -> Decision:
        """Take in a finished evaluation; the test part decides nothing."""
        self.evaluated.add((self.step, on_test))
        if on_test:
            self.test = result
            return Decision(pb.STEP)
        if self._judged_in[0] != self.step:
            self._judged_in = self.step, self.phase
        before = self.phase
        decision = self.coordinator.after_validation(self.step - 1, result.mean_loss)
        if self.phase is not before:
            self.switch(self.phase)
        return decision

    # Checkpoints

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that `restore` needs: tensors, copied, and the rest as JSON."""
        self.halves.tail.norms.put_away()
        tensors = {f"tail.{name}": value for name, value in self.halves.tail.state_dict().items()}
        tensors |= {f"optimiser.{name}": value for name, value in optim.tensors_of(self._optimiser).items()}
        # They are written after the step's answer has gone, while an evaluation may be switching widths.
        tensors = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        if self.store:
            tensors |= {f"store.{name}": value for name, value in self.store.index().items()}
        # A device that has not had them, for it was stopped or its link lost, does not go back for them. Of those to a
        # Recall a new process of the device could not tell whether its request had been booked.
        kept = [] if self.recalled else self.answers
        answers = [[frame.SerializeToString() for frame in answer] for answer in kept]
        if answers:
            tensors["answers"] = torch.frombuffer(bytearray(b"".join(itertools.chain(*answers))), dtype=torch.uint8)
        return tensors, {
            "answers": [[len(frame) for frame in answer] for answer in answers],
            "classes": self.classes, "samples": self.samples, "beside": asdict(self.beside),
            "rotated": self.rotated, "wall_s": self.elapsed_s, "busy_s": self.busy_s,
            "norms": self.halves.tail.norms.width,
            "outlived": {path.name: last for path, last in self._outlived.items()},
            "coordinator": self.coordinator.state(), "store": asdict(self.store.phase) if self.store else None,
            "evaluated": sorted(self.evaluated), "test": asdict(self.test) if self.test else None,
            "mean": asdict(self.mean), "judged_in": [self._judged_in[0], asdict(self._judged_in[1])],
        }  # fmt: skip

    def restore(self, kept: Checkpoint) -> None:
        """Stand where the training of a checkpoint stood. Called on a new one, before anything else."""
        source, state = f"the checkpoint of step {kept.step}", kept.state
        self.coordinator.restore(state["coordinator"])
        weights.fill(self.halves.tail, part(kept.tensors, "tail"), source)
        optim.restore(self._optimiser, part(kept.tensors, "optimiser"), source)
        self.step, self.rotated = kept.step, state["rotated"]
        self.wall_s, self.busy_s = state["wall_s"], state["busy_s"]
        self.mean = RunningMean(**state["mean"])
        self.evaluated = {(step, on_test) for step, on_test in state["evaluated"]}
        self.test = Judgement(**state["test"]) if state["test"] else None
        self._outlived = {self.folder / name: last for name, last in state["outlived"].items()}
        if state["answers"]:
            data = io.BytesIO(kept.tensors["answers"].numpy().tobytes())
            self.answers = [[pb.Frame.FromString(data.read(size)) for size in answer] for answer in state["answers"]]
        step, phase_then = state["judged_in"]
        self._judged_in = step, phase_of_table(phase_then)
        # The width of the step before, not the phase's: a width that is drawn for the first time goes on from it.
        self.halves.tail.norms.width = state["norms"]
        self.halves.tail.bottleneck.resize(self.phase.width, self.phase.order)
        if state["store"]:
            phase = phase_of_table(state["store"])
            shape = self.halves.sent_shape(self.batch, phase.width)
            index = part(kept.tensors, "store")
            self.store = Store(self.folder, phase, shape, self.recipe.seed, self.store_limit, index)

    def forget_stores(self, oldest: int) -> None:
        """Remove the stores that no checkpoint from step `oldest` on needs."""
        for path in [path for path, last in self._outlived.items() if last <= oldest]:
            path.unlink(missing_ok=True)
            del self._outlived[path]
