"""Codecs: round trip, error bound, size bound and odd inputs, for each; and bytes that lie."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.codecs import CODECS
from common.errors import CodecError, DivergedError

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=7)
VALUES = st.floats(-(2.0**100), 2.0**100, width=32)
TENSORS = hnp.arrays(np.float32, SHAPES, elements=VALUES)
names = pytest.mark.parametrize("name", sorted(CODECS))


def allowed_error(name: str, tensor: np.ndarray) -> np.ndarray:
    """The most that an element may be off."""
    if name == "fp32":
        return np.zeros_like(tensor)
    if name == "fp16":
        # Half a unit in the last place; what is past 65504 is clamped; 2^-25 is half the smallest number.
        return np.where(np.abs(tensor) > 65504, np.abs(tensor), np.abs(tensor) * 2.0**-11 + 2.0**-25)
    axes = tuple(axis for axis in range(tensor.ndim) if axis != 1 or tensor.ndim == 1)
    amax = np.abs(tensor).max(axis=axes, keepdims=True, initial=0)
    return np.broadcast_to(amax / 127 * 0.5001 + 2e-35, tensor.shape)


@names
@settings(max_examples=150, deadline=None)
@given(tensor=TENSORS)
def test_round_trip(name: str, tensor: np.ndarray) -> None:
    codec = CODECS[name]
    payload = codec.encode(tensor)
    assert len(payload) <= codec.bound(tensor.shape)
    back = codec.decode(payload, tensor.shape)
    assert back.shape == tensor.shape and back.dtype == np.float32
    assert np.all(np.abs(back.astype(np.float64) - tensor) <= allowed_error(name, tensor.astype(np.float64)))
    assert np.all(back[tensor == 0] == 0)


@names
@settings(max_examples=150, deadline=None)
@given(junk=st.binary(max_size=200), shape=SHAPES)
def test_any_bytes_decode_or_are_refused(name: str, junk: bytes, shape: tuple[int, ...]) -> None:
    try:
        back = CODECS[name].decode(junk, shape)
    except CodecError:
        return
    assert back.shape == shape and np.all(np.isfinite(back))


@names
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_sent(name: str, value: float) -> None:
    tensor = np.ones((2, 3, 4), np.float32)
    tensor[1, 2, 3] = value
    with pytest.raises(DivergedError):
        CODECS[name].encode(tensor)


@names
def test_non_contiguous_tensors(name: str) -> None:
    tensor = np.arange(240, dtype=np.float32).reshape(4, 5, 12)[:, :, ::2].transpose(2, 1, 0)
    codec = CODECS[name]
    np.testing.assert_array_equal(
        codec.decode(codec.encode(tensor), tensor.shape),
        codec.decode(codec.encode(np.ascontiguousarray(tensor)), tensor.shape),
    )


@names
def test_truncated_and_trailing_bytes(name: str) -> None:
    tensor = np.random.default_rng(0).normal(size=(4, 8, 5, 5)).astype(np.float32)
    payload = bytes(CODECS[name].encode(tensor))
    for damaged in (payload[:-1], payload + b"\0", b""):
        with pytest.raises(CodecError):
            CODECS[name].decode(damaged, tensor.shape)


def test_sizes_on_a_sparse_activation() -> None:
    tensor = np.maximum(np.random.default_rng(0).normal(size=(32, 32, 8, 8)) - 1, 0).astype(np.float32)
    sizes = {name: len(codec.encode(tensor)) / tensor.size for name, codec in CODECS.items()}
    assert (sizes["fp32"], sizes["fp16"]) == (4, 2)
    assert sizes["int8"] < 0.35


def test_a_frame_that_inflates_is_refused_unread() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    with pytest.raises(CodecError, match="declares 67108864 bytes, 16 were expected"):
        CODECS["int8"].decode(b"\1" + np.ones(4, "<f4").tobytes() + bomb, (4, 4))
