"""One Evaluate stream: batches in, judgements or logits out, at the end the verdict. Called by the servicer."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np

from common import wire, words
from common.errors import FrameError, TooLargeError
from common.halves import Halves
from common.meter import DOWN, UP
from common.phase_message import phase_message
from common.recipe import Recipe
from common.rpc import split_pb2 as pb
from common.schedule import Phase
from common.wire import Place
from edge_server.host import Host
from edge_server.incoming import Incoming
from edge_server.judging import Judgement, judge, logits_of
from edge_server.sessions import Session
from edge_server.training import Training


def evaluate(
    host: Host, receive: Incoming, training: Training | None, tell: Callable[[Session, int, bool], None]
) -> Generator[pb.Frame, None, None]:
    """What is sent down.

    `training`: that of the run which the device trains; None where a finished run is used. `tell` is told of such a
    use: whose it was, how many pictures came, and whether they were judged.
    """
    draft, begin = receive.draft, receive.begin
    draft.frame(UP, receive.first)
    halves, phase, width = _network(host, receive, training)
    halves.tail.eval()
    try:
        total, number, pictures = Judgement(), 0, 0
        while not (frame := receive()).HasField("leave"):
            place = Place(pb.EVALUATION, number, phase.index)
            sent, labels = _batch(frame, receive, place, halves, phase, width, host.recipe)
            pictures += len(sent)
            if pictures > begin.samples:
                raise FrameError(f"more than the {begin.samples:,} pictures came that Begin had told of")
            precision = host.recipe.precision
            if labels is None:
                for out in wire.pack_raw(place, logits_of(halves, sent, width, precision).numpy()):
                    yield draft.frame(DOWN, out)
            else:
                result = judge(halves, sent, labels, width, precision)
                total += result
                judged = pb.Judged(count=result.count, loss=result.loss, correct=result.correct)
                yield draft.frame(DOWN, wire.seal(place.frame(judged=judged)))
            number += 1
        verdict, again = _verdict(total, training, begin.subset)
        last = draft.frame(DOWN, wire.seal(Place(pb.EVALUATION, number, phase.index).frame(verdict=verdict)))
        if not again:
            draft.keep()
            if training and host.run:
                if begin.subset == pb.VALIDATION:  # the test's is in the summary
                    found = f"validation loss {verdict.loss:.4f}, accuracy {verdict.accuracy:.2%}"
                    host.console.print(f"step {training.step}: {found}", highlight=False)
                training.coordinator.book(host.run.meter)
                # The device may go on from here without judging again: a server that is lost now must know it.
                host.run.keep(anew=True)
        if not training:  # now: once the device has the verdict it may end the stream, and this with it
            tell(receive.session, pictures, total.count > 0)
        yield last
    finally:
        if training and not host.served:  # a run may be finished, and served, while a stream of it was still open
            halves.tail.train()


def _network(host: Host, receive: Incoming, training: Training | None) -> tuple[Halves, Phase, int]:
    """What judges, in which phase and at which width; FrameError where the device asks for what there is not."""
    begin = receive.begin
    if training:
        if begin.step != training.step:  # a stream of long ago that is played once more must decide nothing
            raise FrameError(
                f"an evaluation at step {begin.step} was asked for; the run stands at step {training.step}"
            )
        halves, phase = training.halves, training.phase_of_evaluation(receive.first.phase)
    else:
        assert host.served
        halves, phase = host.served.halves, host.served.manifest.phase
        _check_classes(tuple(begin.classes), host.served.manifest.classes)
    width = begin.width or phase.width
    if width not in phase.widths:
        raise FrameError(
            f"width {width} was asked for; this network serves {', '.join(map(str, sorted(phase.widths)))}"
        )
    return halves, phase, width


def _verdict(total: Judgement, training: Training | None, subset: pb.Subset) -> tuple[pb.Verdict, bool]:
    """The verdict, with what it decides in training; and whether it was given before and lost on the way, so that the
    books have this evaluation already."""
    verdict = pb.Verdict(count=total.count, loss=total.mean_loss, accuracy=total.accuracy)
    if training is None or subset not in (pb.VALIDATION, pb.TEST):
        return verdict, False
    on_test = subset == pb.TEST
    again = (training.step, on_test) in training.evaluated
    decision = training.judged(total, on_test)
    verdict.finished = decision.then == pb.FINISH
    if decision.phase:
        verdict.next.CopyFrom(phase_message(decision.phase))
    return verdict, again


def _batch(
    frame: pb.Frame, receive: Incoming, place: Place, halves: Halves, phase: Phase, width: int,
    recipe: Recipe,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """What was sent of one batch [B, width, ...], and its labels [B] where they came."""
    labels, count = None, wire.announced_first(frame)
    if not 1 <= count <= recipe.data.evaluation_batch:
        raise TooLargeError(
            f"an evaluation batch of {count:,} pictures came; 1 to {recipe.data.evaluation_batch:,} fit"
        )
    if frame.part.tensor.dtype != "float32":
        labels = wire.unpack_labels(frame, receive, place, count, recipe.model.classes)
        frame = receive()
    return wire.unpack(frame, receive, place, halves.sent_shape(count, width), phase.activation_codec), labels


def _check_classes(came: tuple[str, ...], expected: tuple[str, ...]) -> None:
    if came and (what := words.unlike(came, expected)):
        raise FrameError(f"the device's classes are not those of the run: {what}; use data with classes of those names")
