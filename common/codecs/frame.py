"""One zstd frame of known size: the only place where bytes from outside are decompressed."""

from __future__ import annotations

from typing import Any

import zstandard
from numpy.typing import NDArray

from common.codecs.base import Buffer
from common.errors import CodecError

# Level 1 with a small hash table: quantised tensors are noise to a match finder, which only runs of zeros should
# interest. Fewer bytes than level 1 as it is, and quicker; docs/codec.md has the ratios.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, hash_log=7)
# Far above what any level needs for one frame; a frame that asks for more is refused.
_WINDOW = 2**27


def compress(*parts: Buffer | NDArray[Any]) -> bytes:
    """One frame of all parts, each with blocks, and so Huffman codes, of its own."""
    compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    views = [memoryview(part) for part in parts]  # type: ignore[arg-type]
    if len(views) == 1:
        return compressor.compress(views[0])
    stream = compressor.compressobj(size=sum(view.nbytes for view in views))
    pieces: list[bytes] = []
    for view in views:
        pieces += (stream.compress(view), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    return b"".join((*pieces, stream.flush()))


def decompress(frame: Buffer, expected: int) -> bytes:
    """The `expected` bytes in `frame`, and nothing before, after or beyond: no more than that is ever allocated."""
    try:
        # python-zstandard ignores max_output_size when the frame declares a size, so that is compared first.
        declared = zstandard.frame_content_size(frame)
        if declared != expected:
            raise CodecError(f"the zstd frame declares {declared} bytes, {expected} were expected")
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        return decompressor.decompress(frame, max_output_size=expected, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"the zstd frame is damaged: {error}") from error


def bound(size: int) -> int:
    """The most bytes that `compress` makes of `size`: ZSTD_COMPRESSBOUND."""
    return size + (size >> 8) + 512
