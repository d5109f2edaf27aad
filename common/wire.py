"""Tensors to frames and back: chunking, and every check that what came is what was expected.

Called by remote_tail on the device and by the servicer; neither looks inside a Part itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from common.codecs import CODECS
from common.codecs.base import Buffer, elements
from common.errors import CodecError, FrameError, TooLargeError
from common.rpc import split_pb2 as pb

PROTOCOL_VERSION = 1
# 1 MB frames ran at 380 MB/s each way over loopback, 8 MB ones at 115; see design decision 8 in docs/design.md.
FRAME_BYTES = 1 << 20
MAX_TENSOR_ELEMENTS = 1 << 26
MAX_WEIGHTS_BYTES = 1 << 30

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


def pack(place: Place, tensor: Tensor, codec: str) -> Iterator[pb.Frame]:
    """Frames of a float32 tensor of any shape, encoded by `codec`."""
    return _frames(place, CODECS[codec].encode(tensor), tensor.shape, "float32", codec)


def pack_labels(place: Place, labels: Tensor, classes: int) -> Iterator[pb.Frame]:
    """Frames of class numbers [B], one or two bytes each."""
    kind = label_type(classes)
    return _frames(place, labels.astype(kind.newbyteorder("<")).tobytes(), labels.shape, kind.name, "raw")


def pack_bytes(place: Place, data: bytes) -> Iterator[pb.Frame]:
    """Frames of opaque bytes (safetensors)."""
    return _frames(place, data, (len(data),), "bytes", "raw")


def label_type(classes: int) -> np.dtype:
    return np.dtype(np.uint8 if classes <= 256 else np.uint16)


def _frames(place: Place, payload: Buffer, shape: tuple[int, ...], dtype: str, codec: str) -> Iterator[pb.Frame]:
    view = memoryview(payload)
    parts = max(1, -(-len(view) // FRAME_BYTES))
    tensor = pb.Tensor(shape=shape, dtype=dtype, codec=codec, payload=len(view), parts=parts)
    for index in range(parts):
        data = bytes(view[index * FRAME_BYTES : (index + 1) * FRAME_BYTES])
        yield place.frame(part=pb.Part(tensor=tensor if index == 0 else None, index=index, data=data))


def check_place(frame: pb.Frame, place: Place) -> None:
    if (frame.role, frame.step, frame.phase) != (place.role, place.step, place.phase):
        role = pb.Role.Name(frame.role).lower() if frame.role in pb.Role.values() else str(frame.role)
        raise FrameError(f"{place} was expected; {role} of step {frame.step}, phase {frame.phase} came")


def unpack(first: pb.Frame, more: NextFrame, place: Place, shape: tuple[int, ...], codec: str) -> Tensor:
    """The float32 tensor that starts with `first`; it must have this place, shape and codec."""
    payload = _collect(first, more, place, shape, "float32", codec, CODECS[codec].bound(shape))
    return CODECS[codec].decode(payload, shape)


def unpack_labels(first: pb.Frame, more: NextFrame, place: Place, count: int | None, classes: int) -> Tensor:
    """Class numbers [B] as int64, each below `classes`; B is `count`, or what came where that is None."""
    kind = label_type(classes)
    if count is None:
        count = announced(first)[0] if announced(first) else 0
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
    return payload


def announced(frame: pb.Frame) -> tuple[int, ...]:
    """The shape that a payload's first frame declares: a claim, to be checked before it is believed."""
    return tuple(frame.part.tensor.shape)


def _collect(
    first: pb.Frame, more: NextFrame, place: Place, shape: tuple[int, ...], dtype: str, codec: str, bound: int
) -> bytes:
    check_place(first, place)
    if not first.HasField("part") or not first.part.HasField("tensor") or first.part.index != 0:
        raise FrameError(f"{place}: the first part of a payload was expected; {first.WhichOneof('body')} came")
    tensor = first.part.tensor
    if elements(shape) > MAX_TENSOR_ELEMENTS and dtype != "bytes":
        raise TooLargeError(f"{place}: shape {list(shape)} is over the limit of {MAX_TENSOR_ELEMENTS:,} elements")
    expected = (shape, dtype, codec)
    came = (tuple(tensor.shape), tensor.dtype, tensor.codec)
    for name, want, got in zip(("shape", "dtype", "codec"), expected, came, strict=True):
        if want != got:
            raise FrameError(f"{place}: {name} {_words(want)} was expected, {_words(got)} came")
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
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _words(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
