"""Codecs: round trip, error bound, size bound, exact zeros, unbiased rounding and odd inputs, for each of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.codecs import KINDS, NOTHING, Aside, codec, context, dither, loops, pack, quantise
from common.codecs.mixing import PARENTS
from common.errors import CodecError, DivergedError

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=7)
VALUES = st.floats(-(2.0**100), 2.0**100, width=32)
SMALL = hnp.arrays(np.float32, SHAPES, elements=VALUES)
NAMES = ("fp32", "fp16", "int8", "step:5", "step:30", "step:10:nearest", "context:5", "context:30", "auto:20")
STEPS = tuple(name for name in NAMES if ":" in name)
names = pytest.mark.parametrize("name", NAMES)
steps = pytest.mark.parametrize("name", STEPS)


@st.composite
def large(draw: st.DrawFn) -> np.ndarray:
    """Tensors above the size that `step` sends raw, of the kinds that cross a cut, and some that never should."""
    rank = draw(st.integers(1, 4))
    shape = {1: (700,), 2: (23, 17), 3: (5, 7, 19), 4: (3, 5, draw(st.integers(1, 13)), draw(st.integers(20, 30)))}[
        rank
    ]
    tensor = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape)
    kind = draw(st.sampled_from(["normal", "rectified", "sparse", "tailed", "outlier", "constant", "one", "zeros"]))
    if kind in ("rectified", "sparse"):
        tensor = np.maximum(tensor - (kind == "sparse") * 1.5, 0)
    if kind == "tailed":
        tensor = tensor**9
    if kind == "outlier":
        tensor.flat[tensor.size // 2] = 1e4
    if kind == "constant":
        tensor[...] = 3
    if kind in ("one", "zeros"):
        tensor[...] = 0
        tensor.flat[5] = kind == "one"
    return (tensor * 10.0 ** draw(st.sampled_from([-42, -30, -3, 0, 8, 28]))).astype(np.float32)


def asides(name: str, tensor: np.ndarray) -> list[Aside]:
    """Without anything aside, with dither, with a mask, with both."""
    mask = tensor > 0
    return [NOTHING, Aside((1, 2, 3)), Aside(None, mask), Aside((1, 2, 3), mask)] if ":" in name else [NOTHING]


def allowed_error(name: str, tensor: np.ndarray, aside: Aside) -> np.ndarray | float:
    """The most that an element may be off."""
    magnitude = np.abs(tensor)
    if name == "fp32":
        return 0.0
    if name == "fp16":
        # Half a unit in the last place; the smallest number is 2^-38 of the largest, and none is below float32's own.
        return magnitude * 2.0**-11 + magnitude.max(initial=0) * 2.0**-39 + 2.0**-149
    if name == "int8":
        axes = tuple(axis for axis in range(tensor.ndim) if axis != 1 or tensor.ndim == 1)
        return np.broadcast_to(magnitude.max(axis=axes, keepdims=True, initial=0) / 127 * 0.5001 + 2e-35, tensor.shape)
    sent = tensor if aside.mask is None else tensor[aside.mask]
    unsigned = bool(np.all(tensor >= 0)) and (aside.dither is None or name.endswith("nearest"))
    noisy = np.count_nonzero(sent) if unsigned else sent.size
    step = np.sqrt(12 * float(np.sum(sent**2)) / max(1, noisy)) * 10 ** (-codec(name).snr / 20)  # type: ignore[attr-defined]
    # Unsigned elements are decoded to where they lie in their step on average, so some are off by nearly all of it.
    return step * (1.001 if unsigned else 0.501) + magnitude * 1e-6


@names
@settings(max_examples=120)
@given(tensor=SMALL | large())
def test_round_trip(name: str, tensor: np.ndarray) -> None:
    for aside in asides(name, tensor):
        payload = codec(name).encode(tensor, aside)
        assert len(payload) <= codec(name).bound(tensor.shape)
        back = codec(name).decode(payload, tensor.shape, aside)
        assert back.shape == tensor.shape and back.dtype == np.float32
        exact, off = tensor.astype(np.float64), np.abs(back.astype(np.float64) - tensor)
        if aside.mask is not None and not np.array_equal(back, tensor):  # raw forms hand on everything
            assert np.all(back[~aside.mask] == 0)
            off = np.where(aside.mask, off, 0)
        assert np.all(off <= allowed_error(name, exact, aside))
        if aside.dither is None:
            assert np.all(back[tensor == 0] == 0)


@pytest.mark.parametrize("name", [name for name in NAMES if codec(name).exact_zeros])
@settings(max_examples=120)
@given(tensor=SMALL | large())
def test_the_receiver_knows_which_elements_are_zero(name: str, tensor: np.ndarray) -> None:
    tensor = np.abs(tensor)
    np.testing.assert_array_equal(codec(name).decode(codec(name).encode(tensor), tensor.shape) != 0, tensor != 0)


@settings(max_examples=60)
@given(tensor=large())
def test_context_coding_loses_nothing_that_step_keeps(tensor: np.ndarray) -> None:
    for snr in (5, 25):
        for aside in asides("step:5", tensor):
            by_step, by_context = codec(f"step:{snr}"), codec(f"context:{snr}")
            expected = by_step.decode(by_step.encode(tensor, aside), tensor.shape, aside)
            payload = by_context.encode(tensor, aside)
            np.testing.assert_array_equal(by_context.decode(payload, tensor.shape, aside), expected)
            np.testing.assert_array_equal(codec(f"auto:{snr}").decode(payload, tensor.shape, aside), expected)
            if payload[0] & 3 == 3:  # coded so: some hundred bytes may take a second, which `step` does not let in
                with pytest.raises(CodecError, match="coded by context, which this codec does not take"):
                    by_step.decode(payload, tensor.shape, aside)


def activation(shape: tuple[int, ...] = (32, 16, 16, 16)) -> np.ndarray:
    """Smooth and rectified, as behind a convolution."""
    smooth = np.random.default_rng(0).normal(size=shape)
    for _ in range(3):
        smooth = smooth + np.roll(smooth, 1, 2) + np.roll(smooth, 1, 3) + np.roll(smooth, (1, 1), (2, 3))
    return np.maximum(smooth, 0).astype(np.float32)


def gradient(shape: tuple[int, ...] = (32, 16, 16, 16)) -> np.ndarray:
    """Heavy-tailed, its pictures of very different size."""
    generator = np.random.default_rng(1)
    pictures = generator.exponential(size=(shape[0], *(1 for _ in shape[1:])))
    return (generator.laplace(size=shape) * pictures).astype(np.float32)


@pytest.mark.parametrize("shape", [(40, 5, 13, 11), (64, 3, 17, 16), (20, 6, 1, 900), (300, 7, 70), (2, 300, 6, 5)])
def test_context_coding_of_channels_from_each_other_loses_nothing(shape: tuple[int, ...]) -> None:
    """Channels that are much alike; fewer than each has parents, and more than are looked through."""
    base = gradient((shape[0], 1, *shape[2:]))
    alike = (base + 0.2 * gradient(shape)).astype(np.float32)
    for tensor in (alike, np.maximum(alike, 0)):
        for aside in asides("step:15", tensor):
            by_step, by_context = codec("step:15"), codec("context:15")
            expected, payload = by_step.encode(tensor, aside), by_context.encode(tensor, aside)
            if aside is NOTHING and tensor.min() == 0:
                assert len(payload) < len(expected)
            back = by_context.decode(payload, tensor.shape, aside)
            np.testing.assert_array_equal(back, by_step.decode(expected, tensor.shape, aside))


@given(st.data(), st.integers(1, 40))
def test_which_channels_are_like_which_is_packed_and_unpacked(data: st.DataObject, channels: int) -> None:
    parents = np.zeros((channels, PARENTS), np.uint8)
    for channel in range(1, channels):
        count = min(channel, PARENTS)
        parents[channel, :count] = data.draw(st.lists(st.integers(0, channel - 1), min_size=count, max_size=count))
    packed = context._pack_lineage(parents)
    assert len(packed) == context._lineage_size(channels)
    np.testing.assert_array_equal(context._unpack_lineage(packed, channels), parents)


def test_context_coding_sees_what_a_linear_bottleneck_has_mixed() -> None:
    """Each channel says much about the others there, which zstd never finds."""
    mixed = np.tensordot(np.random.default_rng(3).normal(size=(8, 4)), activation((32, 4, 16, 16)), (1, 1))
    mixed = np.ascontiguousarray(mixed.swapaxes(0, 1), np.float32)
    fast, slow = (len(codec(f"{coder}:20").encode(mixed)) for coder in ("step", "context"))
    assert slow < 0.6 * fast


def snr(tensor: np.ndarray, back: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(tensor.astype(float) ** 2) / np.sum((back.astype(float) - tensor) ** 2)))


@pytest.mark.parametrize("wanted", [3, 10, 20, 40])
@pytest.mark.parametrize("coder", ["step", "context"])
def test_the_snr_asked_for_is_met(coder: str, wanted: int) -> None:
    name = f"{coder}:{wanted}"
    for tensor, aside in ((activation(), NOTHING), (gradient(), NOTHING), (gradient(), Aside((0, 0, 3)))):
        reached = snr(tensor, codec(name).decode(codec(name).encode(tensor, aside), tensor.shape, aside))
        # Without dither, steps as coarse as the elements leave less noise than the step^2/12 that is reckoned with.
        assert wanted - 0.3 < reached < wanted + (5 if aside is NOTHING else 0.3)


@pytest.mark.parametrize("scale", [1e-25, 1e22])
def test_the_snr_is_met_where_float32_cannot_square(scale: float) -> None:
    tensor = gradient() * np.float32(scale)
    data = codec("step:20").encode(tensor)
    assert len(data) < tensor.nbytes / 3
    assert 19.7 < snr(tensor, codec("step:20").decode(data, tensor.shape)) < 22


@pytest.mark.parametrize("name", ["step:3", "step:15", "context:3"])
def test_rounding_with_dither_has_no_bias(name: str) -> None:
    """The mean over many steps comes to the gradient itself; to nearest it does not, whatever the number of steps."""
    tensor, count = gradient((8, 4, 8, 8)), 400
    power = np.sqrt(np.mean(tensor**2))

    def mean_error(wanted: str) -> float:
        total = np.zeros(tensor.shape)
        for step in range(count):
            aside = Aside((7, step, 3))
            total += codec(wanted).decode(codec(wanted).encode(tensor, aside), tensor.shape, aside)
        return float(np.sqrt(np.mean((total / count - tensor) ** 2)) / power)

    noise = 10 ** (-codec(name).snr / 20)  # type: ignore[attr-defined]
    assert mean_error(name) < 1.2 * noise / np.sqrt(count)
    assert mean_error(f"{name}:nearest") > 3 * noise / np.sqrt(count)


def test_dither_is_a_function_of_its_seed_alone() -> None:
    tensor = gradient()
    payloads = {seed: bytes(codec("step:10").encode(tensor, Aside(seed))) for seed in [(0, 0, 3), (0, 1, 3), (1, 0, 3)]}
    assert len(set(payloads.values())) == 3
    assert payloads[0, 0, 3] == codec("step:10").encode(tensor, Aside((0, 0, 3)))
    with pytest.raises(CodecError, match="differ in dither or mask"):
        codec("step:10").decode(payloads[0, 0, 3], tensor.shape)


def test_dither_is_splitmix64_with_a_number_in_each_quarter() -> None:
    """Against the published generator in plain integers, whose first words for start 0 are known."""
    words = np.empty(300, np.uint64)
    loops.draw(np.uint64(0), words)
    below, published = (1 << 64) - 1, []
    for at in range(1, 301):
        word = at * 0x9E3779B97F4A7C15 & below
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & below
        word = (word ^ word >> 27) * 0x94D049BB133111EB & below
        published.append(word ^ word >> 31)
    assert published[:2] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    lower = 0x3FFF3FFF3FFF3FFF
    assert [int(word) & lower for word in words] == [word & lower for word in published]
    numbers = dither.numbers((1, 2, 3), 1 << 16)
    quarters = (numbers >> 14).reshape(-1, 256, 4)
    assert np.all(np.sort(quarters, axis=2) == np.arange(4)), "of four in a row one lies in each"
    assert np.all(quarters == quarters[:, :1]), "in the same order all over a row"
    assert np.all(np.bincount(quarters[:, 0, 0], minlength=4) > 4), "which begins is drawn"


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dithered", [False, True])
def test_what_lies_at_the_edge_of_the_symbols_is_one_or_an_outlier(mask: bool, dithered: bool) -> None:
    """Within float32's rounding of 127.5 steps, where adding and flooring may disagree by one."""
    edges = np.float32([-128.5, -128, -127.5, -127, 126.5, 127, 127.5, 128, 128.5])
    for _ in range(3):
        edges = np.concatenate([np.nextafter(edges, np.float32(-1e9)), edges, np.nextafter(edges, np.float32(1e9))])
    noise = dither.numbers((0, 0, 3), edges.size * 64) if dithered else None
    tensor = np.tile(edges, 64)
    everywhere, back = np.ones(tensor.size, np.bool_), np.empty_like(tensor)
    if mask:
        symbols, outliers = quantise.signed_within(tensor, everywhere, tensor.size, np.float32(1), noise)
        quantise.restore_within(symbols, outliers, np.float32(1), noise, everywhere, back)
    else:
        symbols, outliers = quantise.signed(tensor.reshape(1, 1, -1), np.float32(1), noise)
        quantise.restore_signed(symbols, outliers, np.float32(1), noise, back.reshape(1, 1, -1))
    assert len(outliers) == np.count_nonzero(symbols == quantise.OUTLIER) > 0
    assert np.all(np.abs(outliers) > 127)
    assert np.max(np.abs(back - tensor)) < 0.5001


@pytest.mark.parametrize("zero", [0, 127])
@pytest.mark.parametrize("spread", [0.2, 0.5, 1, 2, 4, 16, 60])
def test_symbols_are_packed_as_small_as_either_way(spread: float, zero: int) -> None:
    """Within 4 % of the better of two and four digits a byte, and never much above a byte a symbol."""
    drawn = np.random.default_rng(7).laplace(0, spread, 1 << 16)
    symbols = np.clip(np.abs(drawn) if zero == 0 else drawn + zero, 0, 254).astype(np.uint8)
    sizes = []
    for few in (0, 1):  # escapes that four digits a byte may have: none, or all
        with mock.patch.object(pack, "_FEW_ESCAPES", few):
            sizes.append(len(pack.encode([symbols], zero)))
    chosen = pack.encode([symbols], zero)
    assert len(chosen) <= min(1.04 * min(sizes), len(symbols) + 600)
    assert np.array_equal(pack.decode(chosen, len(symbols), zero, 0)[0], symbols)


@steps
def test_outside_a_support_there_is_nothing(name: str) -> None:
    """Whatever form a payload has: coded, raw because it is small or odd, or none where all that is sent is zero."""
    for shape, scale in (((2, 8, 4, 2), 1.0), ((2, 8, 9, 9), 1.0), ((2, 8, 9, 9), 1e-42), ((2, 8, 9, 9), 0.0)):
        mask = np.arange(np.prod(shape)).reshape(shape) % 3 > 0
        mask.flags.writeable = False
        tensor = np.where(mask, np.float32(scale), np.float32(1))
        payload = codec(name).encode(tensor, Aside(None, mask))
        assert scale or len(payload) < 20
        back = codec(name).decode(payload, shape, Aside(None, mask))
        assert not back[~mask].any() and np.allclose(back[mask], scale, rtol=1)


GOLDEN = Path(__file__).parent / "golden"
GATED = np.arange(16 * 8 * 16 * 16).reshape(16, 8, 16, 16) * 7919 % 251 > 96


@pytest.mark.parametrize(
    ("name", "aside", "digest"),
    [
        ("step:12", Aside((5, 6, 3), GATED), "f925522c699838ab"),
        ("context:12", Aside((5, 6, 3), GATED), "f925522c699838ab"),
        ("step:20", NOTHING, "fb3ec734b18e4955"),
        ("context:20", NOTHING, "fb3ec734b18e4955"),
    ],
)
def test_payloads_mean_the_same_on_every_platform_and_release(name: str, aside: Aside, digest: str) -> None:
    """Recorded payloads, dithered and with a mask, and of an activation: who changes their meaning must change the
    protocol's version."""
    payload = (GOLDEN / f"{name.replace(':', '-')}.bin").read_bytes()
    back = codec(name).decode(payload, GATED.shape, aside)
    assert hashlib.sha256(back.astype("<f4").tobytes()).hexdigest()[:16] == digest


@names
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(2, 3, 4), (8, 8, 8, 8)])
def test_what_is_not_finite_is_never_sent(name: str, value: float, shape: tuple[int, ...]) -> None:
    tensor = np.ones(shape, np.float32)
    tensor.flat[17] = value
    with pytest.raises(DivergedError):
        codec(name).encode(tensor)


@names
def test_non_contiguous_tensors(name: str) -> None:
    tensor = np.arange(3840, dtype=np.float32).reshape(8, 10, 48)[:, :, ::2].transpose(2, 1, 0)
    chosen = codec(name)
    np.testing.assert_array_equal(
        chosen.decode(chosen.encode(tensor), tensor.shape),
        chosen.decode(chosen.encode(np.ascontiguousarray(tensor)), tensor.shape),
    )


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e30, 3e36])
def test_fp16_keeps_what_is_small_or_large_as_a_whole(size: float) -> None:
    """Gradients of a mean loss may be smaller than any number of its own."""
    tensor, chosen = gradient() * np.float32(size), codec("fp16")
    back = chosen.decode(chosen.encode(tensor), tensor.shape)
    noise, signal = (float(np.square(part.astype(np.float64)).sum()) for part in (back - tensor, tensor))
    assert 10 * np.log10(signal / noise) > 70


@names
def test_a_codec_knows_about_what_it_takes(name: str) -> None:
    """Budgets and forecasts reckon by it until they have seen steps."""
    chosen = codec(name)
    for tensor in (activation(), gradient()):
        takes = 8 * len(chosen.encode(tensor)) / tensor.size
        assert 0.5 < takes / chosen.bits < 1.3 if chosen.varies else takes == pytest.approx(chosen.bits, rel=1e-4)


def test_sizes_on_an_activation_and_a_gradient() -> None:
    up = {name: len(codec(name).encode(activation())) / activation().size for name in NAMES}
    assert up["fp32"] == 4 and up["fp16"] == pytest.approx(2, abs=1e-4)
    assert up["step:30"] < 0.8 * up["int8"] and up["step:5"] < 0.18
    assert up["context:30"] < 0.95 * up["step:30"] and up["context:5"] < up["step:5"]
    mask = np.random.default_rng(2).random(gradient().shape) < 0.5
    full = len(codec("step:10").encode(gradient(), Aside((0, 0, 3))))
    half = len(codec("step:10").encode(gradient(), Aside((0, 0, 3), mask)))
    assert half < 0.6 * full


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jpeg", "there is no codec 'jpeg'"),
        ("step", "step needs an SNR of 1 to 40 dB, such as step:15"),
        ("step:fine", "step needs an SNR"),
        ("context:99", "context needs an SNR"),
        ("step:nan", "step needs an SNR"),
        ("step:15:up", "'up' is no rounding"),
        ("step:15:nearest:1", "more settings than step takes"),
        ("int8:4", "more settings than int8 takes"),
    ],
)
def test_names_that_are_none(name: str, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        codec(name)


def test_every_kind_is_tested() -> None:
    assert {name.partition(":")[0] for name in NAMES} == set(KINDS)


def test_int8_sends_nothing_that_it_would_not_take() -> None:
    huge, int8 = np.full((2, 3, 4, 4), 2e38, np.float32), codec("int8")
    assert np.allclose(int8.decode(int8.encode(huge), huge.shape), huge)
    with pytest.raises(DivergedError, match="training has diverged"):
        int8.encode(-huge)  # codes of half the range: a scale of twice as much
