"""The head learns alone, before anything crosses: by the loss of a small classifier of the device's own, at the cut.

Decoupled greedy learning (Belilovsky et al., arXiv 1901.08164) of the one block that the device has. What the head
learns so costs no byte; how sensitive its classifier is to each direction at the cut then says which of them to send.
Called by the trainer before it begins the run; a process that dies meanwhile goes on from its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common import importance, optim, weights
from common.bottleneck import LinearEncoder
from common.checkpoint import Checkpoints, due, part, raw
from common.errors import DataError, DivergedError, MismatchError, ModelError, RunFolderError
from common.halves import MOST_WEIGHTED, reseed
from common.processor import fits
from common.progress import RunningMean, StepProgress, warn
from common.schedule import Phase, steps_of, steps_per_epoch
from common.words import several
from device_client.alone import Alone
from device_client.inputs import computing, training_batch

if TYPE_CHECKING:
    from device_client.trainer import Trainer

# Its batches are those of epochs that no run comes to: so none that crosses later is one that the head has seen before,
# in this order and augmentation.
_FIRST_EPOCH = 1 << 20
_BATCHES = 16  # over which the sensitivity is taken


class Local:
    """The stage before a run: `learn`, then `sensitivity` of what was learnt. The bottleneck stays as it was drawn."""

    def __init__(self, trainer: Trainer, anew: bool = False) -> None:
        """`anew`: what another start has left in the folder is replaced."""
        self.anew = anew
        self.trainer, self.recipe, self.head = trainer, trainer.recipe, trainer.head
        self._check()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            self.network = Alone(self.recipe, trainer.data.classes, self.head.layers, trainer.cut)
        self.classifier = self.network.classifier.to(trainer.processor)
        self.per_epoch = steps_per_epoch(len(trainer.data.train), trainer.batch)
        self.steps = max(1, steps_of(self.recipe.local.epochs, self.per_epoch))
        self.lr = self.recipe.local_lr
        # No phase of the run: the learning rate goes by one.
        self.course = Phase(
            index=0, from_step=0, width=trainer.channels, activation_codec="fp32", gradient_codec="fp32", lr=self.lr,
            decay_from=0, decay_until=self.steps,
        )  # fmt: skip
        self.optimiser = optim.build(
            self.recipe.optimiser, nn.ModuleList([self.head.layers, self.classifier]), nn.Module()
        )
        self.step, self.mean = 0, RunningMean()
        self.checkpoints = Checkpoints(trainer.folder.local, self._origin(), "")

    def _check(self) -> None:
        """Refuse now what the server would refuse after hours of learning, and what nothing can be learnt from."""
        data, classes = self.trainer.data, self.recipe.model.classes
        if len(data.classes) != classes:
            raise MismatchError(
                f"the pictures have {len(data.classes)} classes, the recipe {self.recipe.name} has {classes}; use "
                f"other data, or change model.classes on the server"
            )
        if self.trainer.batch < 2:
            raise DataError("one training picture is too few for [local], whose batch norm needs two or more")
        if not any(value.requires_grad for value in self.head.layers.parameters()):
            raise ModelError(
                f"before the cut {self.recipe.model.cut} there is nothing that could learn; cut later, or set "
                f"local.epochs to 0"
            )

    def learn(self) -> dict[str, Any]:
        """From where an earlier process was left, or from the start, to the end; what it came to, for the summary."""
        trainer, console = self.trainer, self.trainer.console
        self._take_up()
        if self.step < self.steps:
            going = f", going on at local step {self.step:,}" if self.step else ""
            alone = several(self.recipe.local.epochs, "epoch")
            console.print(f"The head learns alone for {alone} before anything crosses{going}.", highlight=False)
        else:
            console.print(f"What the head has learnt alone lies in {self.checkpoints.folder}.", markup=False)
        self.head.train(), self.classifier.train()
        with StepProgress(console, self.steps, self.step, "local step") as live:
            while self.step < self.steps:
                if trainer.stopping:
                    self.keep()
                    live.say(f"The head has learnt alone up to local step {self.step:,} of {self.steps:,}.")
                    raise KeyboardInterrupt
                started = time.perf_counter()
                loss, right = self._learn_step()
                trainer.busy_s += time.perf_counter() - started
                self.step += 1
                self.mean.add(loss, right / trainer.batch)
                live.step(self.step, self.mean)
                if due(self.step, trainer.opened.checkpoint_every, turn=self.step == self.steps):
                    self.keep()
        self.optimiser.zero_grad()
        self._write_alone()
        self.head.eval()
        accuracy = self.network.judge(trainer.data).accuracy  # what the device could do without a server
        return {"epochs": self.recipe.local.epochs, "steps": self.steps, "accuracy": accuracy}

    def _write_alone(self) -> None:
        """Keep what can be asked without a server, beyond the run's end; a full disk is told, and the run begins."""
        try:
            self.trainer.folder.write_alone(self.network)
        except RunFolderError as error:
            warn(self.trainer.console, f"what the head has learnt alone may not be kept beyond this run: {error}")

    def _learn_step(self) -> tuple[float, int]:
        """One step of layers and classifier: its loss, and how many answers were right."""
        what = f"local step {self.step}"
        reseed(self.recipe.seed, self.step, "head")
        loss, logits, truth = self._loss(self.step, what)
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss of {what} is not finite: the head's training has diverged; give a local.lr below {self.lr:g}"
            )
        self.optimiser.zero_grad()
        with fits(what, self.trainer.processor):
            loss.backward()
            self.optimiser.lr = optim.learning_rate(self.recipe.optimiser, self.step, self.course)
            self.optimiser.step()
        return loss.item(), int((logits.argmax(1) == truth).sum())

    def _loss(
        self, step: int, what: str, gradient_to: Callable[[Tensor], None] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, logits [B, classes] and labels [B] of a step; `gradient_to` is given the activation's gradient."""
        trainer, number = self.trainer, _FIRST_EPOCH * self.per_epoch + step
        inputs, labels = training_batch(self.recipe, trainer.data.train, number, trainer.batch)
        with computing(trainer.processor, self.recipe, what):
            activation = self.head.layers(inputs.to(trainer.processor))
            if gradient_to:
                activation.register_hook(gradient_to)
            logits = self.classifier(activation).float()
        truth = torch.from_numpy(labels).long().to(logits.device)
        return functional.cross_entropy(logits, truth), logits, truth

    def sensitivity(self) -> Tensor | None:
        """The loss's sensitivity to each direction that could be sent [C, C]; None for too many channels."""
        encoder, channels = self.head.bottleneck, self.trainer.channels
        if channels > MOST_WEIGHTED:
            return None
        assert isinstance(encoder, LinearEncoder)
        self.head.eval(), self.classifier.eval()
        total = torch.zeros(channels, channels, device=self.trainer.processor)

        def add(gradient: Tensor) -> None:
            total.add_(importance.sensitivity_of(gradient.float()))

        for step in range(_BATCHES):
            self._loss(step, "the sensitivity", add)[0].backward()
        self.optimiser.zero_grad()
        # What is sent is E x: dLoss/dSent is dLoss/dx seen through E's inverse.
        inverse = torch.linalg.pinv(encoder.weight.detach().cpu().double())
        return (inverse.T @ total.cpu().double() @ inverse).float()

    # Checkpoints, in a folder of their own: the run has not begun

    def keep(self) -> None:
        """Write a checkpoint; a full disk is told, and learning goes on."""
        if self.step in self.checkpoints.written:
            return
        tensors = self.network.state_dict()
        tensors |= {f"optimiser.{name}": value for name, value in optim.tensors_of(self.optimiser).items()}
        # Copied: a model's tied weights are one tensor under two names, which safetensors does not write.
        tensors = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        books = {"wall_s": self.trainer.elapsed_s, "busy_s": self.trainer.busy_s, "mean": asdict(self.mean)}
        try:
            self.checkpoints.write(self.step, tensors, books)
        except RunFolderError as error:
            warn(self.trainer.console, f"no checkpoint of local step {self.step}: {error}; learning goes on")

    def _take_up(self) -> None:
        """Go on from what lies in the folder; RunFolderError where that is of another start and would be lost."""
        good, warnings = self.checkpoints.sound()
        if warnings and not good and self.anew:
            self.checkpoints.clear()
            return
        if warnings and not good:
            raise RunFolderError(
                f"{self.checkpoints.folder} holds what a head has learnt alone from other pictures, weights or "
                f"settings, or cannot be read ({warnings[-1]}); give it those again, choose another --run, or pass "
                f"--overwrite"
            )
        for warning in warnings:
            warn(self.trainer.console, warning)
        if good:
            self._restore(good[-1])

    def _restore(self, step: int) -> None:
        kept, source = self.checkpoints.read(step), f"the checkpoint of local step {step}"
        weights.fill(self.head.layers, part(kept.tensors, "layers"), source)
        weights.fill(self.classifier, part(kept.tensors, "classifier"), source)
        optim.restore(self.optimiser, part(kept.tensors, "optimiser"), source)
        self.step, self.mean = step, RunningMean(**kept.state.get("mean", {}))
        self.trainer.wall_s, self.trainer.busy_s = kept.state["wall_s"], kept.state["busy_s"]

    def _origin(self) -> str:
        """A digest of all that decides what the head learns alone, which its checkpoints are named after. The rest of
        the recipe may change before the run begins."""
        recipe = self.recipe
        # Where its weights come from, which pictures are held out and how others are judged: the weights and pictures
        # themselves say, or nothing of it is learnt.
        beside = {"init": "", "validation": 0, "evaluation_batch": 0, "restart": False, "lr": self.lr}
        parts = (recipe.model, recipe.data, recipe.local, recipe.optimiser)
        settings = [{**asdict(one), **{key: beside[key] for key in asdict(one).keys() & beside}} for one in parts]
        told = json.dumps([*settings, recipe.seed, recipe.precision])
        digest = hashlib.sha256(f"{self.trainer.data_id} {told}".encode())
        for name, value in self.head.layers.state_dict().items():
            digest.update(name.encode())
            digest.update(raw(value))
        return digest.hexdigest()
