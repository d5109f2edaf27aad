"""Streams that break, and attempts to get one back."""

from __future__ import annotations

import contextlib
import gc
import math
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from rich.console import Console

from benchmarks import inprocess
from benchmarks.recipes import recipe_text
from common import wire
from common.errors import AuthError, BusyError, FaultError, FrameError, LinkError, MismatchError, StoppedError
from common.meter import UP, Draft, Meter
from common.recipe import parse
from common.rpc import split_pb2 as pb
from common.run import RunFolder
from common.wire import Place
from device_client.link import CURABLE, Backoff, Stream
from device_client.remote_tail import RemoteTail
from edge_server.host import Host
from edge_server.servicer import Servicer


class Lost(grpc.RpcError):
    """A call that raises itself where the link is lost, as gRPC's calls do."""

    def __next__(self) -> None:
        raise self

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "lost"

    def trailing_metadata(self) -> tuple[()]:
        return ()


class _Batch:
    """What a step holds while it waits for its answer."""


def _step() -> weakref.ref[_Batch]:
    batch = _Batch()
    stream = Stream(lambda _: Lost(), "127.0.0.1:1", watched=False)
    with pytest.raises(LinkError):
        stream.receive(Draft(Meter()))
    return weakref.ref(batch)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_attempts_may_go_on_for_days(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    backoff = Backoff(give_up_s=1e6)
    for _ in range(3000):
        backoff.wait(LinkError("lost"), lambda text: None)
    assert pauses[0] < 0.5 and max(pauses) < 25
    pauses.clear()
    Backoff(give_up_s=1e6).wait(BusyError("full", 5.0), lambda text: None)
    assert pauses[0] >= 5, "a server that says when is believed"


def test_a_fault_of_the_servers_own_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    backoff = Backoff(give_up_s=1e6)
    with pytest.raises(FaultError):
        for _ in range(10):
            backoff.wait(FaultError("its log has the details"), lambda text: None)


def test_refusals_between_lost_links_are_not_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad link damages a frame now and then: that is no server that means it."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    backoff = Backoff(give_up_s=1e6)
    for number in range(100):
        backoff.wait(LinkError("lost") if number % 3 else FrameError("damaged"), lambda text: None)


def _flipped(frame: pb.Frame) -> Iterator[pb.Frame]:
    """The frame with each single bit of all but its payload flipped, where what comes out is a message at all."""
    raw = frame.SerializeToString()
    for place in range(len(raw) - len(frame.part.data)):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[place] ^= 1 << bit
            with contextlib.suppress(DecodeError):
                yield pb.Frame.FromString(bytes(damaged))


@pytest.mark.parametrize("kept", [0, 40])
def test_a_flipped_bit_is_cured_by_a_new_connection_and_never_believed(kept: int) -> None:
    sent, place = np.arange(4, dtype=np.float32).reshape(2, 2), Place(pb.GRADIENT, 5, 0)
    frame = next(iter(wire.pack_raw(place, sent)))
    frame.kept = kept

    def received(damaged: pb.Frame) -> bool:
        draft = Draft(Meter())
        stream = Stream(lambda _: iter([damaged]), "127.0.0.1:1", watched=False)
        try:
            first = stream.receive(draft)
            came = wire.unpack(first, lambda: stream.receive(draft), place, (2, 2), "fp32")
        except CURABLE:
            return False
        finally:
            draft.drop()
        assert np.array_equal(came, sent) and first.kept == kept
        return True

    assert Counter(map(received, _flipped(wire.seal(frame))))[False] > 100


def test_an_evaluation_keeps_sums_not_frames() -> None:
    meter, frame = Meter(), pb.Frame(role=pb.EVALUATION, step=1)
    draft = Draft(meter)
    for _ in range(1000):
        draft.frame(UP, frame)
    assert sum(len(held) for held in vars(draft).values() if isinstance(held, dict | list)) == 1
    draft.keep()
    draft.keep()
    assert meter.total(UP).message == 1000 * frame.ByteSize()


def test_a_broken_stream_is_freed_without_the_garbage_collector(no_collector: None) -> None:
    assert _step()() is None


def test_what_to_do_about_a_lost_link_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    backoff, said = Backoff(give_up_s=1e6), []
    for error in ("no answer (refused); check the address", "no answer (refused); check the address", "closed early"):
        backoff.wait(LinkError(error), said.append)
    assert [line.count("check the address") for line in said] == [1, 0, 0]
    assert "(no answer (refused)); gives up in" in said[1] and "(closed early)" in said[2]


def test_a_certificate_that_is_being_exchanged_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a new pair lies there when the device connects again: it waits for the other."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    remote = RemoteTail("127.0.0.1:1", give_up_s=60)
    remote.opened, remote._begun = Mock(finished=False), pb.Begin()
    monkeypatch.setattr(remote, "_start", Mock())
    remote._train = Mock(wait_s=0.0)
    connects = Mock(side_effect=[AuthError("the key is not that of the certificate"), None])
    monkeypatch.setattr(remote, "_connect", connects)
    attempts = Mock(side_effect=[LinkError("lost"), "done"])
    assert remote._steadily(7, attempts) == "done"
    assert connects.call_count == 2 and attempts.call_count == 2
    remote.close()


def test_weights_that_came_in_part_once_do_not_keep_a_device_trying_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of the head came, the link broke, and from then on there is no server: it counts once."""
    remote = RemoteTail("127.0.0.1:1", give_up_s=60)
    remote.opened = Mock(phase=None)
    moved: list[bool] = []
    monkeypatch.setattr(Backoff, "wait", lambda _self, _error, _say, came: moved.append(came))

    def in_part(again: bool) -> bytes:
        remote._came.frames += not again
        raise LinkError("lost")

    monkeypatch.setattr(remote, "_head_weights", in_part)
    monkeypatch.setattr(remote, "_connect", Mock(side_effect=[LinkError("gone"), LinkError("gone"), KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        remote.head_weights()
    assert moved == [True, False, False]
    remote.close()


def test_what_was_never_sent_is_not_counted_as_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server listens yet: there is no connection that a handshake could have crossed."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    remote = RemoteTail("127.0.0.1:1")
    with pytest.raises(LinkError, match="gave up after"):
        remote.open(trains=True, wait_s=0.5)
    assert remote.meter.report(None, None)["up"]["again"] == 0
    remote.close()


def test_a_server_that_is_full_or_stopping_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is not up yet; but not one whose run another device trains, for as long as that may take."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    remote = RemoteTail("127.0.0.1:1")
    answers = Mock(side_effect=[BusyError("full", 5.0), StoppedError("stopping"), BusyError("at work")])
    monkeypatch.setattr(remote, "_handshake", answers)
    with pytest.raises(BusyError, match="at work"):
        remote.open(trains=True, wait_s=60)
    assert answers.call_count == 3
    remote.close()


def test_a_recipe_that_is_read_otherwise_than_the_server_does_is_not_trained(tmp_path: Path) -> None:
    """Of another release, say: the halves would be of two networks."""
    text = recipe_text()
    host = Host.to_train(parse(text), text, RunFolder(tmp_path / "run"), Console(quiet=True), (), False)
    host.text = text.replace("lr = 0.05", "lr = 0.06")
    remote = RemoteTail("127.0.0.1:1", stub=inprocess.Stub(Servicer(host)))
    with pytest.raises(MismatchError, match="the recipe's digest is not the one"):
        remote.open(trains=True)


@pytest.mark.parametrize("changed", ["run_id", "digest"])
def test_a_server_that_came_back_with_another_run_is_not_gone_on_with(
    changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteTail("127.0.0.1:1", stub=Mock())
    remote.opened, remote._joined = Mock(run_id="mine", recipe=Mock(digest=lambda: "ours")), True
    reply = pb.OpenReply(**{"run_id": "mine", "digest": "ours", changed: "other"}, resumed=True)
    monkeypatch.setattr(remote, "_handshake", lambda *_, **__: reply)
    with pytest.raises(MismatchError, match="has another run now"):
        remote._reopen(3)


def test_a_link_that_moves_in_between_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long evaluation whose link breaks every few minutes gets on; one that breaks for ever is given up too."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    backoff, breaks = Backoff(give_up_s=600), 0
    with pytest.raises(LinkError, match="gave up after"):
        while True:
            now += 500  # in which some of the answer comes
            backoff.wait(LinkError("lost"), lambda text: None, moved=True)
            breaks += 1
    assert 10 <= breaks < 20
    stuck = Backoff(give_up_s=600)
    stuck.wait(LinkError("lost"), lambda text: None)
    now += 601
    with pytest.raises(LinkError, match="gave up after"):
        stuck.wait(LinkError("lost"), lambda text: None)


def test_a_device_may_never_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    said: list[str] = []
    backoff = Backoff(math.inf)
    for _ in range(100):
        backoff.wait(LinkError("lost"), said.append)
    assert said[-1] == "reconnecting, attempt 100 (lost); never gives up"
