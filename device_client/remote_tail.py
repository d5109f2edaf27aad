"""The tail as seen from the device: encode, send, receive, decode. The only module here that knows gRPC."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from common import channel, recipe, wire
from common.chooser import Chooser
from common.codecs import NOTHING, Aside, codec
from common.errors import CodecError, FrameError, LinkError, MismatchError, VersionError, from_rpc
from common.meter import DOWN, UP, Meter
from common.recipe import Recipe
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from common.schedule import KINDS, Phase
from common.tcp_info import Kernel, find_server
from common.wire import Place

# Batches of an evaluation that are on their way at once: hides the link's delay, bounds the memory.
_IN_FLIGHT = 3
# How long a user who pressed Ctrl-C waits at most until the server has been told.
_FAREWELL_S = 2.0


@dataclass(frozen=True)
class Opened:
    """What the handshake told."""

    session: str
    recipe: Recipe
    text: str
    run_id: str
    phase: Phase | None  # of the finished run; None in training
    head_size: int
    init_run_id: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class StepResult:
    """The server's answer to a step, beside the gradient."""

    loss: float
    correct: int
    next: Phase | None
    then: pb.Then


def phase_of(message: pb.Phase) -> Phase:
    for name in (message.activation_codec, message.gradient_codec):
        try:
            codec(name)
        except CodecError as error:
            raise VersionError(
                f"the server uses the codec {name!r}, unknown here: {error}; install the same release on both sides"
            ) from error
    if message.kind not in range(len(KINDS)):
        raise VersionError(
            f"the server announced a phase of kind {message.kind}, unknown here; install the same release on both sides"
        )
    return Phase(
        message.index, message.from_step, message.width, message.activation_codec, message.gradient_codec,
        message.lr, message.decay_from, message.decay_until, tuple(message.order), KINDS[message.kind],
        nested=tuple(message.nested),
    )  # fmt: skip


class Stream:
    """One bidirectional stream: counted frames out and in; `wait_s` adds up the time spent waiting for the server."""

    def __init__(self, call: Callable[[Iterator[pb.Frame]], Any], meter: Meter, server: str) -> None:
        self._meter, self._server = meter, server
        self._outgoing: queue.SimpleQueue[pb.Frame | None] = queue.SimpleQueue()
        self._incoming = call(iter(self._outgoing.get, None))
        self.wait_s = 0.0

    def send(self, frame: pb.Frame) -> None:
        self._outgoing.put(self._meter.frame(UP, frame))

    def receive(self) -> pb.Frame:
        started = time.perf_counter()
        try:
            frame = next(self._incoming)
        except StopIteration as error:
            raise LinkError(f"the server at {self._server} closed the stream early") from error
        except grpc.RpcError as error:
            raise from_rpc(error, self._server) from error
        finally:
            self.wait_s += time.perf_counter() - started
        return self._meter.frame(DOWN, frame)

    def close(self) -> None:
        """End our side; the server has said its last."""
        self._outgoing.put(None)

    def drain(self, timeout_s: float) -> None:
        """Wait until the server has ended its side, for then it has read all of ours; not longer than `timeout_s`."""
        ended = threading.Event()
        if self._incoming.add_callback(ended.set):
            ended.wait(timeout_s)


class RemoteTail:
    """A session with one server, from `open` to `close`; `stub` is given where no network lies in between."""

    def __init__(self, server: str, access: channel.Access | None = None, stub: Any = None) -> None:
        self.server = server
        self.meter = Meter()
        self.kernel = Kernel()
        self._chooser = Chooser(self.kernel.flow)
        self._channel = None if stub else channel.connect(server, access or channel.Access())
        self._stub = stub or split_pb2_grpc.SplitStub(self._channel)
        self._train: Stream | None = None
        self.opened: Opened

    def open(self, trains: bool, run_id: str = "", wait_s: float = 0.0) -> Opened:
        """Handshake; checks version and digest before anything is believed.

        `wait_s`: how long to keep trying while no server answers yet.
        """
        purpose = pb.TRAIN if trains else pb.USE
        request = pb.OpenRequest(protocol_version=wire.PROTOCOL_VERSION, purpose=purpose, run_id=run_id)
        try:
            reply = self._stub.Open(request, timeout=wait_s or channel.HANDSHAKE_S, wait_for_ready=wait_s > 0)
        except grpc.RpcError as error:
            raise from_rpc(error, self.server) from error
        if reply.protocol_version != wire.PROTOCOL_VERSION:
            raise VersionError(
                f"the server speaks protocol version {reply.protocol_version}, this device {wire.PROTOCOL_VERSION}; "
                f"install the same release of deprune on both"
            )
        self._find_connection()
        self.meter.control(UP, request)
        self.meter.control(DOWN, reply)
        parsed = recipe.parse(reply.recipe, f"the recipe from {self.server}")
        if parsed.digest() != reply.digest:
            raise MismatchError(
                "the recipe's digest is not the one that the server announced: the two sides read it differently; "
                "install the same release of deprune on both"
            )
        self.opened = Opened(
            reply.session, parsed, reply.recipe, reply.run_id,
            phase_of(reply.phase) if reply.HasField("phase") else None,
            reply.head_size, reply.init_run_id, tuple(reply.classes),
        )  # fmt: skip
        return self.opened

    def _find_connection(self) -> None:
        """Count the connection that we are on now: gRPC makes a new one where the last was lost between streams."""
        if self._channel:
            self.kernel.add(find_server(self.server))

    def head_weights(self) -> bytes:
        """safetensors bytes of the head, as the server hands them out."""
        request = pb.HeadRequest(session=self.opened.session)
        self.meter.control(UP, request)
        try:
            frames = iter(self._stub.Head(request))

            def receive() -> pb.Frame:
                return self.meter.frame(DOWN, next(frames))

            return wire.unpack_bytes(receive(), receive, Place(pb.WEIGHTS, 0, 0), self.opened.head_size)
        except grpc.RpcError as error:
            raise from_rpc(error, self.server) from error

    # Training

    def begin(self, samples: int, classes: tuple[str, ...]) -> tuple[int, bool, Phase]:
        """Start the training stream: steps of the run, whether the server waits for a basis, the first phase."""
        self._train = Stream(self._stub.Train, self.meter, self.server)
        begin = pb.Begin(session=self.opened.session, samples=samples, classes=classes)
        self._train.send(Place(pb.CONTROL, 0, 0).frame(begin=begin))
        ready = self._train.receive()
        if not ready.HasField("ready"):
            raise FrameError(f"Ready was expected, {ready.WhichOneof('body')} came")
        self._find_connection()
        return ready.ready.steps, ready.ready.basis_wanted, phase_of(ready.ready.phase)

    def send_basis(self, basis: np.ndarray) -> None:
        """Principal components as rows, then the mean: float32 [w + 1, w]."""
        for frame in wire.pack_raw(Place(pb.WEIGHTS, 0, 0), basis):
            self._stream.send(frame)

    @property
    def _stream(self) -> Stream:
        assert self._train is not None, "begin comes first"
        return self._train

    @property
    def wait_s(self) -> float:
        return self._stream.wait_s

    def send(self, step: int, phase: Phase, sent: np.ndarray, labels: np.ndarray) -> None:
        """Send one step: activation [B, width, ...] float32 and labels [B]."""
        for frame in wire.pack_labels(Place(pb.LABEL, step, phase.index), labels, self.opened.recipe.model.classes):
            self._stream.send(frame)
        for frame in self._pack(Place(pb.ACTIVATION, step, phase.index), sent, phase):
            self._stream.send(frame)

    def _pack(self, place: Place, sent: np.ndarray, phase: Phase) -> Iterator[pb.Frame]:
        """Frames of an activation [B, width, ...], in the phase's codec."""
        name = phase.activation_codec
        return wire.pack(place, self._chooser.encode(codec(name), sent, NOTHING), sent.shape, name)

    def recall(self, step: int, phase: Phase, steps: int) -> None:
        """Ask for `steps` steps on what the server has kept; each has its `result`."""
        self._stream.send(Place(pb.CONTROL, step, phase.index).frame(recall=pb.Recall(steps=steps)))

    def gradient(self, step: int, phase: Phase, shape: tuple[int, ...], support: np.ndarray | None) -> np.ndarray:
        """The gradient of the step that was sent, of the same shape; zero where `support` is false."""
        stream, place = self._stream, Place(pb.GRADIENT, step, phase.index)
        aside = Aside((self.opened.recipe.seed, step, pb.GRADIENT), support)
        return wire.unpack(stream.receive(), stream.receive, place, shape, phase.gradient_codec, aside)

    def result(self, step: int, phase: Phase) -> StepResult:
        """Loss of the step and what comes next; the server has applied it."""
        frame = self._stream.receive()
        wire.check_place(frame, Place(pb.CONTROL, step, phase.index))
        if not frame.HasField("done"):
            raise FrameError(f"StepDone was expected, {frame.WhichOneof('body')} came")
        done = frame.done
        following = phase_of(done.next) if done.HasField("next") else None
        if following and following.from_step != step + 1:
            raise FrameError(f"a phase from step {following.from_step} was announced at step {step}")
        return StepResult(done.loss, done.correct, following, done.then)

    def leave(self, step: int, phase: Phase, head: bytes = b"") -> None:
        """End a finished run; `head` is published where it isn't empty."""
        if head:
            for frame in wire.pack_bytes(Place(pb.WEIGHTS, step, phase.index), head):
                self._stream.send(frame)
        self._stream.send(Place(pb.CONTROL, step, phase.index).frame(leave=pb.Leave(finished=True)))
        if not (answer := self._stream.receive()).HasField("goodbye"):
            raise FrameError(f"Goodbye was expected, {answer.WhichOneof('body')} came")
        self._stream.close()

    def interrupt(self, reason: str) -> None:
        """Tell the server that the run will not go on; the link may be gone already."""
        if self._train:
            self._train.send(Place(pb.CONTROL, 0, 0).frame(leave=pb.Leave(finished=False, reason=reason)))
            self._train.close()
            self._train.drain(_FAREWELL_S)

    # Evaluation

    def evaluate(
        self, batches: Iterable[tuple[np.ndarray, np.ndarray]], count: int, subset: pb.Subset, phase: Phase,
        classes: tuple[str, ...], progress: Callable[[int], None] = lambda done: None,
    ) -> pb.Verdict:  # fmt: skip
        """Have labelled batches judged: (sent [B, width, ...], labels [B]) each; `count` pictures in all."""
        stream = self._begin_evaluation(count, subset, classes, phase)
        waiting: list[int] = []
        done = number = 0

        def receive() -> None:
            nonlocal done
            frame = stream.receive()
            wire.check_place(frame, Place(pb.EVALUATION, done, phase.index))
            if not frame.HasField("judged") or frame.judged.count != waiting.pop(0):
                raise FrameError(f"Judged of evaluation batch {done} was expected, {frame.WhichOneof('body')} came")
            done += 1
            progress(done)

        for sent, labels in batches:
            place = Place(pb.EVALUATION, number, phase.index)
            for frame in wire.pack_labels(place, labels, self.opened.recipe.model.classes):
                stream.send(frame)
            for frame in self._pack(place, sent, phase):
                stream.send(frame)
            waiting.append(len(labels))
            number += 1
            if len(waiting) >= _IN_FLIGHT:
                receive()
        while waiting:
            receive()
        verdict = self._end_evaluation(stream, number, phase)
        self._find_connection()
        if verdict.count != count:
            raise FrameError(f"the server judged {verdict.count} pictures, {count} were sent")
        return verdict

    def predict(self, batches: Iterable[np.ndarray], count: int, phase: Phase) -> Iterator[np.ndarray]:
        """Logits [B, classes] for each batch of what is sent [B, width, ...]."""
        stream = self._begin_evaluation(count, pb.SUBSET_UNSPECIFIED, (), phase)
        number = 0
        for number, sent in enumerate(batches):
            place = Place(pb.EVALUATION, number, phase.index)
            for frame in self._pack(place, sent, phase):
                stream.send(frame)
            shape = (len(sent), self.opened.recipe.model.classes)
            yield wire.unpack(stream.receive(), stream.receive, place, shape, "fp32")
        self._end_evaluation(stream, number + 1, phase)

    def _begin_evaluation(self, count: int, subset: pb.Subset, classes: tuple[str, ...], phase: Phase) -> Stream:
        stream = Stream(self._stub.Evaluate, self.meter, self.server)
        begin = pb.Begin(session=self.opened.session, samples=count, classes=classes, subset=subset, width=phase.width)
        stream.send(Place(pb.EVALUATION, 0, 0).frame(begin=begin))
        return stream

    @staticmethod
    def _end_evaluation(stream: Stream, number: int, phase: Phase) -> pb.Verdict:
        place = Place(pb.EVALUATION, number, phase.index)
        stream.send(place.frame(leave=pb.Leave(finished=True)))
        frame = stream.receive()
        wire.check_place(frame, place)
        if not frame.HasField("verdict"):
            raise FrameError(f"a Verdict was expected, {frame.WhichOneof('body')} came")
        stream.close()
        return frame.verdict

    def close(self) -> None:
        self.kernel.close()
        if self._channel:
            self._channel.close()
