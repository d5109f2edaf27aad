"""`make fuzz`: atheris throws bytes at the decoders; anything but a CodecError or a sound tensor is a crash.

The first byte chooses codec, shape and what is agreed on aside; the rest is the payload. The checksum of the mask is
put right before decoding, for no fuzzer guesses it. The corpus starts with a real payload of each choice and grows in
fuzz/corpus. A first byte from 128 on makes a payload whose frames are sound, with the bytes inside.
"""

from __future__ import annotations

import math
import os
import resource
import struct
import sys
import zlib
from pathlib import Path

import atheris

# What numba compiles has no bounds that are checked, and needs none: here that is put to the test.
os.environ |= {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": "fuzz/compiled"}
with atheris.instrument_imports(include=["common"], exclude=["common.codecs.loops", "common.codecs.mixing"]):
    import numpy as np

    from common.codecs import NOTHING, Aside, codec, context, dither, frame, payload  # noqa: F401 - all that decodes
    from common.errors import CodecError

CORPUS = Path("fuzz/corpus")
NAMES = ("step:12", "context:12", "int8", "fp16", "fp32")
SHAPES = ((4, 4, 9, 9), (16, 24), (2, 3, 50), (1, 1, 1, 1), (2, 20, 4, 5))  # more channels than a context looks at
_GENERATOR = np.random.default_rng(0)
_TENSORS = [_GENERATOR.laplace(size=shape).astype(np.float32) for shape in SHAPES]
_SUPPORTS = [tensor > 0 for tensor in _TENSORS]
# The fuzzer itself keeps about 1.4 kB of every input.
_MEMORY = 8 << 30


def plan(choice: int) -> tuple[str, int, Aside]:
    """Codec, number of the shape, and what is agreed on, for a first byte."""
    name, choice = NAMES[choice % 5], choice // 5
    which, choice = choice % 5, choice // 5
    asides = (NOTHING, Aside((1, 2, 3)), Aside(None, _SUPPORTS[which]), Aside((1, 2, 3), _SUPPORTS[which]))
    return name, which, asides[choice % 4]


def write_corpus() -> None:
    """A real payload for each choice."""
    CORPUS.mkdir(parents=True, exist_ok=True)
    for choice in range(256):
        name, which, aside = plan(choice)
        if choice >= 128:
            (CORPUS / f"{choice:03}").write_bytes(
                bytes([choice]) + _GENERATOR.bytes(3) + b"\0" + _GENERATOR.bytes(2000)
            )
            continue
        tensor = _TENSORS[which] if aside.dither else np.abs(_TENSORS[which])
        (CORPUS / f"{choice:03}").write_bytes(bytes([choice]) + bytes(codec(name).encode(tensor, aside)))


def mended(given: bytes, name: str, aside: Aside) -> bytes:
    """`given` with the checksum of the mask put right, which no fuzzer guesses."""
    if ":" not in name or len(given) < 14 or aside.mask is None or given[0] & 3 < 2:
        return given
    checksum = struct.pack("<I", zlib.crc32(np.packbits(aside.mask.reshape(-1)).data))
    return given[:10] + checksum + given[14:]


def resized(data: bytes, size: int) -> bytes:
    return data[:size] + bytes(max(0, size - len(data)))


def inside(data: bytes, name: str, aside: Aside, shape: tuple[int, ...]) -> bytes:
    """A payload of codec `step` whose frames and lengths are sound, and what is in them `data`: past zstd's checks.

    With every second one escapes and outliers are as many as it says.
    """
    flags = (12 if aside.dither else data[0] & 4) | (20 if aside.mask is not None else 0)
    count = int(np.count_nonzero(aside.mask)) if aside.mask is not None else math.prod(shape)
    level, outliers = 0 if flags & 4 else max(1, data[1]), data[1] % 4
    if name != "step:12":
        return struct.pack("<BfBII", 3 | flags, 0.5, level, outliers, 0) + data[:4] * outliers + data[4:]
    digits, sent = (2, 4)[data[2] % 2], len(dither.numbers(aside.dither, count)) if aside.dither else count
    packed = np.frombuffer(resized(data[4:], -(-sent // digits)), np.uint8)
    bits, rest = 8 // digits, data[4 + len(packed) :]
    places = (packed[:, None] >> bits * np.arange(digits) & (1 << bits) - 1).reshape(-1)[:sent]
    escaped = int(np.count_nonzero(places == (1 << bits) - 1))
    symbols = resized(rest, escaped)
    if data[3] % 2:
        escapes, tail = data[3] % (sent + 1), resized(rest[escaped:], 4 * outliers)
        symbols = resized(rest, escapes)
    else:
        escapes, outliers = escaped, symbols.count(255)
        if aside.dither:  # some are no elements but fill up a row: which are outliers is not known here
            symbols, outliers = symbols.replace(b"\xff", b"\xfe"), 0
        tail = (np.frombuffer(resized(rest[escaped:], 4 * outliers), "<i4") % (1 << 30) + 255).astype("<i4").tobytes()
    body = frame.compress(packed.tobytes() + symbols + tail)
    return struct.pack("<BfBII", 2 | flags, 0.5, level, outliers, 0) + struct.pack("<BI", digits, escapes) + body


def test_one(data: bytes) -> None:
    if not data:
        return
    name, which, aside = plan(data[0])
    given = data[1:]
    if data[0] >= 128 and ":" in name and len(given) > 8:
        given = inside(given, name, aside, SHAPES[which])
    given = mended(given, name, aside)
    try:
        back = codec(name).decode(given, SHAPES[which], aside)
    except CodecError:
        return
    assert back.shape == SHAPES[which] and back.dtype == np.float32 and np.isfinite(back).all()


def main() -> None:
    write_corpus()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    # A decode that takes longer than this many seconds counts as a hang.
    arguments = [
        sys.argv[0],
        str(CORPUS),
        "-timeout=10",
        "-max_len=6000",
        "-len_control=0",
        "-print_final_stats=1",
        "-rss_limit_mb=6000",
        *sys.argv[1:],
    ]
    atheris.Setup(arguments, test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
