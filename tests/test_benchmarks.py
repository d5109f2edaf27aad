"""What a benchmark does where it is given the wrong thing, stopped, or what it measures fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import effect, learning, soak, start, ways


@pytest.mark.parametrize("benchmark", [learning, ways, effect])
def test_pictures_that_are_not_there_are_told_before_anything_is_begun(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "folder:/nowhere"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("there is no folder /nowhere; check the path after folder:\n")


def test_a_soak_of_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["soak", "0"])
    with pytest.raises(SystemExit):
        soak.main()
    assert "give more than 0 minutes" in capsys.readouterr().err


def test_runs_that_wait_are_not_made_where_it_is_stopped() -> None:
    made: list[int] = []

    def run(number: int) -> None:
        time.sleep(0.05)
        made.append(number)

    with pytest.raises(KeyboardInterrupt), ThreadPoolExecutor(1) as pool, effect._giving_up(pool):  # type: ignore[arg-type]
        for number in range(100):
            pool.submit(run, number)
        raise KeyboardInterrupt
    assert len(made) < 50


def test_results_of_other_settings_are_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of one day."""

    class Pool(ThreadPoolExecutor):
        def __init__(self, *_: Any) -> None:
            super().__init__(1)

    cases = [("fp32", "fp32", 0)]
    monkeypatch.setattr(effect, "RESULTS", tmp_path)
    monkeypatch.setattr(effect, "PLANS", {False: effect.Plan("effect.json", 5, cases)})
    monkeypatch.setattr(effect, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(
        effect, "_run", lambda case: {"activation": "fp32", "gradient": "fp32", "seed": 0, "accuracy": case[3]}
    )
    monkeypatch.setattr(effect, "show", lambda *_: None)
    for name in ("train", "test"):
        (tmp_path / name / "cat").mkdir(parents=True)
        (tmp_path / name / "cat" / "one.jpg").write_bytes(b"")
    for epochs in ("1", "2", "3"):
        monkeypatch.setattr(sys, "argv", ["effect", f"folder:{tmp_path}", "--pictures", "1", "--epochs", epochs])
        effect.main()
    assert sorted(json.loads(path.read_text())["epochs"] for path in tmp_path.glob("effect*.json")) == [1, 2, 3]


def test_a_device_that_fails_ends_the_benchmark_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server waits for another device, and would for ever."""
    programs = {
        "edge-server": "print('the server listens on 127.0.0.1:1', flush=True); import time; time.sleep(60)",
        "device-client": "raise SystemExit('no such pictures')",
    }
    begun: list[subprocess.Popen[bytes]] = []

    def started(program: str, *_: object, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            code = [sys.executable, "-c", programs[program]]
            begun.append(subprocess.Popen(code, stdout=out, stderr=out, env=os.environ | {"PYTHONUNBUFFERED": "1"}))
        return begun[-1]

    monkeypatch.setattr(start, "pair", SimpleNamespace(start=started, address_of=lambda *_: "127.0.0.1:1"))
    with pytest.raises(SystemExit, match="no such pictures"):
        start.both("auto", tmp_path / "auto")
    assert all(process.poll() is not None for process in begun)
