"""The RPC methods: unpack, delegate to host and session, pack. Every error of ours leaves here as a gRPC status."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
from rich.markup import escape

from common import wire
from common.chooser import Chooser
from common.codecs import Aside, codec
from common.errors import DepruneError, FrameError, StoppedError, TooLargeError, VersionError, abort
from common.meter import DOWN, UP
from common.progress import Live
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from common.schedule import KINDS, RECALL, STORE, Phase
from common.wire import Place
from edge_server.coordinator import Decision
from edge_server.host import Host, Session
from edge_server.identity import Guard
from edge_server.session import Judgement, Training, judge, logits_of


def _unary(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(self: Servicer, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except Exception as error:  # noqa: BLE001 -- the last stop before gRPC, which would only print it
            return self.fail(context, error)

    return guarded


def _streaming(method: Callable[..., Iterator[pb.Frame]]) -> Callable[..., Iterator[pb.Frame]]:
    @functools.wraps(method)
    def guarded(self: Servicer, request: Any, context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        try:
            yield from method(self, request, context)
        except grpc.RpcError:
            return  # the device is gone; there is no one to tell, and the host has been told by the method
        except Exception as error:  # noqa: BLE001 -- as above
            self.fail(context, error)

    return guarded


class Incoming:
    """The frames that a device sends on one stream, counted; `wait_s` adds up the time spent waiting for them."""

    def __init__(self, frames: Iterator[pb.Frame], host: Host, peer: str, identity: str) -> None:
        self._frames, self._host = frames, host
        self.wait_s = 0.0
        first = next(frames, None)
        if first is None or not first.HasField("begin"):
            raise FrameError("a stream starts with Begin")
        self.begin = first.begin
        self.session: Session = host.session(first.begin.session, identity)
        self.session.seen(peer)
        self.session.meter.frame(UP, first)

    def __call__(self) -> pb.Frame:
        started = time.perf_counter()
        frame = next(self._frames, None)
        self.wait_s += time.perf_counter() - started
        if frame is None:
            raise StoppedError("the device closed the stream without a Leave")
        if self._host.stopping and not frame.HasField("leave"):
            raise StoppedError("the server was stopped by its operator; the run is not finished")
        return self.session.meter.frame(UP, frame)


def phase_message(phase: Phase) -> pb.Phase:
    return pb.Phase(
        index=phase.index, from_step=phase.from_step, width=phase.width, activation_codec=phase.activation_codec,
        gradient_codec=phase.gradient_codec, order=phase.order, kind=pb.Kind.Name(KINDS.index(phase.kind)), lr=phase.lr,
        decay_from=phase.decay_from, decay_until=phase.decay_until, nested=phase.nested,
    )  # fmt: skip


class Servicer(split_pb2_grpc.SplitServicer):
    def __init__(self, host: Host, guard: Guard | None = None) -> None:
        self.host = host
        self._identity = (guard or Guard()).identity

    def fail(self, context: grpc.ServicerContext, error: Exception) -> None:
        """End the RPC: an error of ours with its own sentence, a fault with a traceback for the operator alone."""
        if isinstance(error, DepruneError):
            self.host.console.print(f"[yellow]Refused[/yellow]: {escape(str(error))}", highlight=False)
            abort(context, error)
        self.host.console.print("".join(traceback.format_exception(error)), markup=False)
        context.abort(grpc.StatusCode.INTERNAL, "the server met a fault of its own; its log has the details")

    @_unary
    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
        identity = self._identity(context)
        if request.protocol_version != wire.PROTOCOL_VERSION:
            raise VersionError(
                f"the device speaks protocol version {request.protocol_version}, this server {wire.PROTOCOL_VERSION}; "
                f"install the same release of deprune on both"
            )
        if request.purpose not in (pb.TRAIN, pb.USE):
            raise FrameError(f"Open has purpose {request.purpose}; TRAIN (1) or USE (2) was expected")
        host, trains = self.host, request.purpose == pb.TRAIN
        session = host.open(trains, request.run_id, identity)
        session.seen(context.peer())
        reply = pb.OpenReply(
            protocol_version=wire.PROTOCOL_VERSION,
            session=session.name,
            recipe=host.text,
            digest=host.recipe.digest(),
            run_id=host.run_id,
            phase=phase_message(host.served.manifest.phase) if host.served else None,
            limits=pb.Limits(max_frame_bytes=wire.FRAME_BYTES, max_tensor_elements=wire.MAX_TENSOR_ELEMENTS),
            head_size=len(host.head_weights(session)) if trains or not request.run_id else 0,
            init_run_id=host.initial.run_id if trains else "",
            classes=host.served.manifest.classes if host.served else (),
        )
        session.meter.control(UP, request)
        session.meter.control(DOWN, reply)
        return reply

    @_streaming
    def Head(self, request: pb.HeadRequest, context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        session = self.host.session(request.session, self._identity(context))
        session.meter.control(UP, request)
        for frame in wire.pack_bytes(Place(pb.WEIGHTS, 0, 0), self.host.head_weights(session)):
            yield session.meter.frame(DOWN, frame)

    @_streaming
    def Train(self, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        receive = Incoming(frames, self.host, context.peer(), self._identity(context))
        session, begin = receive.session, receive.begin
        host, interrupted = self.host, ""
        try:
            training = host.begin(session, begin.samples, tuple(begin.classes))
        except DepruneError:
            host.leave(session)
            raise
        session.streams += 1
        chooser = Chooser(session.kernel.flow)
        host.console.print(
            f"{escape(session.identity) or 'A device'} trains [bold]{host.recipe.name}[/bold]: "
            f"{training.coordinator.steps:,} steps of {training.batch} pictures, "
            f"{begin.samples:,} pictures an epoch.", highlight=False,
        )  # fmt: skip
        try:
            with Live(host.console, training.coordinator.steps) as live:
                wanted = host.recipe.principal
                phase = phase_message(training.phase)
                ready = pb.Ready(steps=training.coordinator.steps, basis_wanted=wanted, phase=phase)
                yield session.meter.frame(DOWN, Place(pb.CONTROL, 0, 0).frame(ready=ready))
                if wanted:
                    training.rotate(self._basis(receive, training))
                session.meter.lap()
                while True:
                    frame = receive()
                    if frame.HasField("leave"):
                        interrupted = "" if frame.leave.finished else frame.leave.reason or "its user stopped it"
                        break
                    if frame.role == pb.WEIGHTS and training.test:
                        yield from self._finish(frame, receive, training)
                        return
                    if frame.HasField("recall"):
                        yield from self._recall(frame, receive, training, live)
                    else:
                        yield from self._step(frame, receive, training, chooser, live)
            if not interrupted:
                yield from self._finish(None, receive, training)
        finally:
            session.streams -= 1
            host.end(session, interrupted)

    def _basis(self, receive: Incoming, training: Training) -> np.ndarray:
        frame, place = receive(), Place(pb.WEIGHTS, 0, 0)
        shape = wire.announced(frame)
        if len(shape) != 2 or shape[0] != shape[1] + 1 or not 1 <= shape[1] <= training.halves.channels:
            raise FrameError(
                f"the basis has shape {list(shape)}; [w + 1, w] with w up to {training.halves.channels} fits"
            )
        return wire.unpack(frame, receive, place, shape, "fp32")

    def _step(
        self, frame: pb.Frame, receive: Incoming, training: Training, chooser: Chooser, live: Live
    ) -> Iterator[pb.Frame]:
        """One step: labels and activation in, gradient and StepDone out."""
        session, phase, step = receive.session, training.phase, training.step
        self._check_step(training)
        if phase.kind == RECALL:
            raise FrameError(f"step {step} is learnt from what the server has kept; Recall was expected")
        clock = time.perf_counter
        first_wait, receive.wait_s, started = receive.wait_s, 0.0, clock()
        labels = wire.unpack_labels(
            frame, receive, Place(pb.LABEL, step, phase.index), training.batch, training.recipe.model.classes
        )
        place, shape = Place(pb.ACTIVATION, step, phase.index), training.sent_shape
        payload = wire.payload_of(receive(), receive, place, shape, phase.activation_codec)
        sent = codec(phase.activation_codec).decode(payload, shape)
        decoded = clock()
        with training.lock:
            if phase.kind == STORE:
                training.keep(payload, labels)
            gradient, loss, correct = training.learn(sent, labels)
            encoded = learnt = clock()
            if gradient is not None:
                aside = Aside((training.recipe.seed, step, pb.GRADIENT), training.halves.gate.support(sent, phase))
                name = phase.gradient_codec
                answer = chooser.encode(codec(name), gradient, aside)
                for out in wire.pack(Place(pb.GRADIENT, step, phase.index), answer, gradient.shape, name):
                    yield session.meter.frame(DOWN, out)
                encoded = clock()
            # The gradient is on its way: the weights move while the device runs its own backward pass.
            decision = training.apply()
        applied = clock()
        yield self._done(session, step, phase, loss, correct, decision)
        wait, receive.wait_s = receive.wait_s, 0.0
        seconds = {
            "wait": first_wait + wait, "decode": decoded - started - wait, "tail": learnt - decoded + applied - encoded,
            "encode": encoded - learnt,
        }  # fmt: skip
        self._log(session, training, phase, loss, correct, seconds, live)

    @staticmethod
    def _check_step(training: Training) -> None:
        if training.step >= training.coordinator.steps:
            raise FrameError(f"the run has {training.coordinator.steps} steps and all are done; Leave was expected")

    def _recall(self, frame: pb.Frame, receive: Incoming, training: Training, live: Live) -> Iterator[pb.Frame]:
        """Steps on what was kept: a StepDone each, until so many are done or something else comes next."""
        self._check_step(training)
        wire.check_place(frame, Place(pb.CONTROL, training.step, training.phase.index))
        if training.phase.kind != RECALL or not frame.recall.steps:
            raise FrameError(f"Recall of {frame.recall.steps} steps came in a phase of kind {training.phase.kind}")
        clock, session, phase = time.perf_counter, receive.session, training.phase
        for _ in range(frame.recall.steps):
            if self.host.stopping:
                raise StoppedError("the server was stopped by its operator; the run is not finished")
            step, started = training.step, clock()
            with training.lock:
                sent, labels = training.recall()
                decoded = clock()
                _, loss, correct = training.learn(sent, labels)
                decision = training.apply()
            seconds = {"decode": decoded - started, "tail": clock() - decoded}
            yield self._done(session, step, phase, loss, correct, decision)
            self._log(session, training, phase, loss, correct, seconds, live)
            if decision.phase or decision.then != pb.STEP:
                return

    @staticmethod
    def _done(session: Session, step: int, phase: Phase, loss: float, correct: int, decision: Decision) -> pb.Frame:
        done = pb.StepDone(loss=loss, correct=correct, then=decision.then)
        if decision.phase:
            done.next.CopyFrom(phase_message(decision.phase))
        return session.meter.frame(DOWN, Place(pb.CONTROL, step, phase.index).frame(done=done))

    def _log(
        self, session: Session, training: Training, phase: Phase, loss: float, correct: int,
        seconds: dict[str, float], live: Live,
    ) -> None:  # fmt: skip
        """The line of the step that was just applied, in metrics.jsonl and on the operator's screen."""
        accuracy, width = correct / training.batch, phase.width_at(training.recipe.seed, training.step - 1)
        training.busy_s += sum(value for name, value in seconds.items() if name != "wait")
        line = {
            "step": training.step - 1, "phase": phase.index, "width": width, "loss": loss,
            "accuracy": accuracy, "bytes": session.meter.lap(),
            "seconds": {name: round(value, 6) for name, value in seconds.items()},
        }  # fmt: skip
        warning = self.host.folder.metrics.append(line) if self.host.folder.metrics else None
        if warning:
            live.say(f"[yellow]Warning[/yellow]: {warning}")
        up, down = session.meter.total(UP).message, session.meter.total(DOWN).message
        live.step(training.step, width, loss, accuracy, up, down)

    def _finish(self, frame: pb.Frame | None, receive: Incoming, training: Training) -> Iterator[pb.Frame]:
        """The published head, if `frame` starts one, and the end of the run."""
        head = b""
        if frame:
            size = wire.announced(frame)[0] if wire.announced(frame) else 0
            head = wire.unpack_bytes(frame, receive, Place(pb.WEIGHTS, training.step, training.phase.index), size)
            if not receive().HasField("leave"):
                raise FrameError("after the published head Leave was expected")
        if training.test is None:
            raise FrameError("Leave says finished, but the run is not; evaluate the test part first")
        goodbye = Place(pb.CONTROL, training.step, training.phase.index).frame(goodbye=pb.Goodbye())
        receive.session.meter.frame(DOWN, goodbye)
        self.host.finish(receive.session, head)
        yield goodbye

    @_streaming
    def Evaluate(self, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        receive = Incoming(frames, self.host, context.peer(), self._identity(context))
        session, training, served = receive.session, receive.session.training, self.host.served
        subset = receive.begin.subset
        if training:
            halves, phase = training.halves, training.phase
        elif served:
            halves, phase = served.halves, served.manifest.phase
            self._check_classes(tuple(receive.begin.classes))
        else:
            raise FrameError("Evaluate needs a training session, or a server with a finished run")
        width = receive.begin.width or phase.width
        if width not in phase.widths:
            raise FrameError(
                f"width {width} was asked for; this network serves {', '.join(map(str, sorted(phase.widths)))}"
            )
        session.streams += 1
        total, number, recipe = Judgement(), 0, self.host.recipe
        try:
            if training:
                training.lock.acquire()
                halves.tail.eval()
            while not (frame := receive()).HasField("leave"):
                labels = None
                place = Place(pb.EVALUATION, number, phase.index)
                if frame.part.tensor.dtype != "float32":
                    labels = wire.unpack_labels(frame, receive, place, None, recipe.model.classes)
                    frame = receive()
                count = (wire.announced(frame) or (0,))[0]
                if not 1 <= count <= recipe.data.evaluation_batch or (labels is not None and len(labels) != count):
                    raise TooLargeError(
                        f"an evaluation batch of {count} pictures came; 1 to {recipe.data.evaluation_batch} fit, "
                        f"as many as labels"
                    )
                shape = halves.sent_shape(count, width)
                sent = wire.unpack(frame, receive, place, shape, phase.activation_codec)
                if labels is None:
                    logits = logits_of(halves, sent, width, recipe.precision).numpy()
                    for out in wire.pack_raw(place, logits):
                        yield session.meter.frame(DOWN, out)
                else:
                    result = judge(halves, sent, labels, width, recipe.precision)
                    total += result
                    judged = pb.Judged(count=result.count, loss=result.loss, correct=result.correct)
                    yield session.meter.frame(DOWN, place.frame(judged=judged))
                number += 1
            verdict = pb.Verdict(count=total.count, loss=total.mean_loss, accuracy=total.accuracy)
            if training and subset in (pb.VALIDATION, pb.TEST):
                decision = training.judged(total, subset == pb.TEST)
                verdict.finished = decision.then == pb.FINISH
                if decision.phase:
                    verdict.next.CopyFrom(phase_message(decision.phase))
            yield session.meter.frame(DOWN, Place(pb.EVALUATION, number, phase.index).frame(verdict=verdict))
        finally:
            session.streams -= 1
            if training:
                halves.tail.train()
                training.lock.release()
            else:
                self.host.leave(session)

    def _check_classes(self, classes: tuple[str, ...]) -> None:
        assert self.host.served
        expected = self.host.served.manifest.classes
        if classes and classes != expected:
            odd = [f"{a} for {b}" for a, b in zip(classes, expected, strict=False) if a != b][:3]
            raise FrameError(
                f"the device's classes are not those of the run ({len(classes)} for {len(expected)}: "
                f"{', '.join(odd) or 'others'}); use data with the same class folders"
            )
