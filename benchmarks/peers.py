"""What others send, by their published formulas: what the codecs here are compared with.

Each peer is a function from a float32 tensor [B, C, H, W] to (the bytes it would send, what the other side has).
They are written plainly and for their sizes and errors; their speed here says nothing about the originals.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import zstandard

Sent = tuple[bytes, np.ndarray]
Peer = Callable[[np.ndarray], Sent]


def fp16(tensor: np.ndarray) -> Sent:
    half = tensor.astype(np.float16)
    return half.tobytes(), half.astype(np.float32)


def bf16(tensor: np.ndarray) -> Sent:
    half = torch.from_numpy(tensor).bfloat16()
    return half.view(torch.int16).numpy().tobytes(), half.float().numpy()


def affine(bits: int) -> Peer:
    """Minimum and maximum of each channel, `bits` an element, two elements a byte where they fit."""

    def send(tensor: np.ndarray) -> Sent:
        low, high = tensor.min((0, 2, 3), keepdims=True), tensor.max((0, 2, 3), keepdims=True)
        scale = np.maximum(high - low, 1e-30) / (2**bits - 1)
        codes = np.rint((tensor - low) / scale).astype(np.uint8)
        # Channel by channel, as our own codecs: alike beside alike.
        flat = codes.transpose(1, 0, 2, 3).reshape(-1)
        packed = flat if bits == 8 else flat[0::2] | flat[1::2] << 4
        return b"".join((low.tobytes(), scale.tobytes(), packed.tobytes())), codes * scale + low

    return send


def _by_codebook(tensor: np.ndarray, codes: np.ndarray) -> Sent:
    """256 float32 beside the codes: the mean of what fell on each."""
    counts = np.maximum(np.bincount(codes.reshape(-1), minlength=256), 1)
    book = (np.bincount(codes.reshape(-1), tensor.reshape(-1), 256) / counts).astype(np.float32)
    return book.tobytes() + codes.astype(np.uint8).tobytes(), book[codes]


def uniform8(tensor: np.ndarray) -> Sent:
    """hivemind's Uniform8BitQuantization: 256 bins over six standard deviations around the mean."""
    centred = tensor - tensor.mean()
    scale = 6 * centred.std(ddof=1) / 256
    return _by_codebook(tensor, np.clip(np.rint(centred / scale) + 128, 0, 255).astype(np.int64))


def quantile8(tensor: np.ndarray) -> Sent:
    """hivemind's Quantile8BitQuantization: 256 bins of as many elements each."""
    borders = np.quantile(tensor.reshape(-1)[::7], np.linspace(0, 1, 257)[1:-1])
    return _by_codebook(tensor, np.searchsorted(borders, tensor, "right"))


def _dynamic_map() -> np.ndarray:
    """The 256 values of bitsandbytes' signed dynamic 8-bit type: seven decades, the finer the larger."""
    values = [0.0, 1.0]
    for exponent in range(7):
        borders = np.linspace(0.1, 1, 2**exponent + 1)
        means = (borders[:-1] + borders[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


def blockwise8(tensor: np.ndarray) -> Sent:
    """hivemind's BlockwiseQuantization, which is bitsandbytes': largest element of 4096, dynamic type."""
    book = _dynamic_map()
    blocks = np.pad(tensor.reshape(-1), (0, -tensor.size % 4096)).reshape(-1, 4096)
    scale = np.maximum(np.abs(blocks).max(1, keepdims=True), 1e-30)
    codes = np.searchsorted((book[1:] + book[:-1]) / 2, blocks / scale)
    back = (book[codes] * scale).reshape(-1)[: tensor.size].reshape(tensor.shape)
    sent = codes.astype(np.uint8).reshape(-1)[: tensor.size]
    return b"".join((scale.tobytes(), book.tobytes(), sent.tobytes())), back.astype(np.float32)


def zeropoint8(tensor: np.ndarray) -> Sent:
    """SecretFlow's QuantizedZeroPoint: one affine map for the whole tensor, int8."""
    low, high = float(tensor.min()), float(tensor.max())
    scale = max(high - low, 1e-30) / 255
    zero = float(np.rint(np.clip(-128 - low / scale, -128, 127)))
    codes = np.clip(np.rint(tensor / scale + zero), -128, 127)
    return codes.astype(np.int8).tobytes() + bytes(16), ((codes - zero) * scale).astype(np.float32)


def topk(share: float) -> Peer:
    """SecretFlow's top-k sparsity: the largest elements as float32, their places as int32."""

    def send(tensor: np.ndarray) -> Sent:
        flat = tensor.reshape(-1)
        places = np.sort(np.argpartition(-np.abs(flat), int(share * flat.size))[: int(share * flat.size)])
        back = np.zeros_like(flat)
        back[places] = flat[places]
        return flat[places].tobytes() + places.astype(np.int32).tobytes(), back.reshape(tensor.shape)

    return send


def with_zstd(peer: Peer) -> Peer:
    """The same with zstd, level 3, around what it sends."""

    def send(tensor: np.ndarray) -> Sent:
        data, back = peer(tensor)
        return zstandard.ZstdCompressor(level=3).compress(data), back

    return send


EIGHT_BIT: dict[str, Peer] = {
    "uint8 a channel": affine(8), "uniform8 (hivemind)": uniform8, "quantile8 (hivemind)": quantile8,
    "blockwise8 (hivemind)": blockwise8, "zero-point 8 (SecretFlow)": zeropoint8,
}  # fmt: skip
PEERS: dict[str, Peer] = {
    "fp16": fp16, "bf16": bf16, **EIGHT_BIT, "uint4 a channel": affine(4), "top-k 10 % (SecretFlow)": topk(0.1),
}  # fmt: skip
