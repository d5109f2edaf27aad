"""Codec `auto`: zstd where the link is fast, context coding where it is slow, and the same training either way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import counters, inprocess
from common.chooser import Chooser
from common.codecs import NOTHING, Aside, codec
from common.codecs.base import Buffer
from common.tcp_info import Flow
from device_client.data import load
from tests.conftest import needs_link
from tests.test_codecs import activation, gradient


class Link:
    """A connection that takes `rate` bytes a second: what the kernel would tell of it after each payload."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self.flow = Flow(0, 0.0, 0.1)

    def sent(self, payload: Buffer) -> None:
        if self.rate:
            busy = self.flow.busy_s + len(payload) / self.rate + self.flow.delay_s
            self.flow = Flow(self.flow.acknowledged + len(payload), busy, 0.1)

    def read(self) -> Flow | None:
        return self.flow if self.rate else None


def coders(rate: float | None, sends: int, tensor: np.ndarray, aside: Aside = NOTHING) -> list[str]:
    """Which coder made each of so many payloads."""
    link = Link(rate)
    chooser, result = Chooser(link.read), []
    chosen = {coder: bytes(codec(f"{coder}:15").encode(tensor, aside)) for coder in ("step", "context")}
    assert len(chosen["context"]) < len(chosen["step"])
    by = {payload: coder for coder, payload in chosen.items()}
    for _ in range(sends):
        payload = bytes(chooser.encode(codec("auto:15"), tensor, aside))
        link.sent(payload)
        result.append(by[payload])
    return result


def test_a_slow_link_gets_the_smaller_payload() -> None:
    assert coders(500.0, 6, activation()) == ["step"] * 3 + ["context"] * 3
    large_where_active = (gradient() * activation()).astype(np.float32)
    assert coders(500.0, 5, large_where_active, Aside((0, 0, 3), activation() > 0))[-1] == "context"


@pytest.mark.parametrize("rate", [1e10, None])
def test_a_fast_or_unknown_link_gets_the_faster_coder(rate: float | None) -> None:
    assert set(coders(rate, 6, activation())) == {"step"}


def test_a_link_that_changes_is_followed() -> None:
    link, tensor, sizes = Link(1e10), activation(), []
    chooser = Chooser(link.read)
    for send in range(200):
        if send in (70, 140):
            link.rate = {70: 2e3, 140: 1e10}[send]
        payload = chooser.encode(codec("auto:15"), tensor, NOTHING)
        link.sent(payload)
        sizes.append(len(payload))
    assert sizes[0] == sizes[60] == sizes[199] > sizes[139], "what it was long ago does not count"


def test_other_codecs_are_left_alone() -> None:
    tensor = activation()
    assert Chooser(Link(1.0).read).encode(codec("step:15"), tensor, NOTHING) == codec("step:15").encode(tensor)


@needs_link
@pytest.mark.timeout(300)  # over a slow link
def test_on_a_shaped_link_the_sender_changes_over_where_that_pays(tmp_path: Path) -> None:
    """Through tbf at 0.2 Mbit/s the rate is what TCP measured, and whoever codes, training is the same."""
    text = counters.RECIPE.format(codec="context:15", epochs=0.13, side=16)
    inprocess.train(text, load("digits", (1, 16, 16), 0, 0.0), folder=tmp_path / "context")
    counters.measure(tmp_path / "auto", "auto:15", 0.13, rate="200kbit")
    context, auto = (
        [json.loads(line) for line in (tmp_path / name / "device" / "metrics.jsonl").read_text().splitlines()]
        for name in ("context", "auto")
    )
    assert [line["loss"] for line in auto] == [line["loss"] for line in context]
    before, fewer = (line[0]["bytes"]["up"] for line in (auto, context))
    assert fewer < before
    saved, cost = (before - fewer) / 25_000, auto[3]["seconds"]["encode"]  # where both coders were tried
    # A tensor's announcement has its codec's name, and "context" is longer.
    changed = all(c["bytes"]["up"] - a["bytes"]["up"] == 3 for a, c in zip(auto[4:], context[4:], strict=True))
    # A machine that codes too slowly for this link is right to stay with zstd; decoding takes as long as encoding.
    assert changed or saved < 2.5 * cost
