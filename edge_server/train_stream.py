"""One Train stream: Begin to Leave, or until it breaks. Unpack, have the training learn, pack; the run outlives it.

Called by the servicer. A step is applied and its answer kept before any of it is sent, so that a stream which breaks at
any moment leaves the run at a whole step.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence

import numpy as np
from rich.markup import escape

from common import weights, wire
from common.chooser import Chooser
from common.codecs import codec
from common.errors import BusyError, FrameError, RunFolderError, StoppedError, TooLargeError, printable
from common.meter import DOWN, UP, Draft
from common.metrics import metrics_line
from common.phase_message import phase_message
from common.progress import StepProgress, note, warn
from common.rpc import split_pb2 as pb
from common.schedule import RECALL, Phase, never_warm, steps_per_epoch
from common.wire import Place
from common.words import several
from edge_server.coordinator import Decision
from edge_server.host import Host
from edge_server.incoming import STOPPED, Incoming
from edge_server.live import LiveRun

_ROOM_S = 10.0  # after which a device asks again to be done, where the disk has no room for what was trained


class TrainStream:
    def __init__(self, host: Host, run: LiveRun, receive: Incoming) -> None:
        """`run` has been begun or taken up by the device that sends what `receive` gives."""
        assert run.training
        self.host, self.run, self.training, self.receive = host, run, run.training, receive
        receive.draft = Draft(run.meter)  # the run's books, not those of the visit before it was begun

    def frames(self, begun: bool) -> Generator[pb.Frame, None, None]:
        """What is sent down, from Ready to the end; not `begun`: the run goes on where an older stream ended."""
        receive, training, meter = self.receive, self.training, self.run.meter
        answers = training.answered_from(receive.begin.step)
        wants_basis = training.recipe.principal and not training.rotated
        first = self._ready(answers, wants_basis)
        meter.frame(UP, receive.first, again=not begun)
        for out in first:
            meter.frame(DOWN, out, again=not begun)
        if begun:  # a device that has heard Ready must find the run again
            self._keep()
        self._tell_begin(begun)
        with StepProgress(self.run.console, training.coordinator.steps, training.step) as live:
            yield from first
            for answer in answers:
                for out in answer:
                    yield meter.frame(DOWN, out, again=True)
            if wants_basis:
                training.rotate(self._basis())
                receive.draft.keep()
            if training.step == 0:
                training.coordinator.book(meter)
                if wants_basis:
                    self._keep(anew=True)
                meter.lap()
            yield from self._steps(live)

    def _ready(self, answers: Sequence[Sequence[pb.Frame]], wants_basis: bool) -> list[pb.Frame]:
        """Ready, and what it says follows. `answers`: those that the device has missed, which are sent next."""
        training = self.training
        sensitivity = self._sensitivity() if wants_basis else []
        ready = pb.Ready(
            basis_wanted=wants_basis, phase=phase_message(training.phase), answered=len(answers),
            sensitivity_follows=bool(sensitivity), from_request=len(answers) == len(training.answers) > 0,
            run_id=self.run.run_id,
        )  # fmt: skip
        return [wire.seal(Place(pb.CONTROL, 0, 0).frame(ready=ready)), *sensitivity]

    def _tell_begin(self, begun: bool) -> None:
        """A line for the operator: who trains what, or that the device is back."""
        training, begin = self.training, self.receive.begin
        what = f"The device is connected again, at step {begin.step:,}."
        if begun:
            who, planned = escape(self.receive.session.identity) or "A device", training.recipe.schedule
            ends = {"its plateau": planned.kind == "plateau", "its budget": planned.budget_mb > 0}
            sooner = " or ".join(name for name, given in ends.items() if given)
            most, may = ("up to ", f"; {sooner} may end it sooner") if sooner else ("", "")
            what = (
                f"{who} trains [bold]{escape(training.recipe.name)}[/bold]: "
                f"{most}{several(training.coordinator.steps, 'step')} of {several(training.batch, 'picture')}, "
                f"{training.samples:,} pictures an epoch{may}."
            )
        self.run.console.print(what, highlight=False)
        if begun:
            for sentence in never_warm(training.recipe, steps_per_epoch(training.samples, training.batch)):
                note(self.run.console, f"{sentence}.")

    def _steps(self, live: StepProgress) -> Iterator[pb.Frame]:
        """Answer what the device asks for, one thing after the other, until it leaves."""
        chooser = Chooser(self.run.kernel.flow)
        while True:
            frame = self.receive()
            self.run.checkpoints.confirm(frame.kept)
            if frame.HasField("leave") and not frame.leave.finished:
                self._pause(frame.leave)
                return
            if frame.HasField("leave") or (frame.role == pb.WEIGHTS and self.training.test):
                yield from self._finish(frame)
                return
            if frame.HasField("recall"):
                yield from self._recall(frame, live)
            else:
                yield from self._step(frame, chooser, live)

    def _sensitivity(self) -> list[pb.Frame]:
        """The sensitivity, where components are to be weighted by it and the run that this one starts from had one.

        A device whose head learnt alone has a newer one of its own.
        """
        sensitivity, recipe = self.training.halves.tail.sensitivity, self.training.recipe
        if not recipe.weighted or recipe.local.epochs or not sensitivity.any():
            return []
        return list(wire.pack_raw(Place(pb.WEIGHTS, 0, 0), sensitivity.cpu().numpy()))

    def _basis(self) -> np.ndarray:
        """What the device sends [w + 1, w]: its principal components as rows, then the mean."""
        receive, training = self.receive, self.training
        frame, place = receive(), Place(pb.WEIGHTS, 0, 0)
        shape = wire.announced(frame)
        if len(shape) != 2 or shape[0] != shape[1] + 1 or not 1 <= shape[1] <= training.halves.channels:
            raise FrameError(
                f"the basis has shape {list(shape)}; [w + 1, w] with w up to {training.halves.channels} fits"
            )
        return wire.unpack(frame, receive, place, shape, "fp32")

    def _step(self, frame: pb.Frame, chooser: Chooser, live: StepProgress) -> Iterator[pb.Frame]:
        """One step: labels and activation in, gradient and StepDone out."""
        run, receive, training = self.run, self.receive, self.training
        phase, step = training.phase, training.step
        self._check_step()
        if phase.kind == RECALL:
            raise FrameError(f"step {step} is learnt from what the server has kept; Recall was expected")
        clock = time.perf_counter
        started, waited = clock(), receive.wait_s  # until now: for the step's first frame
        labels, payload = self._received(frame)
        sent = codec(phase.activation_codec).decode(payload, training.sent_shape)
        decoded = clock()
        wait, receive.wait_s = receive.wait_s, 0.0
        frames: list[pb.Frame] = []
        with training.applying():
            if training.store:  # first: a tail may work in place on what was decoded, which may be the payload
                training.store_step(payload, labels)
            gradient, loss, correct = training.learn(sent, labels)
            encoded = learnt = clock()
            if gradient is not None:
                aside = training.halves.gate.aside(training.recipe.seed, step, sent, phase)
                name = phase.gradient_codec
                answer = chooser.encode(codec(name), gradient, aside)
                frames = list(wire.pack(Place(pb.GRADIENT, step, phase.index), answer, gradient.shape, name))
                encoded = clock()
            # From here on the step is applied, whatever becomes of the stream. Its answer is kept until the device asks
            # for another step, and so shows that it has the answer.
            decision = training.apply()
            frames.append(self._done(step, phase, loss, correct, decision))
            training.answers, training.recalled = [frames], False
            receive.draft.keep()
            for out in frames:
                run.meter.frame(DOWN, out)
            seconds = {
                "wait": wait, "decode": decoded - started - (wait - waited),
                "tail": learnt - decoded + clock() - encoded, "encode": encoded - learnt,
            }  # fmt: skip
            self._log(phase, loss, correct, seconds, live)
            # Now, and not when it is written: as soon as the device has its answer it may ask for an evaluation, which
            # changes what the tail is like.
            snapshot = run.snapshot_after(decision)
        try:
            yield from frames
        finally:  # also where the stream has ended meanwhile
            if snapshot:
                run.write(snapshot)

    def _received(self, first: pb.Frame) -> tuple[np.ndarray, bytearray]:
        """The labels of a step, which start with frame `first`, and the activation's payload."""
        receive, training = self.receive, self.training
        step, phase, classes = training.step, training.phase, training.recipe.model.classes
        labels = wire.unpack_labels(first, receive, Place(pb.LABEL, step, phase.index), training.batch, classes)
        place = Place(pb.ACTIVATION, step, phase.index)
        return labels, wire.payload_of(receive(), receive, place, training.sent_shape, phase.activation_codec)

    def _keep(self, anew: bool = False) -> None:
        with self.training.lock:
            self.run.keep(anew=anew)

    def _check_step(self) -> None:
        training = self.training
        if training.step >= training.coordinator.steps:
            steps = several(training.coordinator.steps, "step")
            raise FrameError(f"the run has {steps} and all are done; Leave was expected")

    def _recall(self, frame: pb.Frame, live: StepProgress) -> Iterator[pb.Frame]:
        """Steps on what was kept: a StepDone each, until so many are done or something else comes next."""
        run, training = self.run, self.training
        self._check_step()
        wire.check_place(frame, Place(pb.CONTROL, training.step, training.phase.index))
        if training.phase.kind != RECALL or not frame.recall.steps:
            raise FrameError(f"Recall of {frame.recall.steps} steps came in a phase of kind {training.phase.kind}")
        if frame.recall.steps > self.host.limits.recall:
            raise TooLargeError(
                f"Recall of {frame.recall.steps:,} steps came; the server makes {self.host.limits.recall:,} at once"
            )
        clock, phase = time.perf_counter, training.phase
        training.answers, training.recalled = [], True
        for _ in range(frame.recall.steps):
            if self.host.stopping:
                raise StoppedError(STOPPED)
            step, started = training.step, clock()
            with training.applying():
                sent, labels = training.recall()
                decoded = clock()
                _, loss, correct = training.learn(sent, labels)
                decision = training.apply()
                done = self._done(step, phase, loss, correct, decision)
                if not training.answers:  # the first answer tells the device that its request had come: both book it
                    self.receive.draft.keep()
                training.answers.append([done])
                run.meter.frame(DOWN, done)
                seconds = {"decode": decoded - started, "tail": clock() - decoded}
                self._log(phase, loss, correct, seconds, live)
                snapshot = run.snapshot_after(decision)
            try:
                yield done
            finally:
                if snapshot:
                    run.write(snapshot)
            if decision.phase or decision.then != pb.STEP:
                return

    def _done(self, step: int, phase: Phase, loss: float, correct: int, decision: Decision) -> pb.Frame:
        done = pb.StepDone(loss=loss, correct=correct, then=decision.then)
        if decision.phase:
            done.next.CopyFrom(phase_message(decision.phase))
        done.kept = self.run.checkpoints.news(step, self.run.every)
        return wire.seal(Place(pb.CONTROL, step, phase.index).frame(done=done))

    def _log(self, phase: Phase, loss: float, correct: int, seconds: dict[str, float], live: StepProgress) -> None:
        """The line of the step that was just applied, in metrics.jsonl and on the operator's screen."""
        run, training = self.run, self.training
        accuracy, width = correct / training.batch, phase.width_at(training.recipe.seed, training.step - 1)
        training.busy_s += sum(value for name, value in seconds.items() if name != "wait")
        training.coordinator.book(run.meter, phase, training.step - 1)
        line = metrics_line(training.step - 1, phase, width, loss, accuracy, run.meter.lap(), seconds)
        if warning := run.folder.log(line):
            warn(run.console, warning)
        crossed = run.meter.total(UP).message, run.meter.total(DOWN).message
        live.plan(training.coordinator.steps)
        training.mean.add(loss, accuracy)
        live.step(training.step, training.mean, phase.widths, crossed, frozen=phase.frozen)

    def _pause(self, leave: pb.Leave) -> None:
        """The device's user has stopped it; both sides keep where they stand, and the run waits."""
        self.run.pause()
        training, reason = self.training, escape(printable(leave.reason, 200)) or "its user stopped it"
        self.run.console.print(
            f"The device left at step {training.step} of {training.coordinator.steps}: {reason}. The run goes on when "
            f"it is started again.", highlight=False,
        )  # fmt: skip

    def _finish(self, frame: pb.Frame) -> Iterator[pb.Frame]:
        """The published head, if `frame` starts one, and the end of the run."""
        receive, training, head = self.receive, self.training, b""
        if not frame.HasField("leave"):
            size = wire.announced_first(frame)
            most = weights.room(training.halves.head)
            if size > most:
                raise TooLargeError(f"a head of {size:,} bytes came; one of this model takes up to {most:,}")
            head = wire.unpack_bytes(frame, receive, Place(pb.WEIGHTS, training.step, training.phase.index), size)
            if not receive().HasField("leave"):
                raise FrameError("after the published head Leave was expected")
        if training.test is None:
            raise FrameError("Leave says finished, but the run is not; evaluate the test part first")
        before = self.run.meter.state()
        receive.draft.keep()
        goodbye = wire.seal(Place(pb.CONTROL, training.step, training.phase.index).frame(goodbye=pb.Goodbye()))
        self.run.meter.frame(DOWN, goodbye)
        try:
            with training.lock:  # so that a stop waits for it
                self.host.finish(head)
        except RunFolderError as error:
            self.run.meter.restore(before)
            raise BusyError(
                f"the server cannot keep the trained network ({error}); it tries again until it can", _ROOM_S
            ) from error
        yield goodbye
        if receive.drained():
            self.host.ended.set()
