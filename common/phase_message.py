"""A phase as it travels: to its message and back, the one place that lists the fields on the wire."""

from __future__ import annotations

from common.codecs import codec
from common.errors import SAME_RELEASE, CodecError, VersionError
from common.rpc import split_pb2 as pb
from common.schedule import KINDS, Phase


def phase_message(phase: Phase) -> pb.Phase:
    """All but `flip` and `shift`, which only the server needs."""
    return pb.Phase(
        index=phase.index, from_step=phase.from_step, width=phase.width, activation_codec=phase.activation_codec,
        gradient_codec=phase.gradient_codec, order=phase.order, kind=pb.Kind.Name(KINDS.index(phase.kind)), lr=phase.lr,
        decay_from=phase.decay_from, decay_until=phase.decay_until, nested=phase.nested, steps=phase.steps,
    )  # fmt: skip


def phase_of_message(message: pb.Phase) -> Phase:
    """The device's reading of it; VersionError where the server knows more than this release."""
    for name in (message.activation_codec, message.gradient_codec):
        try:
            codec(name)
        except CodecError as error:
            raise VersionError(f"the server uses the codec {name!r}, unknown here: {error}; {SAME_RELEASE}") from error
    if message.kind not in range(len(KINDS)):
        raise VersionError(f"the server announced a phase of kind {message.kind}, unknown here; {SAME_RELEASE}")
    return Phase(
        index=message.index, from_step=message.from_step, width=message.width,
        activation_codec=message.activation_codec, gradient_codec=message.gradient_codec, order=tuple(message.order),
        kind=KINDS[message.kind], lr=message.lr, decay_from=message.decay_from, decay_until=message.decay_until,
        nested=tuple(message.nested), steps=message.steps,
    )  # fmt: skip
