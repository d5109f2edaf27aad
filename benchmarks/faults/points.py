"""The points of the protocol at which a fault is placed: functions that know the message when it passes."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.faults.proxy import Chunk, Moment, Span
from common.meter import DOWN, UP
from common.rpc import split_pb2 as pb

HANDSHAKE = "handshake"  # the server's answer to the first Open of the run
RECONNECT = "handshake of a reconnect"  # the same after the link was lost
FORWARD = "forward sent"  # the activation of a step has gone up
BACKWARD = "backward"  # the gradient of a step is coming down
REPLY = "reply lost after being applied"  # the StepDone of a step, which the server has applied
SWITCH = "phase switch"  # the answer that carries the next phase
CHECKPOINT = "checkpoint being written"  # files appear in a run folder's checkpoints/
EVALUATION = "evaluation"  # a batch of an evaluation is going up
VALIDATED = "step after a validation"  # its gradient is coming down; the device has kept nothing since the verdict
GOODBYE = "goodbye"  # the server's last word: the run is finished there
POINTS = (HANDSHAKE, RECONNECT, FORWARD, BACKWARD, REPLY, SWITCH, CHECKPOINT, EVALUATION, VALIDATED, GOODBYE)


def _is_activation(frame: pb.Frame) -> bool:
    return frame.role == pb.ACTIVATION


def _is_gradient(frame: pb.Frame) -> bool:
    return frame.role == pb.GRADIENT


def _is_done(frame: pb.Frame) -> bool:
    return frame.HasField("done")


def _is_switch(frame: pb.Frame) -> bool:
    return frame.done.HasField("next") or frame.verdict.HasField("next")


def _is_judged(frame: pb.Frame) -> bool:
    return frame.role == pb.EVALUATION and frame.HasField("part")


def _is_goodbye(frame: pb.Frame) -> bool:
    return frame.HasField("goodbye")


# Which way the message goes, what it is, and how much of it still passes where nothing else is said.
_MESSAGES: dict[str, tuple[str, Callable[[pb.Frame], bool], float]] = {
    FORWARD: (UP, _is_activation, 1.0),
    BACKWARD: (DOWN, _is_gradient, 0.5),
    REPLY: (DOWN, _is_done, 0.0),
    SWITCH: (DOWN, _is_switch, 0.0),
    EVALUATION: (UP, _is_judged, 0.5),
    VALIDATED: (DOWN, _is_gradient, 0.5),
    GOODBYE: (DOWN, _is_goodbye, 0.0),
}


def part_of(point: str) -> float:
    """How much of the point's message passes before the fault."""
    return _MESSAGES[point][2] if point in _MESSAGES else 0.0


def moment(point: str, step: int = -1) -> Moment:
    """When the message of `point` passes for the first time after the answer to `step`.

    For CHECKPOINT that is any byte: who waits for files, waits before.
    """
    if point in (HANDSHAKE, RECONNECT):
        return _answer_to_open
    if point == CHECKPOINT:
        return lambda chunk: Span(0, len(chunk.data))
    way, test, _ = _MESSAGES[point]
    judged = point != VALIDATED

    def find(chunk: Chunk) -> Span | None:
        nonlocal judged
        judged |= any(seen.frame and seen.frame.HasField("verdict") for seen in chunk.messages)
        if not judged or chunk.way != way or chunk.step < step:
            return None
        return next((Span(seen.start, seen.end) for seen in chunk.messages if seen.frame and test(seen.frame)), None)

    return find


def _answer_to_open(chunk: Chunk) -> Span | None:
    first = next((seen for seen in chunk.messages if seen.number == 0), None)
    return Span(first.start, first.end) if first and chunk.way == DOWN else None


def bulk(way: str, size: int) -> Moment:
    """When at least `size` bytes go this way together: all that can be told under TLS."""
    return lambda chunk: Span(0, len(chunk.data)) if chunk.way == way and len(chunk.data) >= size else None


# Kinds of HTTP/2 frames, and how long one is that is to be hit whole: its header, and what follows where that is fixed.
DATA, WINDOW_UPDATE = 0, 8
_HIT = {DATA: 9, WINDOW_UPDATE: 13}


def http2(way: str, kind: int, step: int = -1) -> Moment:
    """When a HTTP/2 frame of `kind` goes this way: its header, not our message in it. Not under TLS."""

    def find(chunk: Chunk) -> Span | None:
        place = 0  # gRPC writes whole frames, so most chunks start with one
        while chunk.way == way and chunk.step >= step and place + _HIT[kind] <= len(chunk.data):
            if chunk.data[place + 3] == kind and chunk.data[place + 5] == 0:
                return Span(place, place + _HIT[kind])
            place += 9 + int.from_bytes(chunk.data[place : place + 3], "big")
        return None

    return find


def widened(find: Moment) -> Moment:
    """The same moment, but all bytes that pass together with the message instead of its own alone."""
    return lambda chunk: Span(0, len(chunk.data)) if find(chunk) else None
