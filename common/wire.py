"""Tensors to frames and back: chunking, and every check that what came is what was expected.

Called by both sides wherever frames come or go.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from common.codecs import Aside, codec
from common.codecs.base import NOTHING, Buffer
from common.errors import CodecError, FrameError, TooLargeError
from common.rpc import split_pb2 as pb

PROTOCOL_VERSION = 12
# 1 MB frames ran at 380 MB/s each way over loopback, 8 MB ones at 115; see design decision 8 in docs/design.md.
FRAME_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 1 << 30
_ROLES = set(pb.Role.values()) - {pb.ROLE_UNSPECIFIED}

Tensor = np.ndarray
NextFrame = Callable[[], pb.Frame]


@dataclass(frozen=True)
class Place:
    """Where a frame belongs: its role, step and phase."""

    role: pb.Role
    step: int
    phase: int

    def frame(self, **body: object) -> pb.Frame:
        return pb.Frame(role=self.role, step=self.step, phase=self.phase, **body)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{pb.Role.Name(self.role).lower()} of step {self.step}, phase {self.phase}"


def pack(place: Place, payload: Buffer, shape: tuple[int, ...], name: str) -> Iterator[pb.Frame]:
    """Frames of a float32 tensor of `shape`, which the codec `name` has made `payload` of."""
    return _frames(place, payload, shape, "float32", name)


def pack_raw(place: Place, tensor: Tensor) -> Iterator[pb.Frame]:
    """Frames of a float32 tensor, exactly as it is."""
    return pack(place, codec("fp32").encode(tensor), tensor.shape, "fp32")


def pack_labels(place: Place, labels: Tensor, classes: int) -> Iterator[pb.Frame]:
    """Frames of class numbers [B], one or two bytes each."""
    kind = label_type(classes)
    return _frames(place, labels.astype(kind.newbyteorder("<")).tobytes(), labels.shape, kind.name, "raw")


def pack_bytes(place: Place, data: bytes) -> Iterator[pb.Frame]:
    """Frames of opaque bytes (safetensors)."""
    return _frames(place, data, (len(data),), "bytes", "raw")


def label_type(classes: int) -> np.dtype:
    return np.dtype(np.uint8 if classes <= 256 else np.uint16)


Sealed = TypeVar("Sealed", pb.Frame, pb.OpenRequest, pb.OpenReply)


def seal(message: Sealed) -> Sealed:
    """Put into a message the checksum of everything else in it; see `_check` for frames that carry a payload."""
    message.check = 0
    message.check = _check(message)
    return message


def unsealed(message: Sealed) -> Sealed:
    """The message, if its checksum is right; else CodecError."""
    came, message.check = message.check, 0
    right = came == _check(message)
    message.check = came
    if not right or (isinstance(message, pb.Frame) and message.role not in _ROLES):
        raise CodecError("a message's checksum is wrong: it was damaged on the way")
    return message


def _check(message: pb.Frame | pb.OpenRequest | pb.OpenReply) -> int:
    if not (isinstance(message, pb.Frame) and message.HasField("part")):
        return zlib.crc32(message.SerializeToString(deterministic=True))
    # The payload has a checksum of its own, and a role, step or phase that is damaged is refused as not the expected
    # one. That leaves `kept`.
    if not message.kept:
        return 0
    beside = pb.Frame(role=message.role, step=message.step, phase=message.phase, kept=message.kept)
    return zlib.crc32(beside.SerializeToString(deterministic=True))


def _frames(place: Place, payload: Buffer, shape: tuple[int, ...], dtype: str, name: str) -> Iterator[pb.Frame]:
    view = memoryview(payload)
    parts = max(1, -(-len(view) // FRAME_BYTES))
    checksum = zlib.crc32(view)
    tensor = pb.Tensor(shape=shape, dtype=dtype, codec=name, payload=len(view), parts=parts, checksum=checksum)
    for index in range(parts):
        data = bytes(view[index * FRAME_BYTES : (index + 1) * FRAME_BYTES])
        yield place.frame(part=pb.Part(tensor=tensor if index == 0 else None, index=index, data=data))


def check_place(frame: pb.Frame, place: Place) -> None:
    if (frame.role, frame.step, frame.phase) != (place.role, place.step, place.phase):
        role = pb.Role.Name(frame.role).lower() if frame.role in pb.Role.values() else str(frame.role)
        raise FrameError(f"{place} was expected; {role} of step {frame.step}, phase {frame.phase} came")


def unpack(
    first: pb.Frame, more: NextFrame, place: Place, shape: tuple[int, ...], name: str, aside: Aside = NOTHING
) -> Tensor:
    """The float32 tensor that starts with `first`; it must have this place, shape and codec."""
    return codec(name).decode(payload_of(first, more, place, shape, name), shape, aside)


def payload_of(first: pb.Frame, more: NextFrame, place: Place, shape: tuple[int, ...], name: str) -> bytearray:
    """The payload, undecoded, of the float32 tensor that starts with `first`."""
    return _collect(first, more, place, shape, "float32", name, codec(name).bound(shape))


def unpack_labels(first: pb.Frame, more: NextFrame, place: Place, count: int, classes: int) -> Tensor:
    """`count` class numbers as int64, each below `classes`."""
    kind = label_type(classes)
    payload = _collect(first, more, place, (count,), kind.name, "raw", count * kind.itemsize)
    if len(payload) != count * kind.itemsize:
        raise CodecError(f"labels: {len(payload)} bytes came for {count} labels")
    labels = np.frombuffer(payload, kind.newbyteorder("<")).astype(np.int64)
    if count and labels.max() >= classes:
        raise FrameError(f"label {labels.max()} came; the recipe has classes 0 to {classes - 1}")
    return labels


def unpack_bytes(first: pb.Frame, more: NextFrame, place: Place, size: int) -> bytes:
    """Opaque bytes of the announced `size`."""
    if size > MAX_WEIGHTS_BYTES:
        raise TooLargeError(f"weights of {size:,} bytes are over the limit of {MAX_WEIGHTS_BYTES:,}")
    payload = _collect(first, more, place, (size,), "bytes", "raw", size)
    if len(payload) != size:
        raise CodecError(f"weights: {len(payload):,} bytes came where {size:,} were announced")
    return bytes(payload)


def announced(frame: pb.Frame) -> tuple[int, ...]:
    """The shape that a payload's first frame declares: a claim, to be checked before it is believed."""
    return tuple(frame.part.tensor.shape)


def announced_first(frame: pb.Frame) -> int:
    """The first side of that shape: a batch's pictures, or bytes; 0 where it has none."""
    return next(iter(frame.part.tensor.shape), 0)


def body(frame: pb.Frame, kind: str) -> Any:
    """The message of a frame, which is to be of this `kind`, a field of Frame's body; else FrameError."""
    came = frame.WhichOneof("body")
    if came != kind:
        raise FrameError(f"{kind} was expected, {came} came")
    return getattr(frame, kind)


def _collect(
    first: pb.Frame, more: NextFrame, place: Place, shape: tuple[int, ...], dtype: str, name: str, bound: int
) -> bytearray:
    check_place(first, place)
    if not first.HasField("part") or not first.part.HasField("tensor") or first.part.index != 0:
        raise FrameError(f"{place}: the first part of a payload was expected; {first.WhichOneof('body')} came")
    tensor = first.part.tensor
    expected = (shape, dtype, name)
    came = (tuple(tensor.shape), tensor.dtype, tensor.codec)
    for what, want, got in zip(("shape", "dtype", "codec"), expected, came, strict=True):
        if want != got:
            raise FrameError(f"{place}: {what} {_words(want)} was expected, {_words(got)} came")
    if tensor.payload > bound or tensor.parts != max(1, -(-tensor.payload // FRAME_BYTES)):
        raise TooLargeError(
            f"{place}: {tensor.payload:,} bytes in {tensor.parts} parts were announced; at most {bound:,} bytes in "
            f"parts of {FRAME_BYTES:,} fit its shape"
        )
    pieces = [first.part.data]
    for index in range(1, tensor.parts):
        frame = more()
        check_place(frame, place)
        if not frame.HasField("part") or frame.part.index != index or frame.part.HasField("tensor"):
            raise FrameError(f"{place}: part {index} of {tensor.parts} was expected; {frame.WhichOneof('body')} came")
        pieces.append(frame.part.data)
    for index, piece in enumerate(pieces):
        size = min(FRAME_BYTES, tensor.payload - index * FRAME_BYTES)
        if len(piece) != size:
            raise CodecError(f"{place}: part {index} has {len(piece):,} bytes, {size:,} were announced")
    payload = bytearray().join(pieces)  # writable: a codec may hand it on as the tensor's memory
    if zlib.crc32(payload) != tensor.checksum:
        raise CodecError(f"{place}: the payload's checksum is wrong: it was damaged on the way")
    return payload


def _words(value: object) -> str:
    """`value` in an error's sentence: cut short, for it came from the other side and may be of any length."""
    words = str(list(value[:10])) if isinstance(value, tuple) else str(value)
    return words if len(words) <= 100 else words[:100] + "..."
