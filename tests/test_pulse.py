"""Dead and stuck links: the judgement alone, then over real sockets with its times made short. What found a link is
told by the words of the reconnect; how long it took is no test's matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import pair
from benchmarks.faults import points, proxy
from benchmarks.faults.proxy import Fault, Moment, Proxy
from benchmarks.recipes import BATCH, CLASSES, PHASE, recipe_text
from common import channel
from common.meter import DOWN, UP
from common.pulse import SILENT_S, STALLED_S, Pulse
from common.rpc import split_pb2 as pb
from common.tcp_info import Moved
from device_client import link
from device_client.remote_tail import RemoteTail
from edge_server import watch
from edge_server.limits import Limits
from edge_server.watch import Watch


def judged(moved: Callable[[int], Moved | None], due: float | None = 0.0, seconds: int = 700) -> tuple[int, str]:
    """When something was wrong, and what; (seconds, "") where nothing was."""
    pulse = Pulse(0.0)
    for now in range(seconds):
        if wrong := pulse.look(now, moved(now), due):
            return now, wrong
    return seconds, ""


def test_a_slow_link_lives() -> None:
    assert judged(lambda now: Moved(50 * now, 0)) == (700, "")
    assert judged(lambda now: Moved(0, 50 * now)) == (700, "")
    # Nothing new for a while, for all is sent twice.
    assert judged(lambda now: Moved(0, 0, now // 2), due=None) == (700, "")
    # 14 kbit/s up for ten minutes, then the answer takes as long to come down.
    assert judged(lambda now: Moved(1750 * min(now, 600), 1750 * max(0, now - 609)), seconds=1200) == (1200, "")


def test_a_link_on_which_no_ping_is_answered_is_dead() -> None:
    assert judged(lambda now: Moved(0, 0))[0] == SILENT_S
    # What stands between confirms the pings of TCP's own, and hands nothing on.
    when, wrong = judged(lambda now: Moved(40 * (now // 10), 0, now // 10), due=None)
    assert when == SILENT_S and "the link is dead" in wrong
    # Not at the end of something that was long under way.
    assert judged(lambda now: Moved(1750 * min(now, 100), 0))[0] == 99 + 1 + SILENT_S


def test_a_link_that_only_answers_pings_is_stuck_where_more_is_due() -> None:
    def pings(now: int) -> Moved:
        """Of both sides with their answers, in records of TLS."""
        return Moved(2 * 40 * (now // 10), 2 * 40 * (now // 10))

    when, wrong = judged(pings)
    assert when == STALLED_S and "the link is stuck" in wrong
    assert judged(pings, due=50.0)[0] == 50 + STALLED_S
    assert judged(pings, due=None) == (700, "")


def test_where_the_kernel_does_not_tell_nothing_is_judged() -> None:
    assert judged(lambda now: None) == (700, "")


def test_two_pings_fit_into_the_silence_and_the_server_allows_them() -> None:
    """Thrice as often as it may come, a ping counts as an attack (GOAWAY)."""
    device, server = dict(channel.DEVICE_OPTIONS), dict(channel.SERVER_OPTIONS)
    assert 2 * device["grpc.keepalive_time_ms"] <= 1000 * SILENT_S <= 30_000
    assert 2 * server["grpc.http2.min_ping_interval_without_data_ms"] <= device["grpc.keepalive_time_ms"]


def test_the_server_ends_the_streams_of_dead_links_and_lets_go_of_their_sockets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Socket:
        come = 0
        closed = False

        def moved(self) -> Moved:
            self.come += self.lives
            return Moved(0, self.come)

        def close(self) -> None:
            self.closed = True

        def __init__(self, lives: bool) -> None:
            self.lives = lives

    sockets = {"dead": Socket(False), "alive": Socket(True)}
    monkeypatch.setattr(watch, "find_peer", sockets.get)
    told: list[str] = []
    watched, ended = Watch(Limits(), told.append), []

    def context(name: str) -> Any:
        return SimpleNamespace(peer=lambda: name, cancel=lambda: ended.append(name))

    with watched.over(context("dead")) as first, watched.over(context("alive")) as second:
        first.session = second.session = SimpleNamespace(touched=0.0)
        for now in range(1, int(SILENT_S) + 1):
            watched.tend(now)
        assert not ended
        for later in (1, 3):  # what is computed for it may take longer, and is told of once
            watched.tend(SILENT_S + later)
            assert ended == ["dead"] and "the link is dead" in told[0] and len(told) == 1
    watched.tend(SILENT_S + 5)
    assert sockets["dead"].closed and sockets["alive"].closed


def test_silence_is_that_of_a_whole_session_while_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has pictures judged says nothing of training; and while the server computes nobody need speak."""
    monkeypatch.setattr(watch, "find_peer", lambda _: None)
    ended: list[str] = []
    watched = Watch(Limits(idle_s=10, first_frame_s=3), lambda _: None)

    def context(name: str) -> Any:
        return SimpleNamespace(peer=lambda: name, cancel=lambda: ended.append(name))

    with (
        watched.over(context("training")) as training, watched.over(context("judging")) as judging,
        watched.over(context("new")) as new,
    ):  # fmt: skip
        training.session = judging.session = session = SimpleNamespace(touched=100.0)
        training.waits, judging.waits, new.waits = 100.0, None, 119.0
        watched.tend(120.0)
        assert not ended, "the server is at work for it"
        judging.waits, session.touched = 121.0, 121.0
        watched.tend(123.0)
        assert ended == ["new"], "which has not said what it wants"
        with judging.waiting():
            pass
        assert judging.waits is None and session.touched != 121.0, "it was heard"
        judging.waits, session.touched = 121.0, 125.0
        watched.tend(134.0)
        assert ended.count("new") == len(ended), "it was heard on the other stream"
        watched.tend(136.0)
        assert {"training", "judging"} <= set(ended)


# Over real sockets


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("pulse")
    (path / "recipe.toml").write_text(recipe_text(schedule="phases = [[0, 1000]]", data="batch = 32\nvalidation = 0.1"))
    with pair.server(path / "recipe.toml", "--run", path / "run", "--threads", 1, log=path / "log") as (_, address):
        yield address


@pytest.fixture(scope="module")
def device(address: str) -> Iterator[tuple[RemoteTail, Proxy, list[str]]]:
    """One in training, a proxy on its way, and what it says of its link. Stuck is what stands still for 3 s."""
    with Proxy(address) as between:
        remote, said = RemoteTail(between.address, give_up_s=120, stalled_s=3), []
        remote.say = said.append
        remote.open(trains=True)
        remote.begin(1438, CLASSES)
        remote.learn(0, PHASE, *BATCH)
        yield remote, between, said
        remote.close()


def steps_over(device: tuple[RemoteTail, Proxy, list[str]], fault: Fault) -> list[str]:
    """Steps that suffer `fault`; what was said of the link, until it was back."""
    remote, between, said = device
    remote._lose()  # the next stream is looked at with the times of this test
    first = between.step + 1
    remote.learn(first, PHASE, *BATCH)
    said.clear()
    reconnects = remote.faults.reconnects
    between.arm(fault)
    for step in (first + 1, first + 2):
        _, result, _ = remote.learn(step, PHASE, *BATCH)
        assert np.isfinite(result.loss)
    assert fault.fired.is_set() and remote.faults.reconnects > reconnects
    assert said.pop().startswith("connected again, at step")
    return said


@pytest.mark.parametrize("point", [points.FORWARD, points.BACKWARD, points.REPLY])
def test_a_black_hole_in_training(device: Any, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    monkeypatch.setattr(link, "Pulse", functools.partial(Pulse, silent_s=2.0))
    said = steps_over(device, Fault(proxy.HOLE, points.moment(point), points.part_of(point)))
    assert len(said) == 1 and "the link is dead" in said[0]


def test_a_black_hole_in_an_evaluation(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "Pulse", functools.partial(Pulse, silent_s=2.0))
    remote, between, said = device
    said.clear()
    fault = between.arm(Fault(proxy.HOLE, points.moment(points.EVALUATION), 0.5))
    batches = [BATCH] * 3
    verdict = remote.evaluate(lambda: batches, 96, pb.SUBSET_UNSPECIFIED, PHASE, CLASSES, between.step + 1)
    assert verdict.count == 96 and fault.fired.is_set()
    assert len(said) == 2 and "the link is dead" in said[0] and "connected again" in said[1]


def test_a_black_hole_under_the_weights(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "Pulse", functools.partial(Pulse, silent_s=2.0))
    remote, between, said = device
    remote._lose()
    said.clear()

    def weights(chunk: proxy.Chunk) -> proxy.Span | None:
        return next(
            (proxy.Span(s.start, s.end) for s in chunk.messages if s.frame and s.frame.role == pb.WEIGHTS), None
        )

    fault = between.arm(Fault(proxy.HOLE, weights))
    assert len(remote.head_weights()) == remote.opened.head_size
    assert fault.fired.is_set() and len(said) == 1 and "the link is dead" in said[0]


# By trial the bits of a header after which neither side sees an error: lengths that grow (not past 16 KiB, which is
# an error to a side that has not raised that yet), other kinds of frame, flags and streams.
@pytest.mark.parametrize(("way", "bit"), [(UP, 10), (UP, 14), (UP, 20), (DOWN, 25), (DOWN, 48), (DOWN, 70)])
def test_a_flipped_bit_in_a_frame_header(device: Any, way: str, bit: int) -> None:
    """Pings go on being answered, and each side waits for the other."""
    moment: Moment = points.http2(way, points.DATA)
    said = steps_over(device, Fault(proxy.FLIP, moment, bit=(bit + 0.5) / 72))
    assert len(said) == 1 and "the link is stuck" in said[0], said
