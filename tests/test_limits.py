"""Every limit of a server that can be seen in one process, at it and past it; test_limits_served.py has the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import inprocess, pair
from benchmarks.recipes import BATCH, CLASSES, PHASE, recipe_text
from common import halves, weights, wire
from common.cli import with_options
from common.errors import BusyError, FrameError, ModelError, StoreError, TooLargeError
from common.recipe import parse
from common.rpc import split_pb2 as pb
from common.schedule import RECALLED, Phase
from common.wire import Place
from device_client import remote_tail, use
from device_client.data import load
from device_client.remote_tail import RemoteTail
from edge_server import incoming
from edge_server.limits import Limits
from edge_server.options import LIMITS, Grouped
from edge_server.servicer import Servicer
from edge_server.store import Store
from tests.conftest import quiet_host


def test_a_head_that_no_device_would_take_is_refused_at_the_start(tmp_path: Path, monkeypatch: Any) -> None:
    size = weights.room(halves.build(parse(recipe_text())).head)
    monkeypatch.setattr(wire, "MAX_WEIGHTS_BYTES", size)
    quiet_host(tmp_path / "as large")
    monkeypatch.setattr(wire, "MAX_WEIGHTS_BYTES", size - 1)
    with pytest.raises(ModelError, match="the weights before the cut .*: cut earlier"):
        quiet_host(tmp_path / "larger")


def test_elements_on_both_sides(tmp_path: Path) -> None:
    """A server does not start on a recipe past its limit, and a device sends nothing past what the server announced."""
    largest = 256 * 32 * 8 * 8  # an evaluation batch of the recipe
    quiet_host(tmp_path / "at", elements=largest)
    with pytest.raises(ModelError, match=f"an activation of {largest:,} elements would cross.*--max-elements"):
        quiet_host(tmp_path / "past", elements=largest - 1)

    class Announced(RemoteTail):
        most = 32 * 32 * 8 * 8

        def open(self, *arguments: Any, **options: Any) -> Any:
            self.opened = replace(super().open(*arguments, **options), max_elements=self.most)
            return self.opened

    pictures = load("digits", (1, 16, 16), 3, 0.0, limit=64)
    text = recipe_text(data="batch = 32\nevaluation_batch = 32", schedule="phases = [[0, 1]]")
    inprocess.train(text, pictures, Announced)
    Announced.most -= 1
    with pytest.raises(TooLargeError, match=r"65,536 elements are to be sent, and the server takes up to 65,535"):
        inprocess.train(text, pictures, Announced)


def test_the_server_announces_its_limit(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text())
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "run", "--max-elements", 256 * 32 * 8 * 8)
    with pair.server(*arguments, log=tmp_path / "log") as (_, address):
        remote = RemoteTail(address)
        assert remote.open(trains=True).max_elements == 256 * 32 * 8 * 8
        remote.close()


def test_labels() -> None:
    for classes in (10, 256, 300):
        place = Place(pb.LABEL, 0, 0)
        (frame,) = wire.pack_labels(place, np.array([0, classes - 1]), classes)
        assert list(wire.unpack_labels(frame, pb.Frame, place, 2, classes)) == [0, classes - 1]
    (frame,) = wire.pack_labels(place, np.array([0, 10]), 10)
    with pytest.raises(FrameError, match="label 10 came; the recipe has classes 0 to 9"):
        wire.unpack_labels(frame, pb.Frame, place, 2, 10)


def test_opaque_bytes() -> None:
    with pytest.raises(TooLargeError, match="weights of 1,073,741,825 bytes are over the limit"):
        wire.unpack_bytes(pb.Frame(), pb.Frame, Place(pb.WEIGHTS, 0, 0), wire.MAX_WEIGHTS_BYTES + 1)


def test_a_published_head() -> None:
    """It is no larger than this model's can be."""

    class Large(RemoteTail):
        def leave(self, step: int, phase: Phase, head: bytes = b"") -> None:
            super().leave(step, phase, head * 100)

    pictures = load("digits", (1, 16, 16), 3, 0.0, limit=64)
    text = recipe_text(schedule="phases = [[0, 1]]")
    with pytest.raises(TooLargeError, match="one of this model takes up to"):
        inprocess.train(text, pictures, Large, publish=True, give_up_s=0)


def test_steps_after_the_last(tmp_path: Path) -> None:
    remote = RemoteTail("127.0.0.1:1", stub=inprocess.Stub(Servicer(quiet_host(tmp_path))))
    remote.open(trains=True)
    remote.begin(64, CLASSES)
    assert remote.learn(0, PHASE, *BATCH)[1].then == pb.FINISH
    with pytest.raises(FrameError, match="all are done; Leave was expected"):
        remote.learn(1, PHASE, *BATCH)


def test_a_verdict_is_of_all_that_was_announced(tmp_path: Path) -> None:
    remote = RemoteTail("127.0.0.1:1", stub=inprocess.Stub(Servicer(quiet_host(tmp_path))))
    remote.open(trains=True)
    remote.begin(64, CLASSES, judged=(0, 3))
    assert remote.evaluate(lambda: [], 0, pb.TEST, PHASE, CLASSES).count == 0
    with pytest.raises(FrameError, match="the server judged 0 pictures, 3 were sent"):
        remote.evaluate(lambda: [], 3, pb.TEST, PHASE, CLASSES)


def test_recalled_steps_and_cached_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of one step are kept, or one for each step of a single Recall: no more, however long the run."""
    kept: list[tuple[str, int, int]] = []

    def watch(step: int, phase: Phase, trainer: Any, training: Any) -> None:
        size = sum(frame.ByteSize() for answer in training.answers for frame in answer)
        kept.append((phase.kind, len(training.answers), size))

    text = recipe_text("fixed", schedule="phases = [[0, 2], { width = 0, epochs = 8, views = 1 }]")
    pictures = load("digits", (1, 16, 16), 3, 0.0, limit=160)
    monkeypatch.setattr(remote_tail, "RECALLED", 16)
    inprocess.train(text, pictures, watch=watch, limits=Limits(recall=16))
    recalled = [(count, size) for kind, count, size in kept if kind == "recall"]
    assert len(recalled) > 20 and max(count for count, _ in recalled) == 16
    assert max(size for _, size in recalled) < 16 * 100
    assert {count for kind, count, _ in kept if kind != "recall"} == {1}
    assert max(size for _, _, size in kept) < 4 * 32 * 32 * 8 * 8 + 500
    monkeypatch.setattr(remote_tail, "RECALLED", 17)
    with pytest.raises(FrameError, match="Recall of 17 steps came; the server makes 16 at once"):
        inprocess.train(text, pictures, limits=Limits(recall=16))


def test_store(tmp_path: Path) -> None:
    store = Store(tmp_path, PHASE, (1, 1), 0, limit=10)
    store.add(bytes(10), np.zeros(1, int))
    with pytest.raises(StoreError, match="--store-limit"):
        store.add(bytes(1), np.zeros(1, int))
    store.close()


def test_bytes_a_second_are_held_up_and_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The delays that are asked for are those of the rate, and the run is the same."""
    delays: list[float] = []
    monkeypatch.setattr(incoming, "hold_up", lambda seconds, *_: delays.append(seconds))
    pictures = load("digits", (1, 16, 16), 3, 0.0, limit=320)
    free = inprocess.train(recipe_text(schedule="phases = [[0, 1]]"), pictures)
    assert set(delays) == {0.0}
    delays.clear()
    slow = inprocess.train(recipe_text(schedule="phases = [[0, 1]]"), pictures, limits=Limits(rate=1000.0))
    assert slow["loss"] == free["loss"] and slow["steps"] == 10
    sent = sum(slow["bytes"]["up"]["by_role"][role]["message"] for role in ("activation", "label", "evaluation"))
    assert delays[0] == 0 and delays[len(delays) // 2] > 0, "a burst, then a debt"
    # The test takes seconds, in which some of it is paid.
    assert 0.8 * sent < 1000.0 * max(delays) + wire.FRAME_BYTES < 1.01 * sent


def test_a_device_that_is_held_up_is_let_go_where_its_stream_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(incoming, "time", clock)
    host: Any = SimpleNamespace(stopping=False)
    incoming.hold_up(7.1, SimpleNamespace(is_active=lambda: True), host)
    assert clock.now == pytest.approx(7.1)
    incoming.hold_up(7.1, SimpleNamespace(is_active=lambda: clock.now < 9), host)
    assert 9 <= clock.now < 9.5
    host.stopping = True
    incoming.hold_up(7.1, SimpleNamespace(is_active=lambda: True), host)
    assert clock.now < 9.5


def test_options_fill_in_the_limits() -> None:
    made: list[Limits] = []

    @click.command(cls=Grouped)
    @with_options(LIMITS)
    def serve(**limits: Any) -> None:
        made.append(Limits(**limits))

    run = CliRunner().invoke
    assert run(serve, []).exit_code == 0 and made == [Limits()]
    given = {
        "--max-rate": 0.5, "--store-limit": 10, "--max-sessions": 5, "--max-sessions-each": 2, "--max-calls": 0.1,
        "--max-queue": 3, "--max-elements": 7, "--max-recall": 80, "--idle-time": 9.5,
    }  # fmt: skip
    assert run(serve, [str(word) for pair_of in given.items() for word in pair_of]).exit_code == 0
    expected = Limits(
        rate=500_000, store=10_000_000, sessions=5, sessions_each=2, calls_a_second=0.1, queue=3, elements=7, recall=80,
        idle_s=9.5,
    )  # fmt: skip
    assert made[-1] == expected
    assert run(serve, ["--max-queue", "0"]).exit_code == 2
    assert run(serve, ["--max-rate", "0.05"]).exit_code == 2
    # Below what every device asks for no run with `views` could end.
    assert run(serve, ["--max-recall", str(RECALLED - 1)]).exit_code == 2
    assert run(serve, ["--max-recall", str(RECALLED)]).exit_code == 0
    page = (Path(__file__).parent.parent / "docs" / "limits.md").read_text()
    for option in serve.params:
        assert f"`{option.opts[0]}`" in page, "every option is on the page"


def test_the_least_limits_still_let_a_device_in() -> None:
    """A session has two calls open, and a handshake is one more; of a queue everyone has a place."""
    least = Limits(sessions=1, sessions_each=1, queue=1)
    assert least.queue_each == 1 and least.calls > 2 and least.calls_each > 2


def test_a_device_tries_a_bounded_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(use.time, "sleep", waits.append)

    def never() -> None:
        raise BusyError("no room", 5.0)

    with pytest.raises(BusyError):
        use.patiently(never, lambda text: None)
    assert len(waits) == use.TRIES - 1 and all(5.0 <= wait <= 7.5 for wait in waits)

    def at_once() -> None:
        raise BusyError("this server still trains its run")

    with pytest.raises(BusyError, match="with --wait SECONDS it is waited for"):
        use.patiently(at_once, lambda text: None)
    assert len(waits) == use.TRIES - 1, "where the server does not say when, there is no use in waiting"
    monkeypatch.setattr(use.time, "monotonic", lambda: sum(waits))
    waits.clear()
    with pytest.raises(BusyError):
        use.patiently(never, lambda text: None, 600)
    assert 600 <= sum(waits) < 610, "who is told to wait does"
    waits.clear()
    with pytest.raises(BusyError):
        use.patiently(never, lambda text: None, 1)
    assert len(waits) == use.TRIES - 1, "and no shorter for it"
    waits.clear()
    said: list[str] = []
    with pytest.raises(BusyError, match="still trains its run$"):
        use.patiently(at_once, said.append, 600)
    assert 600 <= sum(waits) < 625 and len(said) == 1, "also where nobody can say for how long, which is said once"


def test_a_server_that_is_busy_and_then_gone_is_waited_for_as_long_as_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    now, granted = [0.0], list[float]()

    class Busy:
        def open(self, wait_s: float, **_: Any) -> None:
            granted.append(wait_s)
            if len(granted) < 3:
                raise BusyError("this server still trains its run", 40.0)

    monkeypatch.setattr(use.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(use.time, "sleep", lambda _: now.__setitem__(0, now[0] + 40))
    use._open(Busy(), "", lambda text: None, 100)  # type: ignore[arg-type]
    assert granted == [100, 60, 20]


def test_a_head_is_not_kept_for_each_caller_that_does_not_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = quiet_host(tmp_path)
    made, pack = [0], wire.pack_bytes

    def counted(*arguments: Any) -> Iterator[pb.Frame]:
        for frame in pack(*arguments):
            made[0] += 1
            yield frame

    monkeypatch.setattr(wire, "pack_bytes", counted)
    monkeypatch.setattr(wire, "FRAME_BYTES", 4096)
    session = host.open(True, "", (), "", "pi")[0].name
    frames = inprocess.Stub(Servicer(host)).Head(pb.HeadRequest(session=session))
    next(frames)
    booked = len(list(pack(Place(pb.WEIGHTS, 0, 0), host.head_weights(host.sessions.get(session, "")))))
    assert booked > 2 and made[0] == booked + 1
