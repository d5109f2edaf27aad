"""Whole runs of the two processes that suffer a fault and must come to the weights of the run without one.

The short version of `make faults`, whose matrix has every kind of fault at every point of the protocol.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import compare, points, proxy, runs
from benchmarks.faults.rig import Blow, Rig

# A busy machine takes its time to start two processes three times over.
pytestmark = pytest.mark.timeout(600)

TEXT = runs.recipe((2, 1), (4, 1.5))  # 28 steps


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.fault_free(tmp_path_factory.mktemp("faults") / "reference", TEXT)


@pytest.mark.parametrize(
    "blows",
    [
        pytest.param(
            [
                Blow(proxy.CUT, points.BACKWARD, 3),
                Blow(proxy.CLOSE, points.REPLY, 7),
                Blow(proxy.CUT, points.SWITCH, 8),
                Blow(proxy.TRUNCATE, points.EVALUATION, 15),
                Blow(proxy.DUPLICATE, points.FORWARD, 23),
            ],
            id="the link, five times",
        ),
        pytest.param([Blow("server SIGKILL", points.REPLY, 13)], id="server SIGKILL"),
        pytest.param([Blow("device SIGKILL", points.BACKWARD, 13)], id="device SIGKILL"),
        pytest.param([Blow("server SIGTERM", points.FORWARD, 13)], id="server SIGTERM"),
    ],
)
def test_the_run_is_the_one_without_faults(reference: Path, tmp_path: Path, blows: list[Blow]) -> None:
    with Rig(tmp_path, TEXT, pictures=runs.PICTURES) as rig:
        for blow in blows:
            assert rig.suffer(blow), blow
            rig.recovered()
        rig.finish()
        # The link alone never costs a process: whoever restarts it then is not there in the field.
        killed = {blow.kind.split()[0] for blow in blows if "SIG" in blow.kind}
        assert {side for side, number in rig.restarts.items() if number} == killed
        if not killed:
            told = (tmp_path / "device-1.log").read_text()
            assert 0 < told.count("reconnecting, attempt 1 ") <= told.count("connected again, at step "), told
    assert compare.differences(reference, tmp_path) == []
