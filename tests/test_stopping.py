"""Either side is stopped, by hand or by its machine: what it says, and that neither loses a step."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from grpc_health.v1 import health_pb2
from torch import fx, nn

from benchmarks import pair
from benchmarks.recipes import BATCH, CLASSES, PHASE, recipe_text
from common import signals
from common.rpc import split_pb2 as pb
from common.run import RunFolder
from device_client.remote_tail import RemoteTail
from edge_server.health import Health
from tests.conftest import ANY_PORT, Run


@pytest.mark.parametrize(
    ("side", "number", "views"),
    [
        ("device", signal.SIGINT, 0),
        ("device", signal.SIGTERM, 0),
        ("server", signal.SIGINT, 0),
        ("server", signal.SIGTERM, 0),
        ("device", signal.SIGHUP, 0),  # its terminal is closed, or the connection to it lost
        ("server", signal.SIGHUP, 0),
        ("device", signal.SIGINT, 0.01),  # while the server learns from what it has kept
        ("server", signal.SIGINT, 0.01),
    ],
)
def test_stopping_either_side_says_what_becomes_of_the_run(
    side: str, number: signal.Signals, views: float, tmp_path: Path
) -> None:
    """A device that is stopped tells its server, which waits for it; one whose server is gone waits, and gives up."""
    schedule = f"phases = [{{ width = 0, epochs = 500, views = {views} }}]"
    (tmp_path / "recipe.toml").write_text(recipe_text(schedule=schedule))
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "server", "--threads", 1)
    options = ("--data", "digits", "--run", tmp_path / "device", "--give-up-after", 2)
    with pair.server(*arguments, log=tmp_path / "log") as (server_process, address):
        line = pair.command("device-client", "train", address, *options)
        with subprocess.Popen(line, stdout=-1, stderr=-1, text=True, env=pair.environment()) as device:
            metrics = tmp_path / "device" / "metrics.jsonl"
            deadline = time.monotonic() + 60
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.1)
            os.kill((device if side == "device" else server_process).pid, number)
            out, err = device.communicate(timeout=60)
        assert (server_process.poll() is None) == (side == "device")
        # On a crowded machine it may have many steps before the goodbye still to make.
        while side == "device" and "left at step" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        server_process.terminate()
        server_process.wait(timeout=30)
    log = (tmp_path / "log").read_text()
    # 75: it gave up without its server; else as shells have it, for a script must see that the run is not finished.
    assert device.returncode == (128 + number if side == "device" else 75) and server_process.returncode == 0
    assert "Error" not in log and "Refused: the server was stopped" not in log
    assert "Traceback" not in out + err + log, out + err + log
    steps = {path.name for side in ("device", "server") for path in (tmp_path / side / "checkpoints").glob("step-*")}
    assert steps
    if side == "device":
        assert "Stopping after this step" in out and "Interrupted" not in out and "The device left at step" in log
        # A server without the recipe has nothing to do with the run, and says what to give it.
        line = pair.command("edge-server", "serve", *ANY_PORT, "--run", tmp_path / "server")
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=pair.environment())
        assert done.returncode == 1 and "holds an unfinished run, at step " in done.stderr
        assert f"{tmp_path / 'server' / 'recipe.toml'} is a copy" in " ".join(done.stderr.split())
    else:
        words = " ".join((out + err).split())
        # A step that outlasts the server's grace, on a crowded machine, is cut off instead of told.
        assert "reconnecting, attempt 1 (" in words and "gave up after" in words
        assert f"Stopped by {number.name} at step" in log and "goes on from there" in log


def test_a_device_that_is_to_stop_does_not_wait_for_a_server_that_goes_at_the_same_time(tmp_path: Path) -> None:
    """As where both are stopped together: a shutdown, Ctrl-C in a terminal that runs the two."""
    (tmp_path / "recipe.toml").write_text(recipe_text(schedule="phases = [[0, 500]]"))
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "server", "--threads", 1)
    with pair.server(*arguments, log=tmp_path / "log") as (server_process, address):
        line = pair.command("device-client", "train", address, "--data", "digits", "--run", tmp_path / "device")
        with subprocess.Popen(line, stdout=-1, stderr=-1, text=True, env=pair.environment()) as device:
            metrics = tmp_path / "device" / "metrics.jsonl"
            deadline = time.monotonic() + 60
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.1)
            server_process.send_signal(signal.SIGSTOP)  # so that the step under way has no answer
            device.send_signal(signal.SIGTERM)
            assert device.stdout
            while "Stopping after this step" not in device.stdout.readline():
                assert device.poll() is None
            server_process.kill()
            out, err = device.communicate(timeout=60)  # it would try to reach its server for ten minutes
    assert device.returncode == 128 + signal.SIGTERM, out + err
    step = re.search(r"Stopped at step ([\d,]+); the run is not finished", " ".join(out.split()))
    assert step and (tmp_path / "device" / "checkpoints" / f"step-{int(step[1]):012}.safetensors").is_file(), out


def test_a_server_that_is_told_to_stop_again_as_it_ends_has_not_failed(
    plain_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "popen", subprocess.Popen)  # a forked one ends without Python's own farewell
    with pair.server("--run", plain_run.path / "server", log=tmp_path / "log") as (process, _):
        process.terminate()
        while "Stopped by SIGTERM" not in (tmp_path / "log").read_text() and process.poll() is None:
            time.sleep(0.005)
        while process.poll() is None:
            process.terminate()
            time.sleep(0.005)
    assert process.returncode == 0


def test_a_terminal_that_is_closed_is_told_twice_and_heard_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its kernel and by its shell; a second Ctrl-C is one, for that is a person's, unless it comes at once: such are
    sent to a process and to its group."""
    handlers: dict[int, Any] = {}
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    heard: list[int] = []
    signals.hear(lambda number, frame: heard.append(number))
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        handlers[number](number, None)
        now += 0.02
    assert heard == [signal.SIGHUP]
    now += 1
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        handlers[number](number, None)
    assert heard == [signal.SIGHUP, signal.SIGINT], "the second as well"
    now += 1
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert heard == [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]


_calls = 0


@fx.wrap
def _slowly(x: torch.Tensor, seconds: int) -> torch.Tensor:
    """The second step takes longer than a stop waits for anything else."""
    global _calls
    _calls += len(x) == 32
    if _calls == 2:
        _calls += 1
        time.sleep(seconds)
    return x


class Slow(nn.Module):
    seconds = 10

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(shape[0], 4, 3), nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(_slowly(torch.relu(self.first(x)), self.seconds).mean((2, 3)))


class Stuck(Slow):
    seconds = 600


@contextlib.contextmanager
def in_the_second_step(folder: Path, model: str) -> Iterator[tuple[Any, Any]]:
    """The server that is computing it, and its device."""
    text = recipe_text(schedule="phases = [[0, 50]]").replace('"tiny"', f'"tests.test_stopping:{model}"')
    (folder / "recipe.toml").write_text(text.replace('"stage1_relu2"', '"relu"'))
    allow = ("--allow-model", f"tests.test_stopping:{model}")
    arguments = (folder / "recipe.toml", "--run", folder / "server", *allow)
    options = ("--data", "digits", "--run", folder / "device", "--give-up-after", 1, *allow)
    with pair.server(*arguments, log=folder / "log") as (server, address):
        device = pair.start("device-client", "train", address, *options, log=folder / "device.log")
        metrics, deadline = folder / "device" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        yield server, device
        device.kill()
        device.wait()


@pytest.mark.parametrize("waits", [True, False])
def test_a_stopped_server_ends_the_step_that_is_under_way(waits: bool, tmp_path: Path) -> None:
    """It computes it anyway, for nothing stops it; left out of the checkpoint it would be lost. Also where the device
    is gone meanwhile, and gRPC knows of nothing any more that is under way."""
    with in_the_second_step(tmp_path, "Slow") as (server, device):
        if not waits:
            device.kill()
            device.wait()
        server.terminate()
        server.wait(timeout=60)
        device.wait(timeout=60)
    log, told = (tmp_path / "log").read_text(), (tmp_path / "device.log").read_text()
    assert "Stopping after this step" in log and "Stopped by SIGTERM at step 2" in log, (log, told)
    for side in ("device", "server") if waits else ("server",):
        assert (tmp_path / side / "checkpoints" / f"step-{2:012}.safetensors").exists(), (side, log, told)


def test_a_server_that_is_stopped_once_more_waits_for_no_step(tmp_path: Path) -> None:
    """Nor does its process, in which the step is computed on; and nobody else has its folder before that is over."""
    with in_the_second_step(tmp_path, "Stuck") as (server, _):
        server.terminate()
        deadline = time.monotonic() + 60
        while "stop it again" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # at once it would be the same signal
        server.terminate()
        assert server.wait(timeout=60) == 0
    log = (tmp_path / "log").read_text()
    assert "Stopped by SIGTERM at step 1; the run is not finished and goes on from step 0, which is kept" in log, log
    with RunFolder(tmp_path / "server").claimed():
        pass


def test_a_stopped_server_waits_for_no_device_that_is_silent(tmp_path: Path) -> None:
    """In the middle of an evaluation, which waits for more of it."""
    (tmp_path / "recipe.toml").write_text(recipe_text())
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "server", "--threads", 1)
    with pair.server(*arguments, log=tmp_path / "log") as (server, address):
        remote = RemoteTail(address, give_up_s=0)
        remote.open(trains=True)
        remote.begin(1438, CLASSES)
        remote.learn(0, PHASE, *BATCH)

        def batches() -> Iterator[Any]:
            yield BATCH
            time.sleep(2)  # until that is judged
            server.terminate()
            assert server.wait(timeout=60) == 0
            raise InterruptedError

        with pytest.raises(InterruptedError):
            remote.evaluate(batches, 1000, pb.SUBSET_UNSPECIFIED, PHASE, CLASSES, 1)
        remote.close()
    assert "at step 1; the run is not finished and goes on from there" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("gives_up", [False, True])
def test_both_sides_stopped_go_on_where_they_stood(gives_up: bool, tmp_path: Path) -> None:
    """The server first, then the device, which waits for it or has given up: neither has lost a step."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_text(bottleneck='kind = "linear"', method="fixed", schedule="phases = [[4, 500]]"))
    serve = (recipe, "--run", tmp_path / "server", "--threads", 1)
    options = ("--data", "digits", "--run", tmp_path / "device", "--threads", 1, "--give-up-after", 3)
    metrics, log = tmp_path / "device" / "metrics.jsonl", tmp_path / "device.log"
    with pair.server(*serve, log=tmp_path / "log") as (server, address):
        device = pair.start("device-client", "train", address, *options, log=log)
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > 9) and time.monotonic() < deadline:
            time.sleep(0.05)
        server.terminate()
        server.wait(timeout=30)
        while "reconnecting" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        if not gives_up:
            device.send_signal(signal.SIGINT)
        assert device.wait(timeout=60) == (75 if gives_up else 130), log.read_text()
    stood = {side: max((tmp_path / side / "checkpoints").glob("step-*")).name for side in ("device", "server")}
    assert stood["device"] == stood["server"] > "step-000000000009", stood
    with pair.server(*serve, log=tmp_path / "log2") as (server, address):
        device = pair.start("device-client", "train", address, *options, log=tmp_path / "again.log")
        lines = metrics.read_text().count("\n")
        while metrics.read_text().count("\n") <= lines + 3 and time.monotonic() < deadline + 60:
            time.sleep(0.05)
        device.kill()
        device.wait()
    assert f"going on at step {lines}" in " ".join((tmp_path / "again.log").read_text().split())
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()][: lines + 3] == list(
        range(lines + 3)
    )


def test_both_sides_stopped_among_recalls_stand_at_one_step(tmp_path: Path) -> None:
    """The device takes in what it has asked for before it goes; the server would be many steps ahead of it."""
    recipe, epoch = tmp_path / "recipe.toml", 1438 // 32
    phases = "phases = [{ width = 4, epochs = 500, views = 1 }]"
    recipe.write_text(recipe_text("fixed", bottleneck='kind = "linear"', schedule=phases))
    serve = (recipe, "--run", tmp_path / "server", "--threads", 1)
    options = ("--data", "digits", "--run", tmp_path / "device", "--threads", 1)
    metrics = tmp_path / "device" / "metrics.jsonl"
    with pair.server(*serve, log=tmp_path / "log") as (server, address):
        device = pair.start("device-client", "train", address, *options, log=tmp_path / "device.log")
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > epoch + 9) and time.monotonic() < deadline:
            time.sleep(0.05)
        device.send_signal(signal.SIGINT)
        assert device.wait(timeout=60) == 130
        server.terminate()
        server.wait(timeout=30)
    stood = {side: max((tmp_path / side / "checkpoints").glob("step-*")).name for side in ("device", "server")}
    assert stood["device"] == stood["server"] > f"step-{epoch + 9:012}", stood


def test_a_server_that_is_stopped_before_a_device_came(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text())
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "run", "--threads", 1)
    with pair.server(*arguments, log=tmp_path / "log") as (process, _):
        process.terminate()
        assert process.wait(timeout=30) == 0
    assert "Stopped by SIGTERM; no device had begun the run." in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_what_to_do_on_both_sides(tmp_path: Path) -> None:
    """Started again as it is it would diverge again; a raw activation that overflows is seen by the device alone."""
    text = recipe_text("fixed", codec='activation = "fp16"\ngradient = "fp32"', optimiser="lr = 1e4\nwarmup = 0")
    (tmp_path / "recipe.toml").write_text(text)
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "server", "--threads", 1)
    with pair.server(*arguments, log=tmp_path / "log") as (server, address):
        options = ("--data", "digits", "--run", tmp_path / "device", "--threads", 1)
        device = pair.device("train", address, *options, capture_output=True)
        server.terminate()
        server.wait(timeout=30)
    told = " ".join(device.stderr.split())
    assert device.returncode == 1 and "training has diverged; lower optimiser.lr" in told, told
    assert "then begin anew, with --overwrite on both sides" in told
    assert "diverged" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("side", ["device", "server"])
def test_a_ctrl_c_that_is_ignored_stays_so(side: str, tmp_path: Path) -> None:
    """As in the background of a script, whose foreground it is meant for."""
    (tmp_path / "recipe.toml").write_text(recipe_text(schedule="phases = [[0, 500]]"))
    ignoring = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
    arguments = (tmp_path / "recipe.toml", "--run", tmp_path / "server", "--threads", 1)
    with pair.server(*arguments, log=tmp_path / "log", prefix=ignoring) as (server, address):
        line = pair.command("device-client", "train", address, "--data", "digits", "--run", tmp_path / "device")
        with subprocess.Popen((*ignoring, *line), stdout=-1, stderr=-1, text=True, env=pair.environment()) as device:
            metrics, lines = tmp_path / "device" / "metrics.jsonl", 0
            try:
                for wanted in (1, 20):
                    deadline = time.monotonic() + 60
                    while lines < wanted and time.monotonic() < deadline and device.poll() is server.poll() is None:
                        lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
                        time.sleep(0.1)
                    assert lines >= wanted and device.poll() is server.poll() is None
                    os.kill((device if side == "device" else server).pid, signal.SIGINT)
            finally:
                device.terminate()
            assert "Stopping after this step" in device.communicate(timeout=60)[0]
            assert device.returncode == 128 + signal.SIGTERM


def test_health_says_that_a_server_stops() -> None:
    """So that nobody is sent to it any more."""
    stops = False
    health = Health(("deprune.v1.Split",), lambda: stops)

    def told() -> list[int]:
        requests = [health_pb2.HealthCheckRequest(service=name) for name in ("", "deprune.v1.Split")]
        return [health.Check(request, Mock()).status for request in requests]

    answer = health_pb2.HealthCheckResponse
    assert told() == [answer.SERVING] * 2
    stops = True
    assert told() == [answer.NOT_SERVING] * 2
