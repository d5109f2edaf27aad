"""The device's loop: batch, head, send, gradient, backward, next phase; reads straight down."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from rich.console import Console

from common import codecs, halves, optim, report, weights
from common.checkpoint import Checkpoint, Checkpoints, due
from common.codecs import NOTHING
from common.errors import DataError, LinkError, MismatchError, RolledBackError, RunFolderError
from common.inherit import adopt
from common.metrics import metrics_line
from common.phase_message import phase_of_message
from common.processor import fits
from common.progress import Counting, RunningMean, StepProgress, warn
from common.recipe import Recipe
from common.room import require_room
from common.rpc import split_pb2 as pb
from common.run import Manifest, RunFolder
from common.schedule import RECALL, Phase, steps_asked, steps_per_epoch
from common.words import duration
from device_client.basis import principal_basis
from device_client.data import Dataset, Part
from device_client.forecast import Forecast
from device_client.handshake import Opened
from device_client.inputs import computing, sent_batches, training_batch
from device_client.last_write import write_with_patience
from device_client.link import CURABLE
from device_client.local import Local
from device_client.outlook import Outlook
from device_client.remote_tail import FAREWELL_S, RemoteTail, StepResult
from device_client.state import fingerprint, restore, state_of

_ROLLBACKS = 5  # in a row that did not come further than the run had been


class Trainer:
    """One run on the device: `prepare` the head, `run` from the first step, or from a checkpoint, to the end."""

    def __init__(
        self, remote: RemoteTail, data: Dataset, folder: RunFolder, console: Console,
        processor: torch.device = halves.CPU,
    ) -> None:  # fmt: skip
        """`processor`: where the head computes."""
        self.remote, self.data, self.folder, self.console, self.processor = remote, data, folder, console, processor
        remote.say = self._say
        self.recipe: Recipe = self.opened.recipe
        self.phases: list[Phase] = []
        self.batch = min(self.recipe.data.batch, len(data.train))
        if not self.batch:
            raise DataError("the training part is empty; give more pictures or a smaller data.validation")
        # A run goes on with the pictures it began with.
        self.data_id, self.judged_id = fingerprint(data.train), fingerprint(data.validation, data.test)
        self.started = time.monotonic()
        self.wall_s = 0.0  # taken by the run before this process
        self.step, self.then = 0, pb.STEP
        self.basis: np.ndarray | None = None  # [w + 1, w], where the bottleneck starts from principal components
        self.local: dict[str, Any] | None = None  # what the head has learnt alone, for the summary
        # [C, C], what the head's own classifier says of the directions at the cut; needed until the basis is made.
        self.sensitivity: torch.Tensor | None = None
        self.busy_s = 0.0  # spent computing in training steps
        self.mean = RunningMean()  # as it is shown
        self.stopping = False  # set by whoever wants the run to rest after the present step
        self._patient_until = 0.0
        self.resting = False  # it has stopped between two steps, where a checkpoint can be kept
        self.checkpoints = Checkpoints(folder.checkpoints, self.opened.run_id, self.recipe.digest())
        remote.leaving, remote.kept = lambda: self.stopping, lambda: sorted(self.checkpoints.written)

    @property
    def opened(self) -> Opened:
        """What the newest handshake told: a server that came back may keep checkpoints at other steps."""
        return self.remote.opened

    @property
    def phase(self) -> Phase:
        return self.phases[-1]

    @property
    def begun(self) -> bool:
        """Whether the run has: from then on it has a first phase, and goes on by checkpoints."""
        return bool(self.phases)

    def prepare(self, allowed: tuple[str, ...], init: RunFolder | None) -> None:
        """Build the head and fill it: from where the run was left, or with its first weights."""
        codecs.load(*self.recipe.codecs, say=self.console.print)
        built = halves.build(self.recipe, allowed)
        self.cut, self.gate = built.cut, built.gate
        with fits("the head", self.processor):
            self.head = built.head.to(self.processor)
        self.channels = built.channels
        self.optimiser = optim.build(self.recipe.optimiser, self.head.layers, self.head.bottleneck)
        if self.opened.step is not None or self.opened.finished:
            self._take_up()
        elif self.opened.head_size:
            weights.take_over(self.head, self.remote.head_weights(), self.recipe.model.name)
        else:
            self._inherit(init)

    def _take_up(self) -> None:
        """Go on in this process with the run that lies in the folder."""
        self.checkpoints.sound()
        step = self.opened.step if self.opened.step is not None else max(self.checkpoints.written)
        kept = restore(self, step)
        if self.opened.finished and self.then != pb.FINISH:
            raise MismatchError(
                f"run {self.opened.run_id} is finished on the server, but this device's newest checkpoint is of step "
                f"{step}: the trained head is only to be had if it was published"
            )
        self.wall_s = kept.state["wall_s"]
        self.remote.take_up(kept.state["kernel"], kept.state["faults"])
        self._go_on_from(kept, new_process=True)

    def _go_on_from(self, kept: Checkpoint, new_process: bool) -> None:
        """Have folder, books and checkpoints end at the step of `kept`, where the head stands again."""
        lost = self.folder.resume(kept.step)
        self.remote.meter.restore(kept.state["meter"], lost if new_process else None)
        self.checkpoints.forget_after(kept.step)
        self.remote.faults.resumed += 1
        self.remote.faults.steps_again += lost["steps"]
        self.keep(anew=True)  # with what the fault cost: a second one before the next checkpoint must not forget it

    def _inherit(self, init: RunFolder | None) -> None:
        wanted = self.opened.init_run_id
        assert init  # else the command line would have refused
        source, manifest = init.head_of(wanted)
        trained = weights.read(init.path / "head.safetensors")
        adopt(self.head, trained, self.recipe, source, manifest)

    def run(self, publish: bool, anew: bool = False) -> dict[str, Any]:
        """All that is left of the run; the summary. `anew` as in learn_alone()."""
        if self.recipe.schedule.budget_mb and not self.begun:
            # The server looks too, but only when the run begins: after hours in which the head has learnt alone.
            weighs = self.opened.head_size + self._published(publish)
            sent = None if self.recipe.model.init else 0  # what an earlier run has chosen only the server knows
            require_room(self.recipe, self.cut, len(self.data.train), len(self.data.test), weighs, sent)
        self.learn_alone(anew)
        furthest, since, again = self.step, time.monotonic(), 0
        while True:
            try:
                self.fit(publish)
                return self.finish(publish)
            except RolledBackError as error:
                again += 1
                if self.step > furthest:
                    furthest, since, again = self.step, time.monotonic(), 0
                # Going back is no failure as long as the run then comes further than before; but a step that its server
                # dies of would be tried for ever. Time alone does not tell: steps that are made again take some too.
                elif (spent := time.monotonic() - since) > self.remote.give_up_s and again > _ROLLBACKS:
                    raise LinkError(f"step {furthest} was not passed in {duration(spent)}: {error}; gave up") from error
                self._say(f"Back to step {error.step} from step {self.step}: {error}.")
                self._go_on_from(restore(self, error.step), new_process=False)

    def learn_alone(self, anew: bool = False) -> None:
        """Let the head learn without the server, where the recipe says so and the run has not begun; `anew`: what it
        has learnt alone before from other pictures, weights or settings is replaced."""
        if self.begun or not self.recipe.local.epochs:
            return
        alone = Local(self, anew)
        self.local = alone.learn()
        if self.recipe.weighted:
            self.sensitivity = alone.sensitivity()
        self.console.print(
            f"The head has learnt alone; its own classifier is right on {self.local['accuracy']:.2%} of the test "
            f"pictures. Now the server takes over from it.", highlight=False,
        )  # fmt: skip
        if self.stopping:
            raise KeyboardInterrupt

    def fit(self, publish: bool) -> None:
        """Train from the present step to the last; `publish`: the head is to be, at the end."""
        self._begin(publish)
        with StepProgress(self.console, self.phase.steps, self.step) as live:
            self.remote.say = live.waiting
            try:
                self._loop(live)
            finally:
                self.remote.say = self._say

    def _begin(self, publish: bool) -> None:
        """Start the run's stream, and the run where it has not begun: its bottleneck, its first phase."""
        judged = len(self.data.validation), len(self.data.test)
        ready, told = self.remote.begin(
            len(self.data.train), self.data.classes, self.step, judged, self._published(publish), self.channels
        )
        if not self.begun:
            self.checkpoints.run_id = self.opened.run_id
            if ready.basis_wanted:
                weighted_by = self.sensitivity if told is None else torch.from_numpy(told.copy())
                self.basis = principal_basis(self.head, self.data.train, self.recipe, self.batch, weighted_by)
                self.sensitivity = None
                self.remote.send_basis(self.basis)
            self._switch(phase_of_message(ready.phase))
            self.keep()
            self.remote.meter.lap()

    def _published(self, publish: bool) -> int:
        """Bytes of the head that are given to the server at the end."""
        return len(weights.to_bytes(self.head)) if publish else 0

    def _loop(self, live: StepProgress) -> None:
        """Step after step."""
        parts = len(self.data.train), len(self.data.validation), len(self.data.test)
        forecast = Forecast(self.recipe, self.cut, self.batch, parts, self.remote.kernel.flow)
        outlook = Outlook(live, self.recipe, self.remote.meter, forecast, self.phase.steps)
        while not (self.stopping and self._may_rest()):
            if self.then == pb.FINISH:
                outlook.end(self.step)
                return
            if self.then == pb.VALIDATE:
                self._validate(live)
                continue
            phase = self.phase
            line = self._recall_step() if phase.kind == RECALL else self._train_step()
            outlook.after(line, self.mean, phase, self.phase)
        self.resting = True  # also before the test part, which may take long to send
        raise KeyboardInterrupt

    def _may_rest(self) -> bool:
        """Whether a run that is to stop does so now: the recalled steps that were asked for are taken in first, for a
        while, and both sides then stand at one step."""
        if self.phase.kind != RECALL or not self.remote.asked:
            return True
        self._patient_until = self._patient_until or time.monotonic() + FAREWELL_S
        return time.monotonic() > self._patient_until

    def _train_step(self) -> dict[str, Any]:
        """One step's round trip; the line for metrics.jsonl."""
        clock, step, phase = time.perf_counter, self.step, self.phase
        inputs, labels = training_batch(self.recipe, self.data.train, step, self.batch, phase)
        self.head.bottleneck.resize(phase.width_at(self.recipe.seed, step))
        halves.reseed(self.recipe.seed, step, "head")
        begun = clock()
        with self._put_back_unanswered():
            with torch.set_grad_enabled(not phase.frozen), computing(self.processor, self.recipe, f"step {step}"):
                activation = self.head(inputs)
                sent = activation.detach().cpu().numpy()
            forward = clock()
            aside = NOTHING if phase.frozen else self.gate.aside(self.recipe.seed, step, sent, phase)
            gradient, result, seconds = self.remote.learn(step, phase, sent, labels, aside, self._news())
        received = clock()
        # Here the server has applied the step; nothing of it was applied on this side until now.
        if gradient is not None:
            self._learn(activation, gradient)
        seconds["head"] = forward - begun + clock() - received
        return self._after(result, seconds)

    @contextlib.contextmanager
    def _put_back_unanswered(self) -> Iterator[None]:
        """Undo a step that is given up before its answer came, because the run is stopped or its server is gone.

        The forward pass has moved batch norm's statistics and the books by then. With these put back the head stands as
        before the step, and a checkpoint of that is kept.
        """
        buffers, books = [buffer.clone() for buffer in self.head.buffers()], self.remote.meter.state()
        try:
            yield
        except (KeyboardInterrupt, *CURABLE):
            for buffer, value in zip(self.head.buffers(), buffers, strict=True):
                buffer.copy_(value)
            self.remote.meter.restore(books)
            self.keep()
            raise

    def _news(self) -> int:
        """What the server is told of the device's checkpoints with the present step."""
        return self.checkpoints.news(self.step, self.opened.checkpoint_every)

    def _learn(self, activation: torch.Tensor, gradient: np.ndarray) -> None:
        """Backward through the head and one move of its weights."""
        self.optimiser.zero_grad()
        with fits(f"step {self.step}", self.processor):
            if activation.requires_grad:
                # Not activation.backward(gradient): torch loads sympy to compare the two shapes, a second and 36 MB.
                # The derivative of this sum is the gradient, bit for bit.
                (activation * torch.from_numpy(gradient).to(self.processor)).sum().backward()
            self.optimiser.lr = optim.learning_rate(self.recipe.optimiser, self.step, self.phase)
            self.optimiser.step()

    def _recall_step(self) -> dict[str, Any]:
        """One step that the server makes from what it has kept; the line for metrics.jsonl."""
        started = time.perf_counter()
        with self._put_back_unanswered():
            result = self.remote.recall(self.step, self.phase, self._news())
        return self._after(result, {"wait": time.perf_counter() - started})

    def _after(self, result: StepResult, seconds: dict[str, float]) -> dict[str, Any]:
        """Go on to the next step; the line for metrics.jsonl of the one that was."""
        step, phase = self.step, self.phase
        self.busy_s += sum(value for name, value in seconds.items() if name != "wait")
        self.step, self.then = step + 1, result.then
        if result.next:
            self._switch(result.next)
        width, accuracy = phase.width_at(self.recipe.seed, step), result.correct / self.batch
        self.mean.add(result.loss, accuracy)
        line = metrics_line(step, phase, width, result.loss, accuracy, self.remote.meter.lap(), seconds)
        # Logged before a checkpoint says that the step is done: a process that dies in between leaves no gap.
        if warning := self.folder.log(line):
            warn(self.console, warning)
        self.checkpoints.confirm(result.kept)
        if due(self.step, self.opened.checkpoint_every, turn=bool(result.next) or result.then != pb.STEP):
            self.keep()
        return line

    def rest(self) -> None:
        """The user stops the run between two steps: both sides keep where it stands."""
        if self.resting:
            self.keep()
            self.remote.interrupt(self.step, self.phase, "its user stopped it")

    def keep(self, anew: bool = False) -> None:
        """Write a checkpoint, `anew` also in place of one; a full disk is told, and the run goes on."""
        if self.step in self.checkpoints.written and not anew:
            return
        try:
            self.folder.sync()
            self.checkpoints.write(self.step, *state_of(self))
        except RunFolderError as error:
            warn(self.console, f"no checkpoint of step {self.step}: {error}; the run goes on")

    def _switch(self, phase: Phase) -> None:
        self.phases.append(phase)
        self.head.bottleneck.resize(phase.width, phase.order)
        # A frozen head is the one that is used later: batch norm takes its running statistics.
        self.head.train(not phase.frozen)

    def _judge(self, part: Part, subset: pb.Subset) -> pb.Verdict:
        """Have the server judge what the head, as it is now, makes of a part's pictures."""
        self.head.eval()
        self.head.bottleneck.resize(self.phase.width)
        with Counting(self.console, "Judged", "pictures") as progress:
            verdict = self.remote.evaluate(
                lambda: sent_batches(self.head, part, self.recipe), len(part), subset, self.phase, self.data.classes,
                self.step, progress,
            )  # fmt: skip
        self.head.train(not self.phase.frozen)
        return verdict

    def _say(self, text: str) -> None:
        """What is done in place of steps, where no bar shows it."""
        self.console.print(text, highlight=False, markup=False)

    def _validate(self, live: StepProgress) -> None:
        """Judge the validation part, and take in what that decides."""
        verdict = self._judge(self.data.validation, pb.VALIDATION)
        live.say(f"step {self.step}: validation loss {verdict.loss:.4f}, accuracy {verdict.accuracy:.2%}")
        if verdict.HasField("next"):
            self._switch(phase_of_message(verdict.next))
        self.then = pb.FINISH if verdict.finished else pb.STEP
        if verdict.finished:  # a device that is lost from now on does not ask again: its server may be done
            self.keep(anew=True)

    def finish(self, publish: bool) -> dict[str, Any]:
        """Judge the test part, say goodbye, keep the head; the summary."""
        verdict = self._judge(self.data.test, pb.TEST)
        manifest = Manifest(self.opened.run_id, self.recipe.digest(), self.data.classes, self.phase)
        # The head is safe before the server is told that all is done.
        write_with_patience(
            lambda: self.folder.write_half("head", self.head, manifest), lambda: len(weights.to_bytes(self.head)),
            self.remote.give_up_s, lambda: self.stopping, self.console,
        )  # fmt: skip
        self.remote.leave(self.step, self.phase, weights.to_bytes(self.head) if publish else b"")
        per_epoch = steps_per_epoch(len(self.data.train), self.batch)
        outcome = report.Outcome(
            run_id=self.opened.run_id, accuracy=verdict.accuracy, loss=verdict.loss, steps=self.step,
            samples=self.step * self.batch,
            epochs=round(self.step / per_epoch, 4), steps_asked=steps_asked(self.recipe.schedule, per_epoch),
            wall_s=self.elapsed_s, busy_s=self.busy_s, phases=tuple(self.phases), faults=self.remote.faults,
            local=self.local,
        )  # fmt: skip
        meter, kernel = self.remote.meter, self.remote.kernel.read()
        summary = report.summarise(self.recipe, self.cut, outcome, meter, kernel, "device")
        self.folder.write_summary(summary)
        self.folder.close()
        self.folder.forget_checkpoints()
        return summary

    @property
    def where(self) -> str:
        """Words for the step that it stands at; none before the run has begun."""
        return f" at step {self.step}" if self.begun else ""

    @property
    def elapsed_s(self) -> float:
        return self.wall_s + time.monotonic() - self.started
