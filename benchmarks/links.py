"""`make bench-links`: how soon a dead link is found, that a slow one is left alone, which flipped bits stall a stream.

A black hole is the proxy's (what stands between goes on confirming) or, with root, a veth pair that lets nothing out.
Writes benchmarks/results/links.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import netns, pair
from benchmarks.faults import points, proxy
from benchmarks.faults.proxy import Fault, Proxy
from benchmarks.limits import server
from benchmarks.machine import machine
from benchmarks.recipes import BATCH, CLASSES, PHASE
from common.meter import DOWN, UP
from common.pulse import STALLED_S
from common.rpc import split_pb2 as pb
from device_client.remote_tail import RemoteTail

RESULT = Path("benchmarks/results/links.json")
# Slow links, with a queue of 2 MB in front: what crosses in one step of 262 kB each way takes so long to come through.
SLOW = ("60kbit", "25kbit")
_QUEUE = "2mb"
_HEADER_BITS = 72
_STUCK_S = 5.0  # in place of STALLED_S, for 144 flips


@contextlib.contextmanager
def _server(prefix: tuple[str, ...] = (), listen: str = "127.0.0.1:0") -> Iterator[tuple[str, Path]]:
    """Its address, and its log."""
    with tempfile.TemporaryDirectory() as name:
        folder, extra = Path(name), ("--insecure",) if prefix else ()
        with server(folder, "--max-calls", 1e6, *extra, listen=listen, prefix=prefix) as (_, address):
            yield address, folder / "log"


class Device:
    """One in training, that says of each step how long it took and why it reconnected."""

    def __init__(self, address: str, stalled_s: float = STALLED_S) -> None:
        self.remote, self.said, self._step = RemoteTail(address, stalled_s=stalled_s), [], 0
        self.remote.say = self.said.append
        self.remote.open(trains=True)
        self.remote.begin(1438, CLASSES)

    def step(self, count: int = 1) -> float:
        started = time.monotonic()
        for _ in range(count):
            self.remote.learn(self._step, PHASE, *BATCH)
            self._step += 1
        return round(time.monotonic() - started, 1)

    def evaluate(self) -> float:
        started = time.monotonic()
        batches = [BATCH] * 3
        self.remote.evaluate(lambda: batches, 96, pb.SUBSET_UNSPECIFIED, PHASE, CLASSES, self._step)
        return round(time.monotonic() - started, 1)


def holes() -> dict[str, float]:
    """Seconds from a black hole to the answer over a new connection, and to the server's own notice of it."""
    found: dict[str, float] = {}
    with _server() as (address, log), Proxy(address) as between:
        device = Device(between.address)
        for point in (points.FORWARD, points.BACKWARD, points.REPLY, points.EVALUATION):
            device.step(3)
            fault = between.arm(Fault(proxy.HOLE, points.moment(point), points.part_of(point)))
            found[point] = device.evaluate() if point == points.EVALUATION else device.step()
            assert fault.fired.is_set(), point
        device.step()
        device.remote.give_up_s = 0.0  # it does not come back, so that only the server can notice
        known, fault = len(log.read_text()), between.arm(Fault(proxy.HOLE))
        assert fault.fired.wait(60)
        started = time.monotonic()
        while "the link is dead" not in log.read_text()[known:] and time.monotonic() - started < 120:
            time.sleep(0.1)
        found["noticed by the server"] = round(time.monotonic() - started, 1)
        device.remote.close()
    return found


def flips() -> dict[str, list[int]]:
    """The bits of a DATA frame's header, by way, whose flip had both sides wait until the link counted as stuck."""
    stuck: dict[str, list[int]] = {UP: [], DOWN: []}
    with _server() as (address, _), Proxy(address) as between:
        device = Device(between.address, _STUCK_S)
        for way in (UP, DOWN):
            for bit in range(_HEADER_BITS):
                device.said.clear()
                between.arm(Fault(proxy.FLIP, points.http2(way, points.DATA), bit=(bit + 0.5) / _HEADER_BITS))
                device.step(3)
                if any("the link is stuck" in line for line in device.said):
                    stuck[way].append(bit)
        device.remote.close()
    return stuck


def slow(rate: str) -> dict[str, Any]:
    """Two steps over a link of `rate`."""
    with _apart() as (server, device, address):
        for end, other in ((server, device), (device, server)):
            end.far_from(other)
            end.shape(rate, _QUEUE)
        with _elsewhere(device, address, "2") as process:
            assert process.stdout
            lines = [json.loads(line) for line in process.stdout]
    return {
        "rate": rate,
        "step_s": [line["step_s"] for line in lines],
        "reconnects": sum(len(x["said"]) for x in lines),
    }


def lost() -> float:
    """Seconds until a device finds that not a packet passes any more, on either way."""
    with _apart() as (server, device, address), _elsewhere(device, address, "1000000") as process:
        assert process.stdout
        for _ in range(20):
            process.stdout.readline()
        for end, other in ((server, device), (device, server)):
            end.far_from(other)
            end.shape("8bit", "1")
        started = time.monotonic()
        said = [line for line in process.stdout if "reconnecting" in line]
        # Whoever is first: the device, or its kernel, which gRPC has told to wait no longer.
        assert "the link is dead" in said[0] or "timed out" in said[0], said
        return round(time.monotonic() - started, 1)


@contextlib.contextmanager
def _apart() -> Iterator[tuple[netns.End, netns.End, str]]:
    """A server in a namespace of its own, and the device's end of the link to it."""
    with netns.link() as (server, device), _server(server.prefix, f"{server.address}:50051") as (address, _):
        yield server, device, address


@contextlib.contextmanager
def _elsewhere(end: netns.End, address: str, steps: str) -> Iterator[subprocess.Popen[str]]:
    """This module as a device there: a line of JSON for each step, until the first reconnect."""
    line = [*end.prefix, sys.executable, "-m", "benchmarks.links", "--device", address, steps]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=pair.environment()) as process:
        try:
            yield process
        finally:
            process.kill()


def _be_device(address: str, steps: int) -> None:
    device = Device(address)
    device.remote.say = lambda text: print(json.dumps({"step_s": None, "said": [text]}), flush=True) or os._exit(0)
    for _ in range(steps):
        print(json.dumps({"step_s": device.step(), "said": []}), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--device"]:
        _be_device(sys.argv[2], int(sys.argv[3]))
        return
    result: dict[str, Any] = {"machine": machine(), "date": str(date.today())}
    result["black_hole_s"] = holes()
    print("seconds from a black hole to the next answer:", result["black_hole_s"], flush=True)
    if missing := netns.unavailable():
        print(f"left out: {missing}")
    else:
        result["all_packets_lost_s"] = lost()
        print("seconds until a link that loses all packets is found:", result["all_packets_lost_s"], flush=True)
        result["slow"] = [slow(rate) for rate in SLOW]
        print("slow links:", result["slow"], flush=True)
    result["stuck_bits"] = flips()
    print("bits of a DATA frame's header that left both sides waiting:", result["stuck_bits"], flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
