"""`make bench-limits`: what a hostile device costs a well-behaved one, and what a million opens leave in a server.

Step times are taken in turn alone and beside benchmarks/hostile.py, on a server with its usual limits; then one that
lets calls pass as often as they come is flooded with handshakes. Writes benchmarks/results/limits.json.
tests/test_limits_served.py runs the first part, short, for what the server holds; no test asserts on its times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import grpc
import psutil

from benchmarks import pair
from benchmarks.machine import machine
from benchmarks.recipes import BATCH, CLASSES, PHASE, recipe_text
from common import channel, wire
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from device_client.remote_tail import RemoteTail

RESULT = Path("benchmarks/results/limits.json")
_ROUNDS, _STEPS, _WARM = 40, 25, 20
_AT_ONCE = 16  # opens on one connection


def server(folder: Path, *options: object, **where: Any) -> contextlib.AbstractContextManager[Any]:
    """As pair.server, for more steps than anyone takes; its log is `folder`/log."""
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe_text(schedule="phases = [[0, 1000]]"))
    return pair.server(recipe, "--run", folder / "run", "--threads", 1, *options, log=folder / "log", **where)


def size(process: psutil.Process) -> tuple[int, int, int]:
    """Bytes in memory, threads, descriptors."""
    return process.memory_info().rss, process.num_threads(), process.num_fds()


def beside(folder: Path, rounds: int = _ROUNDS, steps: int = _STEPS) -> dict[str, Any]:
    """A device's median seconds of a step alone and beside a hostile one; the server's size, round by round."""
    with server(folder) as (process, address), contextlib.ExitStack() as stack:
        remote = RemoteTail(address)
        stack.callback(remote.close)
        remote.open(trains=True)
        remote.begin(1438, CLASSES)
        step = 0

        def stretch(count: int) -> list[float]:
            nonlocal step
            times = []
            for _ in range(count):
                started = time.perf_counter()
                remote.learn(step, PHASE, *BATCH)
                times.append(time.perf_counter() - started)
                step += 1
            return times

        stretch(_WARM)
        line = [sys.executable, "-m", "benchmarks.hostile", address]
        hostile = stack.enter_context(subprocess.Popen(line, stdout=-1, env=pair.environment()))
        stack.callback(hostile.kill)
        assert hostile.stdout and hostile.stdout.readline() == b"at work\n"
        stretch(_WARM)
        alone, together, sizes = [], [], []
        for _ in range(rounds):
            together.append(statistics.median(stretch(steps)))
            sizes.append(size(psutil.Process(process.pid)))
            hostile.send_signal(signal.SIGSTOP)
            alone.append(statistics.median(stretch(steps)))
            hostile.send_signal(signal.SIGCONT)
        assert hostile.poll() is None, "the hostile device has ended by itself"
        hostile.terminate()
        done = dict(word.split("=") for word in hostile.stdout.read().decode().split())
        log = (folder / "log").read_text()
        assert process.poll() is None and "Traceback" not in log, log
        reconnects = remote.faults.reconnects
    return {
        "alone_ms": round(1000 * statistics.median(alone), 2),
        "beside_ms": round(1000 * statistics.median(together), 2),
        "ratio": round(statistics.median(together) / statistics.median(alone), 3),
        "steps": step,
        "reconnects": reconnects,
        "hostile": {name: int(count) for name, count in done.items()},
        "server_sizes": sizes,
        "log_bytes": len(log),
    }  # fmt: skip


def opens(folder: Path, count: int) -> dict[str, Any]:
    """`count` handshakes as fast as they come: the server's size before, every tenth of the way, and at the end."""
    request = wire.seal(pb.OpenRequest(protocol_version=wire.PROTOCOL_VERSION, purpose=pb.TRAIN))
    with server(folder, "--max-calls", 1e9) as (process, address):
        watched, sizes, refused = psutil.Process(process.pid), [], 0
        started = time.perf_counter()
        with grpc.insecure_channel(address, options=channel.DEVICE_OPTIONS) as link:
            stub = split_pb2_grpc.SplitStub(link)
            for number in range(0, count, _AT_ONCE):
                calls = [stub.Open.future(request) for _ in range(min(_AT_ONCE, count - number))]
                refused += sum(call.exception() is not None for call in calls)
                if number // _AT_ONCE % max(1, count // _AT_ONCE // 10) == 0:
                    sizes.append(size(watched))
            sizes.append(size(watched))
        seconds = time.perf_counter() - started
        assert process.poll() is None and "Traceback" not in (folder / "log").read_text()
    return {"count": count, "refused": refused, "seconds": round(seconds, 1), "server_sizes": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.limits", description=__doc__)
    parser.add_argument("--opens", type=int, default=1_000_000, metavar="N")
    count = parser.parse_args().opens
    result: dict[str, Any] = {"machine": machine(), "date": str(date.today())}
    with tempfile.TemporaryDirectory() as folder:
        result["beside"] = beside(Path(folder))
    print(f"a step takes {result['beside']['ratio']:.2f} times as long beside a hostile device", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result["opens"] = opens(Path(folder), count)
    first, last = result["opens"]["server_sizes"][1], result["opens"]["server_sizes"][-1]
    print(f"{count:,} opens: the server's memory went from {first[0] / 1e6:.1f} to {last[0] / 1e6:.1f} MB")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
