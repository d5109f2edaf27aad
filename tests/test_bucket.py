"""The token bucket, on a clock of the test's own."""

from __future__ import annotations

import math

from edge_server.bucket import Bucket
from edge_server.callers import _REMEMBERED, Callers
from edge_server.limits import Limits


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_then_the_rate_holds() -> None:
    clock = Clock()
    bucket = Bucket(10.0, 50.0, clock)
    assert bucket.take(50) == 0, "as much as it holds, at once"
    assert bucket.take(1) == 0.1, "past it there is a wait"
    assert bucket.take(19) == 2.0, "and what others wait for comes first"
    clock.now += 2.0
    assert bucket.take(0) == 0 and bucket.take(10) == 1.0


def test_what_is_taken_over_a_long_time_is_the_rate() -> None:
    clock = Clock()
    bucket = Bucket(1000.0, 500.0, clock)
    taken = 0
    for _ in range(400):
        taken += 70
        clock.now += bucket.take(70)
    assert abs(taken - 500 - 1000 * (clock.now - 100)) < 1e-6


def test_it_never_holds_more_than_its_burst() -> None:
    clock = Clock()
    bucket = Bucket(10.0, 5.0, clock)
    clock.now += 1e6
    assert bucket.full and bucket.take(5) == 0 and not bucket.full and bucket.take(10) == 1.0


def test_spare_takes_what_is_there_or_nothing() -> None:
    clock = Clock()
    bucket = Bucket(1.0, 2.0, clock)
    assert [bucket.spare(1) for _ in range(3)] == [True, True, False]
    clock.now += 1.0
    assert bucket.spare(1) and not bucket.spare(1), "what was refused has cost nothing"


def test_without_a_rate_nothing_waits() -> None:
    bucket = Bucket(math.inf, math.inf, Clock())
    assert bucket.take(1e18) == 0 and bucket.spare(1e18) and bucket.full


def test_callers_that_do_nothing_are_forgotten() -> None:
    """A million addresses cost no memory; who has a call open, or is over a rate, is remembered."""
    clock = Clock()
    callers = Callers(Limits(), clock)
    callers["greedy"].often.take(1e6)
    with callers.call("patient") as patient:
        for number in range(20 * _REMEMBERED):
            clock.now += 0.1
            callers[f"address {number}"].often.take(1)
            assert len(callers) <= _REMEMBERED + 2
        assert callers["patient"] is patient
    assert callers["greedy"].often.take(0) > 0
