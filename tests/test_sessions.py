"""Who has a place on a server, at its limits of sessions and past them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks.recipes import PHASE, recipe_text
from common.errors import BusyError, MismatchError, SessionError
from common.recipe import parse
from device_client import use
from edge_server.callers import Callers
from edge_server.host import Host
from edge_server.limits import Limits
from edge_server.sessions import _GRACE_S, Session
from tests.conftest import quiet_host


def opened(host: Host, caller: str, age: float = 0.0, begun: bool = False) -> Session:
    session, _ = host.open(True, "", (), "", caller)
    session.touched -= age
    session.begun = begun
    return session


def knows(host: Host, session: Session) -> bool:
    return session.name in host.sessions


def test_sessions_of_one_caller(tmp_path: Path) -> None:
    host = quiet_host(tmp_path, sessions=8, sessions_each=2)
    opened(host, "pi")
    opened(host, "pi")
    with pytest.raises(BusyError, match="already has 2 sessions") as refused:
        opened(host, "pi")
    assert refused.value.retry_after_s
    opened(host, "hut")


def test_sessions_at_once(tmp_path: Path) -> None:
    host = quiet_host(tmp_path, sessions=3, sessions_each=2)
    for caller in ("pi", "hut", "shed"):
        opened(host, caller)
    with pytest.raises(BusyError, match="already has 3 sessions"):
        opened(host, "barn")


def test_a_caller_with_many_sessions_keeps_no_one_out(tmp_path: Path) -> None:
    host = quiet_host(tmp_path, sessions=4, sessions_each=3)
    greedy = [opened(host, "greedy") for _ in range(3)]
    streaming = opened(host, "pi")
    streaming.streams = 1
    opened(host, "hut")
    assert [knows(host, session) for session in greedy] == [False, True, True] and knows(host, streaming)


def test_those_that_never_began_give_way_first_and_idle_ones_are_forgotten(tmp_path: Path) -> None:
    host = quiet_host(tmp_path, sessions=3, sessions_each=3, idle_s=1000)
    begun = opened(host, "pi", age=_GRACE_S + 50, begun=True)
    never = opened(host, "pi", age=_GRACE_S + 1)
    fresh = opened(host, "pi")
    opened(host, "pi")
    assert [knows(host, session) for session in (begun, never, fresh)] == [True, False, True]
    fresh.touched -= 999
    host.tend()
    assert knows(host, fresh)
    fresh.touched -= 2
    with fresh.streaming():
        host.tend()
        host.sessions.leave(fresh)  # by another of its streams
        assert knows(host, fresh), "whose stream the server may be at work on"
    host.tend()
    assert not knows(host, fresh)


@pytest.mark.parametrize("trains", [False, True])
def test_a_run_keeps_counting_on_the_sockets_of_a_session_that_is_over(trains: bool, tmp_path: Path) -> None:
    """Its books go on in the next; of any other session the sockets are let go."""
    host = quiet_host(tmp_path)
    session = opened(host, "pi")
    session.kernel, session.run = Mock(), Mock() if trains else None
    host.sessions.leave(session)
    assert not knows(host, session) and session.kernel.close.called is not trains


def test_thousands_of_opens_leave_no_more_than_the_limit(tmp_path: Path) -> None:
    host = quiet_host(tmp_path)
    refused = 0
    for number in range(5000):
        try:
            opened(host, f"address {number % 50}", age=number % 7 * 20)
        except BusyError:
            refused += 1
        assert len(host.sessions) <= host.limits.sessions
    assert 0 < refused < 5000


def test_a_run_that_is_still_trained_may_be_waited_for_by_its_own_device_alone(tmp_path: Path) -> None:
    host = quiet_host(tmp_path)
    with pytest.raises(BusyError, match="has no finished run yet"):
        host.open(False, "", (), "", "")
    with pytest.raises(MismatchError, match="of run another, this server has a new run"):
        host.open(False, "another", (), "", "")
    assert host.run
    host.run.run_id = "its own"
    with pytest.raises(BusyError):
        host.open(False, "its own", (), "", "")
    with pytest.raises(MismatchError, match="of run another, this server trains run its own"):
        host.open(False, "another", (), "", "")


def test_places_for_evaluations_are_shared_out() -> None:
    callers = Callers(Limits(queue=8))
    with contextlib.ExitStack() as held:
        for number in range(8):
            held.enter_context(callers.evaluation(f"caller {number // 2}"))
        with pytest.raises(BusyError, match="already judging for 8 devices; "), callers.evaluation("fifth"):
            pass
    with contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(callers.evaluation("one"))
        with pytest.raises(BusyError, match="for 2 devices of yours"), callers.evaluation("one"):
            pass
        with callers.evaluation("other"):
            pass
    assert callers["one"].forgettable and callers["other"].forgettable


def test_a_session_that_reading_outlasted_is_opened_anew() -> None:
    """Thousands of large pictures take longer than a server keeps a device that says nothing."""
    recipe, opens, left = parse(recipe_text()), [], [SessionError("not known here")]
    remote = Mock(server="here", opened=Mock(recipe=recipe, phase=PHASE, run_id="a run"))
    remote.open = lambda **arguments: opens.append(arguments) or remote.opened

    def attempt() -> str:
        if left:
            raise left.pop()
        return "judged"

    assert use._again(remote, attempt, print, 3.0) == "judged"
    assert opens == [{"trains": False, "run_id": "a run", "wait_s": pytest.approx(3.0, abs=1)}]
    left.append(SessionError("not known here"))
    remote.open = lambda **_: Mock(recipe=recipe, phase=None)
    with pytest.raises(MismatchError, match="serves another run now"):
        use._again(remote, attempt, print, 0.0)
