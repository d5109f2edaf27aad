"""Payloads that lie: each is refused with a CodecError, in memory bounded by the tensor and in bounded time."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common import memory, wire
from common.codecs import NOTHING, Aside, codec, context, frame
from common.errors import CodecError, FrameError, TooLargeError, printable
from common.meter import count_of
from common.rpc import split_pb2 as pb
from common.wire import Place

SHAPE = (4, 8, 12, 12)
COUNT = 4 * 8 * 12 * 12
TENSOR = np.random.default_rng(0).laplace(size=SHAPE).astype(np.float32)
SUPPORT = TENSOR > -0.5
DITHERED = Aside((1, 2, 3), SUPPORT)
NAMES = ("fp32", "fp16", "int8", "step:12", "context:12")
names = pytest.mark.parametrize("name", NAMES)


def payload(name: str, aside: Aside = NOTHING) -> bytes:
    return bytes(codec(name).encode(TENSOR, aside))


def survives(name: str, data: bytes, shape: tuple[int, ...] = SHAPE, aside: Aside = NOTHING) -> bool:
    """Whether `data` was taken for a tensor; anything but a CodecError or a finite tensor fails."""
    try:
        back = codec(name).decode(data, shape, aside)
    except CodecError:
        return False
    assert back.shape == shape and back.dtype == np.float32 and np.all(np.isfinite(back))
    return True


@names
@settings(max_examples=150)
@given(junk=st.binary(max_size=300), dithered=st.booleans())
def test_any_bytes_decode_or_are_refused(name: str, junk: bytes, dithered: bool) -> None:
    survives(name, junk, aside=DITHERED if dithered else NOTHING)
    for head in payload(name, DITHERED if dithered else NOTHING)[:40:3], payload(name)[:9]:
        survives(name, head + junk, aside=DITHERED if dithered else NOTHING)


@names
@settings(max_examples=250)
@given(
    places=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=4),
    dithered=st.booleans(),
)
def test_flipped_bytes_decode_or_are_refused(name: str, places: list[tuple[int, int]], dithered: bool) -> None:
    aside = DITHERED if dithered else NOTHING
    data = bytearray(payload(name, aside))
    for place, flip in places:
        # Half of the time among the first bytes, where the headers and tables are.
        data[place % (60 if place % 2 else len(data))] ^= flip
    survives(name, bytes(data), aside=aside)


@names
def test_truncated_and_trailing_bytes(name: str) -> None:
    for aside in (NOTHING, DITHERED):
        data = payload(name, aside)
        assert survives(name, data, aside=aside)
        for damaged in (data[:-1], data[:-4], data + b"\0", data + bytes(8), data[:20], data[:3], b""):
            assert not survives(name, damaged, aside=aside)


@names
def test_another_shape_than_was_sent(name: str) -> None:
    for shape in ((4, 8, 12, 11), (4, 8, 12, 13), (5, 8, 12, 12), (1,), (4, 8)):
        assert not survives(name, payload(name), shape)


@pytest.mark.parametrize("name", ["step:12", "context:12"])
def test_another_mask_or_dither_than_was_agreed_on(name: str) -> None:
    one_less = SUPPORT.copy()
    one_less.flat[np.flatnonzero(SUPPORT)[7]] = False
    elsewhere = np.roll(SUPPORT, 1)
    for aside in (
        NOTHING,
        Aside((1, 2, 3)),
        Aside(None, SUPPORT),
        *(Aside((1, 2, 3), s) for s in (one_less, elsewhere)),
    ):
        assert not survives(name, payload(name, DITHERED), aside=aside)


@pytest.mark.parametrize("name", ["step:12", "context:12"])
@pytest.mark.parametrize("size", [1, SUPPORT.size // 2, 4 * SUPPORT.size])
def test_a_support_of_another_size_is_refused(name: str, size: int) -> None:
    """Compiled loops go by the tensor's size: another would have them read and write anywhere."""
    other = Aside((1, 2, 3), np.ones(size, np.bool_))
    with pytest.raises(CodecError, match=f"a mask of {size} elements"):
        codec(name).encode(np.ones(SHAPE, np.float32), other)
    assert not survives(name, payload(name, DITHERED), aside=other)


def header(form: int, step: float, outliers: int = 0, checksum: int = 0, level: int | None = None) -> bytes:
    level = 128 * (form >= 2) if level is None else level
    return struct.pack("<BfBII", form, step, level, outliers, checksum)


PACKED, CONTEXT = 2, 3
LINEAGE = context._lineage_size(8)  # bytes that say which of eight channels are like which
ZEROS = frame.compress(bytes(COUNT // 2))
ONE_OUTLIER = frame.compress(bytes(COUNT // 2 + 4))
ESCAPED = frame.compress(b"\xff" * (COUNT // 2 + COUNT))  # all symbols are escapes, and outliers


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header(0, 0) + np.full(COUNT, np.nan, "<f4").tobytes(), "NaN or Inf"),
        (header(0, 0) + np.full(COUNT, -np.inf, "<f4").tobytes(), "NaN or Inf"),
        (header(PACKED, np.nan) + struct.pack("<BI", 2, 0) + ZEROS, "a step of nan"),
        (header(PACKED, np.inf) + struct.pack("<BI", 2, 0) + ZEROS, "a step of inf"),
        (header(PACKED, -1) + struct.pack("<BI", 2, 0) + ZEROS, "a step of -1"),
        (header(PACKED, 1, 2**32 - 1) + struct.pack("<BI", 2, 0) + ZEROS, "4294967295 outliers"),
        (header(PACKED, 1) + struct.pack("<BI", 5, 0) + ZEROS, "5 digits a byte"),
        (header(PACKED, 1) + struct.pack("<BI", 1, 0) + ZEROS, "1 digits a byte"),
        (header(PACKED, 1) + struct.pack("<BI", 2, 2**31) + ZEROS, "2147483648 escapes"),
        (header(PACKED, 1) + struct.pack("<BI", 2, 1) + frame.compress(bytes(COUNT // 2 + 1)), "1 escapes"),
        (header(PACKED, 1) + struct.pack("<BI", 2, COUNT) + ESCAPED, "0 outliers came for 4608"),
        (header(PACKED, 1, 1) + struct.pack("<BI", 2, 0) + ONE_OUTLIER, "1 outliers came for 0"),
        (header(PACKED, 1) + struct.pack("<BI", 2, 0) + ZEROS[:-2], "damaged"),
        (header(64, 1) + ZEROS, "form 64"),
        (header(PACKED, 1, 0, 77) + ZEROS, "which elements are zero"),
        (header(PACKED | 8, 1) + ZEROS, "form 10"),
        (header(PACKED, 1, level=0) + struct.pack("<BI", 2, 0) + ZEROS, "form 2 does not exist"),
        (header(PACKED | 4, 1) + struct.pack("<BI", 2, 0) + ZEROS, "form 6 does not exist"),
        (header(CONTEXT, 1) + b"\0" * (LINEAGE - 1), "cut short"),
        (header(CONTEXT, 1) + b"\xff" * LINEAGE, "which channels are like which"),
        (header(CONTEXT, 1) + bytes(LINEAGE), "coded symbols"),
        (header(CONTEXT, 1) + bytes(LINEAGE) + b"\x55" * 50_000, "coded symbols"),
        (header(CONTEXT, 1, 7), "7 outliers were announced"),
        (header(1, 0) + b"more", "4 bytes came"),
    ],
)
def test_forged_payloads(data: bytes, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        codec("context:12").decode(data, SHAPE)


def test_a_shape_with_a_million_sides_is_refused_unmultiplied() -> None:
    tensor = pb.Tensor(shape=[2**32 - 1] * 200_000, dtype="float32", codec="fp32", parts=1)
    frame = Place(pb.ACTIVATION, 0, 0).frame(part=pb.Part(tensor=tensor))
    assert count_of(frame)[1].raw == 0
    with pytest.raises(FrameError) as refused:
        wire.payload_of(frame, lambda: frame, Place(pb.ACTIVATION, 0, 0), (2, 3), "fp32")
    assert len(str(refused.value)) < 400
    assert printable("a\x1b[2Jb" * 100, 8) == "a?[2Jba?"


def test_later_parts_belong_where_the_first_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are as many as its size takes: no more are asked for, however many are announced."""
    monkeypatch.setattr(wire, "FRAME_BYTES", 16)
    place, tensor = Place(pb.ACTIVATION, 4, 1), np.ones((2, 4), np.float32)
    first, second = wire.pack_raw(place, tensor)
    assert np.array_equal(wire.unpack(first, lambda: second, place, (2, 4), "fp32"), tensor)
    for field, value in (("role", pb.GRADIENT), ("step", 5), ("phase", 0)):
        other = pb.Frame.FromString(second.SerializeToString())
        setattr(other, field, value)
        with pytest.raises(FrameError, match="activation of step 4, phase 1 was expected"):
            wire.unpack(first, lambda other=other: other, place, (2, 4), "fp32")
    first.part.tensor.parts = 1 << 31
    with pytest.raises(TooLargeError, match="2147483648 parts"):
        wire.unpack(first, lambda: pytest.fail("asked for more"), place, (2, 4), "fp32")


@pytest.mark.parametrize("zero", [0, 127])
def test_coded_bytes_that_are_noise(zero: int) -> None:
    """Every answer is a surprise, and the symbols that come of them may be none: refused, and never written."""
    generator = np.random.default_rng(zero)
    for size in (0, 3, 400, 20_000):
        with pytest.raises(CodecError, match="coded symbols"):
            context.decode(bytes(LINEAGE) + generator.bytes(size), (8, 4, 12, 12), zero)


@pytest.mark.parametrize("name", ["int8", "step:12"])
def test_a_frame_that_inflates_to_gigabytes_costs_no_memory(name: str) -> None:
    """Four frames that would unpack to 4 GB: with the size declared, and without."""
    chunk, count = bytes(1 << 24), 256
    lying = []
    for declared in (count << 24, -1):
        compressor = zstandard.ZstdCompressor(level=3).compressobj(size=declared)
        lying.append(b"".join([compressor.compress(chunk) for _ in range(count)] + [compressor.flush()]))
    heads = {"int8": b"\1" + np.ones(8, "<f4").tobytes(), "step:12": header(PACKED, 1) + struct.pack("<BI", 2, 0)}
    for bomb in lying:
        head = heads[name]
        tracemalloc.start()
        with pytest.raises(CodecError, match="were expected"):
            codec(name).decode(head + bomb, SHAPE)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 * len(bomb) + 100_000


@names
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_decoding_takes_a_small_multiple_of_the_tensor(name: str) -> None:
    """By what the system counts: memory of compiled code is unknown to Python."""
    tensor = np.tile(TENSOR, (16, 4, 4, 4))
    data = bytes(codec(name).encode(tensor))
    codec(name).decode(payload(name), SHAPE)  # what is loaded or compiled for the first one stays
    memory.give_back()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = resident("VmRSS")
    codec(name).decode(data, tensor.shape)
    assert resident("VmHWM") - before < 4 * tensor.nbytes


def resident(name: str) -> int:
    """Bytes that the system counts for this process, now (VmRSS) or at most (VmHWM)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[name].split()[0])


def test_refusing_leaves_nothing_behind() -> None:
    """Thousands of damaged payloads, and the process is no larger than after the first ones."""
    process, generator = psutil.Process(), np.random.default_rng(0)
    good = {name: payload(name, DITHERED) for name in ("step:12", "context:12")}
    sizes = []
    for _ in range(3):
        for name, data in good.items():
            for _ in range(400):
                damaged = bytearray(data)
                damaged[generator.integers(len(data))] ^= int(generator.integers(1, 256))
                survives(name, bytes(damaged), aside=DITHERED)
        sizes.append(process.memory_info().rss)
    assert sizes[-1] - sizes[0] < 8 << 20
