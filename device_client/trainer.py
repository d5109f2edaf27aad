"""The device's loop: batch, head, send, gradient, backward, next phase; reads straight down."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console

from common import halves, optim, report, weights
from common.bottleneck import LinearEncoder, principal_components
from common.errors import DataError, LinkError, MismatchError
from common.halves import Head
from common.inherit import adopt
from common.meter import DOWN, UP
from common.progress import Live
from common.recipe import Recipe
from common.rpc import split_pb2 as pb
from common.run import Manifest, RunFolder
from common.schedule import RECALL, Phase
from device_client import batches
from device_client.data import Dataset, Part
from device_client.remote_tail import RemoteTail, StepResult, phase_of

# Steps of a recall asked for at once: few enough that Ctrl-C is soon heard.
_RECALLED = 64


class Trainer:
    """One run on the device: `prepare` the head, `fit`, `finish`."""

    def __init__(self, remote: RemoteTail, data: Dataset, folder: RunFolder, console: Console) -> None:
        self.remote, self.data, self.folder, self.console = remote, data, folder, console
        self.opened = remote.opened
        self.recipe: Recipe = self.opened.recipe
        self.phases: list[Phase] = []
        self.batch = min(self.recipe.data.batch, len(data.train))
        if not self.batch:
            raise DataError("the training part is empty; give more pictures or a smaller data.validation")
        self.started = time.monotonic()
        self.step = 0
        self.busy_s = 0.0  # spent computing in training steps
        self.asked = 0  # steps of a recall whose answers have not come yet

    @property
    def phase(self) -> Phase:
        return self.phases[-1]

    def prepare(self, allowed: tuple[str, ...], init: RunFolder | None) -> None:
        """Build the head and fill it with the server's first weights, or with those that `init` holds."""
        built = halves.build(self.recipe, allowed)
        self.head, self.cut, self.gate = built.head, built.cut, built.gate
        self.start_width = built.channels
        if self.opened.head_size:
            weights.fill(self.head, weights.from_bytes(self.remote.head_weights(), "the server"), "the server")
        else:
            self._inherit(init)
        self.optimiser = optim.build(self.recipe.optimiser, self.head.layers, self.head.bottleneck)

    def _inherit(self, init: RunFolder | None) -> None:
        wanted = self.opened.init_run_id
        if init is None:
            raise MismatchError(
                f"the recipe starts from the finished run {wanted}, whose head stayed on its device; "
                f"pass --head with that run's folder"
            )
        source, _, manifest = init.read()
        if manifest.run_id != wanted:
            raise MismatchError(
                f"{init.path} holds the head of run {manifest.run_id}; the recipe starts from run {wanted}"
            )
        trained = weights.read(init.path / "head.safetensors")
        adopt(self.head, trained, self.recipe, source, manifest)

    def fit(self) -> None:
        """Train from the first step to the last."""
        self.steps, basis_wanted, first = self.remote.begin(len(self.data.train), self.data.classes)
        if basis_wanted:
            self._rotate()
        self._switch(first)
        self.remote.meter.lap()
        with Live(self.console, self.steps) as live:
            while True:
                line = self._recall_step() if self.phase.kind == RECALL else self._train_step()
                warning = self.folder.metrics.append(line) if self.folder.metrics else None
                if warning:
                    live.say(f"[yellow]Warning[/yellow]: {warning}")
                total = self.remote.meter.total
                live.step(
                    self.step, line["width"], line["loss"], line["accuracy"], total(UP).message, total(DOWN).message
                )
                if self.then == pb.FINISH or (self.then == pb.VALIDATE and self._validate(live)):
                    return

    def _train_step(self) -> dict[str, Any]:
        """One step's round trip; the line for metrics.jsonl."""
        clock, remote, step, phase = time.perf_counter, self.remote, self.step, self.phase
        inputs, labels = self._batch(step)
        self.head.bottleneck.resize(phase.width_at(self.recipe.seed, step))
        halves.reseed(self.recipe.seed, step, "head")
        begun = clock()
        with torch.set_grad_enabled(not phase.frozen), optim.arithmetic(self.recipe.precision):
            activation = self.head(inputs)
        forward = clock()
        sent = activation.detach().numpy()
        remote.send(step, phase, sent, labels)
        waited, encoded = remote.wait_s, clock()
        decoded = backward = encoded
        if not phase.frozen:
            gradient = remote.gradient(step, phase, sent.shape, self.gate.support(sent, phase))
            decoded = clock()
            self._learn(activation, gradient)
            backward = clock()
        between = remote.wait_s - waited
        result = remote.result(step, phase)
        return self._after(result, {
            "head": forward - begun + backward - decoded, "encode": encoded - forward,
            "wait": between + clock() - backward, "decode": decoded - encoded - between,
        })  # fmt: skip

    def _learn(self, activation: torch.Tensor, gradient: np.ndarray) -> None:
        """Backward through the head and one move of its weights."""
        self.optimiser.zero_grad()
        if activation.requires_grad:
            activation.backward(torch.from_numpy(gradient))
        rate = optim.learning_rate(self.recipe.optimiser, self.step, self.phase)
        optim.set_learning_rate(self.optimiser, rate)
        self.optimiser.step()

    def _recall_step(self) -> dict[str, Any]:
        """One step that the server makes from what it has kept; asked for many at a time, so no step waits a trip."""
        started = time.perf_counter()
        if not self.asked:
            self.asked = _RECALLED
            self.remote.recall(self.step, self.phase, self.asked)
        self.asked -= 1
        result = self.remote.result(self.step, self.phase)
        if result.next or result.then != pb.STEP:
            self.asked = 0
        return self._after(result, {"wait": time.perf_counter() - started})

    def _after(self, result: StepResult, seconds: dict[str, float]) -> dict[str, Any]:
        """Go on to the next step; the line for metrics.jsonl of the one that was."""
        step, phase = self.step, self.phase
        self.busy_s += sum(value for name, value in seconds.items() if name != "wait")
        self.step, self.then = step + 1, result.then
        if result.next:
            self._switch(result.next)
        return {
            "step": step, "phase": phase.index, "width": phase.width_at(self.recipe.seed, step), "loss": result.loss,
            "accuracy": result.correct / self.batch, "bytes": self.remote.meter.lap(),
            "seconds": {name: round(value, 6) for name, value in seconds.items()},
        }  # fmt: skip

    def _batch(self, step: int) -> tuple[torch.Tensor, np.ndarray]:
        """Pictures [B, *input] and labels [B] of a step: a function of (seed, step)."""
        recipe, part = self.recipe.data, self.data.train
        chosen = batches.indices(self.recipe.seed, step, len(part), self.batch)
        pictures = batches.augment(part.pictures[chosen], self.recipe.seed, step, recipe.crop, recipe.flip)
        return torch.from_numpy(batches.normalise(pictures, recipe.mean, recipe.std)), part.labels[chosen]

    def _switch(self, phase: Phase) -> None:
        self.phases.append(phase)
        self.head.bottleneck.resize(phase.width, phase.order)
        # A frozen head is the one that is used later: batch norm takes its running statistics.
        self.head.train(not phase.frozen)

    @torch.no_grad()
    def _rotate(self) -> None:
        """Turn the bottleneck into the principal components of what is sent, and tell the server."""
        encoder = self.head.bottleneck
        assert isinstance(encoder, LinearEncoder)
        encoder.resize(self.start_width)
        self.head.eval()
        count = min(self.recipe.bottleneck.principal_pictures, len(self.data.train))
        part = Part(self.data.train.pictures[:count], self.data.train.labels[:count])
        sent = [torch.from_numpy(batch) for batch, _ in sent_batches(self.head, part, self.recipe)]
        components, mean = principal_components(torch.cat(sent))
        encoder.rotate(components, mean)
        self.remote.send_basis(np.concatenate([components.numpy(), mean.numpy()[None]]))

    def _judge(self, part: Part, subset: pb.Subset) -> pb.Verdict:
        self.head.eval()
        self.head.bottleneck.resize(self.phase.width)
        verdict = self.remote.evaluate(
            sent_batches(self.head, part, self.recipe), len(part), subset, self.phase, self.data.classes
        )
        self.head.train(not self.phase.frozen)
        return verdict

    def _validate(self, live: Live) -> bool:
        """Judge the validation part; whether the schedule ends here."""
        verdict = self._judge(self.data.validation, pb.VALIDATION)
        live.say(f"step {self.step}: validation loss {verdict.loss:.4f}, accuracy {verdict.accuracy:.2%}")
        if verdict.HasField("next"):
            self._switch(phase_of(verdict.next))
        return verdict.finished

    def finish(self, publish: bool) -> dict[str, Any]:
        """Judge the test part, say goodbye, keep the head; the summary."""
        verdict = self._judge(self.data.test, pb.TEST)
        samples = self.step * self.batch
        manifest = Manifest(self.opened.run_id, self.recipe.digest(), self.data.classes, self.phase, True)
        # The head is safe before the server is told that all is done.
        self.folder.write_half("head", self.head, manifest)
        self.remote.leave(self.step, self.phase, weights.to_bytes(self.head) if publish else b"")
        outcome = report.Outcome(
            self.opened.run_id, verdict.accuracy, verdict.loss, self.step, samples,
            round(self.step / (len(self.data.train) // self.batch), 4), time.monotonic() - self.started, self.busy_s,
            tuple(self.phases),
        )  # fmt: skip
        kernel = report.kernel_of(device=self.remote.kernel.read())
        summary = report.summarise(self.recipe, self.cut, outcome, self.remote.meter, kernel, "device")
        self.folder.write_summary(summary)
        return summary


def sent_batches(head: Head, part: Part, recipe: Recipe) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the head in its present mode sends for a part's pictures, unaugmented: ([B, width, ...], labels [B])."""
    size = recipe.data.evaluation_batch
    for start in range(0, len(part), size):
        inputs = batches.normalise(part.pictures[start : start + size], recipe.data.mean, recipe.data.std)
        with torch.no_grad(), optim.arithmetic(recipe.precision):
            sent = head(torch.from_numpy(inputs)).numpy()
        yield sent, part.labels[start : start + size]


def train(
    remote: RemoteTail, data: Dataset, folder: RunFolder, console: Console, allowed: tuple[str, ...],
    init: RunFolder | None, publish: bool,
) -> dict[str, Any]:  # fmt: skip
    """A whole run over an opened session; the summary. An interruption by the user is told to the server."""
    trainer = Trainer(remote, data, folder, console)
    trainer.prepare(allowed, init)
    folder.start(remote.opened.text)
    try:
        trainer.fit()
        return trainer.finish(publish)
    except KeyboardInterrupt:
        remote.interrupt("its user pressed Ctrl-C")
        console.print(f"Stopped at step {trainer.step}; the server has been told, and the run is not finished.")
        raise
    except LinkError as error:
        raise LinkError(f"{error}; the run stopped at step {trainer.step} and is not finished") from error
