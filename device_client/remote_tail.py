"""The tail as seen from the device: encode, send, receive, decode; and what is left to say at the end of a run."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from common import wire
from common.chooser import Chooser
from common.codecs import NOTHING, Aside, codec
from common.errors import FrameError, TooLargeError
from common.meter import DOWN, UP, Draft
from common.phase_message import phase_of_message
from common.progress import Counted, untold
from common.pulse import STALLED_S
from common.rpc import split_pb2 as pb
from common.schedule import RECALLED, Phase
from common.tls import Access
from common.wire import Place
from device_client.connection import GIVE_UP_S, Connection
from device_client.link import Stream

# Batches of an evaluation that are on their way at once: hides the link's delay, bounds the memory.
_IN_FLIGHT = 3
_ASKED = 32  # and of a prediction, whose batches are single pictures
# How long a user who pressed Ctrl-C waits at most for what was asked of a recall, and then until the server has been
# told, which may be at work on it still; whoever presses it once more does not wait.
FAREWELL_S = 10.0

Batches = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
_Batch = TypeVar("_Batch")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class StepResult:
    """The server's answer to a step, beside the gradient."""

    loss: float
    correct: int
    next: Phase | None  # of the next step, where another phase begins there
    then: pb.Then  # what comes next: a step, a validation or the end
    kept: int  # the server's newest checkpoint; 0: it has not said


class RemoteTail(Connection):
    """The tail behind a connection; a step, an evaluation or a farewell is done once, however often the link breaks."""

    def __init__(
        self, server: str, access: Access | None = None, stub: Any = None, give_up_s: float = GIVE_UP_S,
        stalled_s: float = STALLED_S,
    ) -> None:  # fmt: skip
        """As Connection."""
        super().__init__(server, access, stub, give_up_s, stalled_s)
        self._chooser = Chooser(self.kernel.flow)
        # A recall: how many of the steps that were asked for have no answer yet, on which stream, and the request for
        # them, which is booked when its first answer has come.
        self.asked = 0
        self._asked_on: Stream | None = None
        self._ask: Draft | None = None

    def send_basis(self, basis: np.ndarray) -> None:
        """Principal components as rows, then the mean: float32 [w + 1, w]."""
        self._basis = list(wire.pack_raw(Place(pb.WEIGHTS, 0, 0), basis))
        self._steadily(0, self._bring_basis)

    def keep_basis(self, basis: np.ndarray) -> None:
        """The basis that a process before this one has sent: should the server not have got it, it is sent again."""
        self._basis, self._basis_booked = list(wire.pack_raw(Place(pb.WEIGHTS, 0, 0), basis)), True

    def learn(
        self, step: int, phase: Phase, sent: np.ndarray, labels: np.ndarray, aside: Aside = NOTHING, kept: int = 0
    ) -> tuple[np.ndarray | None, StepResult, dict[str, float]]:
        """One step: activation [B, width, ...] float32 and labels [B] up; gradient (as `sent`; None where the head is
        frozen) and result down, once the server has applied it; seconds spent on "encode", "wait", "decode".

        `aside`: what is known of the gradient. `kept`: the device's newest checkpoint, if this is it.
        """
        clock = time.perf_counter
        started, waited = clock(), self._waited
        frames = list(wire.pack_labels(Place(pb.LABEL, step, phase.index), labels, self.opened.recipe.model.classes))
        frames += self._pack(Place(pb.ACTIVATION, step, phase.index), sent, phase)
        frames[0].kept = kept
        wire.seal(frames[0])
        encoded, booked = clock(), False

        def attempt() -> tuple[np.ndarray | None, StepResult]:
            nonlocal booked
            if self._answered:  # the server has the step from an earlier stream, and sends its answer unasked
                self._answered -= 1
                if not booked:  # it was sent by an earlier process
                    for frame in frames:
                        self.meter.frame(UP, frame)
            else:
                self._send(frames, booked)
            booked = True
            with Draft(self.meter) as draft:
                gradient = None if phase.frozen else self._gradient(step, phase, sent.shape, aside, draft)
                result = self._result(step, phase, draft)
                draft.keep()
            return gradient, result

        gradient, result = self._steadily(step, attempt)
        wait = self._waited - waited
        seconds = {"encode": encoded - started, "wait": wait, "decode": clock() - encoded - wait}
        return gradient, result, seconds

    def _pack(self, place: Place, sent: np.ndarray, phase: Phase) -> Iterator[pb.Frame]:
        """Frames of an activation [B, width, ...], in the phase's codec."""
        if math.prod(sent.shape) > self.opened.max_elements:
            raise TooLargeError(
                f"{place}: {math.prod(sent.shape):,} elements are to be sent, and the server takes up to "
                f"{self.opened.max_elements:,}; lower data.batch in the recipe, or raise its --max-elements"
            )
        name = phase.activation_codec
        return wire.pack(place, self._chooser.encode(codec(name), sent, NOTHING), sent.shape, name)

    def _gradient(self, step: int, phase: Phase, shape: tuple[int, ...], aside: Aside, draft: Draft) -> np.ndarray:
        receive, place = partial(self._stream.receive, draft), Place(pb.GRADIENT, step, phase.index)
        return wire.unpack(receive(), receive, place, shape, phase.gradient_codec, aside)

    def _result(self, step: int, phase: Phase, draft: Draft) -> StepResult:
        frame = self._stream.receive(draft)
        wire.check_place(frame, Place(pb.CONTROL, step, phase.index))
        done: pb.StepDone = wire.body(frame, "done")
        following = phase_of_message(done.next) if done.HasField("next") else None
        if following and following.from_step != step + 1:
            raise FrameError(f"a phase from step {following.from_step} was announced at step {step}")
        return StepResult(done.loss, done.correct, following, done.then, done.kept)

    def recall(self, step: int, phase: Phase, kept: int = 0) -> StepResult:
        """One step that the server makes from what it has kept; many are asked for at a time (RECALLED)."""
        ask = wire.seal(Place(pb.CONTROL, step, phase.index).frame(recall=pb.Recall(steps=RECALLED), kept=kept))

        def attempt() -> StepResult:
            if self._train is not self._asked_on:
                self._settle_request(ask)
            if self._answered:
                self._answered -= 1
            elif not self.asked:
                self._ask, self.asked = Draft(self.meter), RECALLED
                self._stream.send(self._ask.frame(UP, ask))
            with Draft(self.meter) as draft:
                result = self._result(step, phase, draft)
                draft.keep()
            if self._ask:
                self._ask.keep()
            self.asked = max(0, self.asked - 1)
            if result.next or result.then != pb.STEP:
                self.asked = 0
            return result

        return self._steadily(step, attempt)

    def _settle_request(self, ask: pb.Frame) -> None:
        """On a new stream: book the last request for recalled steps, which had arrived if some of them were answered.

        If none was, it counts as lost and is sent again.
        """
        if self._ask and not self._answered:
            self._ask.drop()
        elif self._ask:
            self._ask.keep()
        elif self._answered and self._ready.from_request:  # sent by an earlier process, which saw no answer to it
            self._ask = Draft(self.meter)
            self._ask.frame(UP, ask)
            self._ask.keep()
        self.asked, self._asked_on = 0, self._train

    def leave(self, step: int, phase: Phase, head: bytes = b"") -> None:
        """Say that the run is finished; `head` is published where it isn't empty."""
        place = Place(pb.CONTROL, step, phase.index)
        frames = list(wire.pack_bytes(Place(pb.WEIGHTS, step, phase.index), head)) if head else []
        frames.append(wire.seal(place.frame(leave=pb.Leave(finished=True))))

        def attempt() -> None:
            with Draft(self.meter) as draft:
                for frame in frames:
                    draft.frame(UP, frame)
                    if not self.opened.finished:
                        self._stream.send(frame)
                if self.opened.finished:  # it was said before, and its answer lost
                    draft.frame(DOWN, wire.seal(place.frame(goodbye=pb.Goodbye())))
                else:
                    wire.body(self._stream.receive(draft), "goodbye")
                draft.keep()

        self._steadily(step, attempt)
        if self._train:
            self._train.close()
            self._train.drain(FAREWELL_S)  # so that the server sees us go by ourselves, not by a broken link

    def interrupt(self, step: int, phase: Phase, reason: str) -> None:
        """Tell the server that the run rests at `step`; not where the link is gone already."""
        if self._train:
            leave = Place(pb.CONTROL, step, phase.index).frame(leave=pb.Leave(finished=False, reason=reason))
            self._train.send(self.meter.frame(UP, wire.seal(leave), again=True))
            self._train.close()
            self._train.drain(FAREWELL_S)

    # Evaluation

    def evaluate(
        self, batches: Batches, count: int, subset: pb.Subset, phase: Phase, classes: tuple[str, ...], step: int = 0,
        progress: Counted = untold,
    ) -> pb.Verdict:  # fmt: skip
        """Have labelled batches judged: (sent [B, width, ...], labels [B]) each; `count` pictures in all. `progress` is
        told how many of them have been.

        In training (at `step`) it is begun anew where the link breaks, so `batches` gives them as often as it is asked.
        """

        def attempt() -> pb.Verdict:
            with Draft(self.meter) as draft, self._evaluation(count, subset, classes, phase, draft, step) as stream:
                verdict = self._judge(stream, batches(), count, phase, draft, progress)
                draft.keep()
                return verdict

        return self._steadily(step, attempt) if self._begun is not None else attempt()

    def _judge(
        self, stream: Stream, batches: Iterable[tuple[np.ndarray, np.ndarray]], count: int, phase: Phase, draft: Draft,
        progress: Counted,
    ) -> pb.Verdict:  # fmt: skip
        """One evaluation, from its first batch to the verdict."""
        classes = self.opened.recipe.model.classes

        def send(place: Place, batch: tuple[np.ndarray, np.ndarray]) -> int:
            sent, labels = batch
            for frame in (*wire.pack_labels(place, labels, classes), *self._pack(place, sent, phase)):
                stream.send(draft.frame(UP, frame))
            return len(labels)

        def answer(place: Place, pictures: int) -> int:
            frame = stream.receive(draft)
            wire.check_place(frame, place)
            judged = wire.body(frame, "judged").count
            if judged != pictures:
                raise FrameError(f"{judged} pictures of batch {place.step} were judged, {pictures} were sent")
            return pictures

        number = done = 0
        for judged in _exchanged(batches, _IN_FLIGHT, phase, send, answer):
            number, done = number + 1, done + judged
            progress(done, count)
        verdict = self._end_evaluation(stream, number, phase, draft)
        self._find_connection()
        if verdict.count != count:
            raise FrameError(f"the server judged {verdict.count} pictures, {count} were sent")
        return verdict

    def predict(
        self, batches: Iterable[np.ndarray], count: int, phase: Phase, before: int = 0, progress: Counted = untold
    ) -> Iterator[np.ndarray]:
        """Logits [B, classes] for each batch of what is sent [B, width, ...], of `count` pictures; so many more were
        named `before`."""
        subset = pb.SUBSET_UNSPECIFIED  # nobody knows the right answers
        classes = self.opened.recipe.model.classes
        with Draft(self.meter) as draft, self._evaluation(count, subset, (), phase, draft) as stream:
            receive = partial(stream.receive, draft)

            def send(place: Place, sent: np.ndarray) -> int:
                for frame in self._pack(place, sent, phase):
                    stream.send(draft.frame(UP, frame))
                return len(sent)

            def answer(place: Place, pictures: int) -> np.ndarray:
                return wire.unpack(receive(), receive, place, (pictures, classes), "fp32")

            number = 0
            for logits in _exchanged(batches, _ASKED, phase, send, answer):
                number, before, count = number + 1, before + len(logits), count - len(logits)
                progress(before, before + count)
                yield logits
            self._end_evaluation(stream, number, phase, draft)
            draft.keep()

    @contextmanager
    def _evaluation(
        self, count: int, subset: pb.Subset, classes: tuple[str, ...], phase: Phase, draft: Draft, step: int = 0
    ) -> Iterator[Stream]:
        """A stream on which an evaluation has begun. It is closed in the end: gRPC's thread that waits for more to send
        would never end."""
        stream = self._open_stream(self._stub.Evaluate)
        begin = pb.Begin(
            session=self.opened.session, samples=count, classes=classes, subset=subset, width=phase.width, step=step
        )
        try:
            stream.send(draft.frame(UP, wire.seal(Place(pb.EVALUATION, 0, phase.index).frame(begin=begin))))
            yield stream
        finally:
            stream.close()

    @staticmethod
    def _end_evaluation(stream: Stream, number: int, phase: Phase, draft: Draft) -> pb.Verdict:
        place = Place(pb.EVALUATION, number, phase.index)
        stream.send(draft.frame(UP, wire.seal(place.frame(leave=pb.Leave(finished=True)))))
        frame = stream.receive(draft)
        wire.check_place(frame, place)
        verdict: pb.Verdict = wire.body(frame, "verdict")
        return verdict


def _exchanged(
    batches: Iterable[_Batch], most: int, phase: Phase, send: Callable[[Place, _Batch], int],
    answer: Callable[[Place, int], _Answer],
) -> Iterator[_Answer]:  # fmt: skip
    """The answers to all batches in their order, no more than `most` of them waited for at once: what `answer` makes of
    the place of each and how many pictures it has, as `send` says."""
    waiting = deque[tuple[Place, int]]()
    for number, batch in enumerate(batches):
        if len(waiting) == most:
            yield answer(*waiting.popleft())
        place = Place(pb.EVALUATION, number, phase.index)
        waiting.append((place, send(place, batch)))
    while waiting:
        yield answer(*waiting.popleft())
