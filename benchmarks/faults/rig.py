"""A device and a server with the proxy in between, and someone who starts again whichever of them dies.

`Rig` trains one run to its end, whatever happens to it meanwhile; `suffer` makes something happen. `make faults`,
`make soak` and the tests use it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import pair
from benchmarks.faults import points, proxy
from benchmarks.faults.proxy import Fault, Proxy
from common.meter import UP

SIDES = ("device", "server")
SIGNALS = {f"{side} {name}": (side, signal.Signals[name]) for side in SIDES for name in ("SIGKILL", "SIGTERM")}
KINDS = (*proxy.KINDS, *SIGNALS)
# Where a process ends so often in a row without a step between, it will not get any further.
_RESTARTS = 6
# Longer than any time after which a side must have noticed that the link is dead.
_STUCK_S = 150.0


class RigError(Exception):
    """The run does not get to its end."""


@dataclass(frozen=True)
class Blow:
    """A fault that is to happen."""

    kind: str  # of KINDS
    point: str  # of points.POINTS; "" under TLS, where any bytes must do
    step: int = -1  # not before the answer to this one
    part: float | None = None  # of the message that still passes; None: as fits the point
    seconds: float = 0.0  # of a delay or a black hole
    bit: float = 0.5
    anywhere: bool = False  # FLIP: a bit of all that passes together, HTTP/2's included, not only of our message

    def __str__(self) -> str:
        return f"{self.kind} at {self.point or 'any bytes under TLS'}"


@dataclass
class Rig:
    """`folder` gets recipe.toml, device/, server/ and a log for each process that was started."""

    folder: Path
    text: str
    checkpoint_every: int = 5
    pictures: int = 0  # for training; 0: all of the digits
    tls: Path | None = None  # what `edge-server certs` made
    processor: str = "cpu"  # where both halves compute
    proxy: Proxy = field(default_factory=Proxy)
    finished: bool = False
    restarts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    drains: list[float] = field(default_factory=list)  # seconds from SIGTERM to the exit of a server
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Rig:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.toml").write_text(self.text)
        self._started = {side: 0 for side in SIDES}
        self._told: dict[str, float] = {}
        self._progress = -1, time.monotonic()
        self._fruitless = 0
        try:
            self._start_server()
        except BaseException:  # Ctrl-C too: nothing may be left running
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        self.proxy.close()

    # The two processes

    def run_of(self, side: str) -> Path:
        return self.folder / side

    def _log(self, side: str) -> Path:
        return self.folder / f"{side}-{self._started[side]}.log"

    def _start_server(self) -> None:
        self.proxy.target = ""
        self._started["server"] += 1
        run, log = self.run_of("server"), self._log("server")
        # A run that is finished there is served on: its device may not know yet.
        done = (run / "summary.json").is_file()
        what: tuple[object, ...] = () if done else (self.folder / "recipe.toml",)
        every: tuple[object, ...] = () if done else ("--checkpoint-every", self.checkpoint_every)
        trust = ("--tls-cert", self.tls / "server.pem", "--tls-key", self.tls / "server.key") if self.tls else ()
        process = self.processes["server"] = pair.start(
            "edge-server", "serve", *what, "--run", run, "--listen", "127.0.0.1:0", "--threads", 1,
            "--device", self.processor, *every, *trust, log=log,
        )  # fmt: skip
        try:
            self.proxy.target = pair.address_of(process, log)
        except RuntimeError as error:
            raise RigError(str(error)) from error

    def start_device(self) -> None:
        self._started["device"] += 1
        limit = ("--limit", self.pictures) if self.pictures else ()
        trust = ("--tls-ca", self.tls / "ca.pem") if self.tls else ()
        self.processes["device"] = pair.start(
            "device-client", "train", self.proxy.address, "--data", "digits", "--run", self.run_of("device"),
            "--threads", 1, "--device", self.processor, "--wait", 120, "--give-up-after", 120, *limit, *trust,
            log=self._log("device"),
        )  # fmt: skip

    def tick(self) -> None:
        """Start again what has ended; RigError where that leads nowhere."""
        now = time.monotonic()
        if self.step > self._progress[0]:
            self._progress, self._fruitless = (self.step, now), 0
        for side in ("server", "device"):
            process = self.processes.get(side)
            if process is None or process.poll() is None or self.finished:
                continue
            if side == "server" and side in self._told:
                self.drains.append(now - self._told.pop(side))
            if side == "device" and process.returncode == 0:
                self.finished = True
                continue
            self._fruitless += 1
            self.restarts[side] += 1
            if self._fruitless > _RESTARTS:
                raise RigError(f"the {side} ends again and again at step {self.step}: {self._last_words(side)}")
            self._start_server() if side == "server" else self.start_device()
            self._progress = self._progress[0], time.monotonic()
        if now - self._progress[1] > _STUCK_S and not self.finished:
            raise RigError(f"nothing has moved for {_STUCK_S:.0f} s at step {self.step}")

    def _last_words(self, side: str) -> str:
        lines = [line.strip() for line in self._log(side).read_text().splitlines() if line.strip()]
        return " ".join(lines[-3:])[-400:]

    def signal(self, side: str, number: signal.Signals) -> None:
        """Send it now; also called from the proxy's thread, at a byte."""
        if number == signal.SIGTERM:
            self._told[side] = time.monotonic()
        self.processes[side].send_signal(number)

    @property
    def step(self) -> int:
        """The highest step that the device has had an answer to; -1 before the first."""
        if not self.tls:
            return self.proxy.step
        try:
            lines = (self.run_of("device") / "metrics.jsonl").read_bytes().splitlines()
            return max(self.proxy.step, json.loads(lines[-1])["step"]) if lines else -1
        except (OSError, ValueError):
            return -1

    def until(self, condition: Callable[[], bool], pause_s: float = 0.01) -> bool:
        """Wait, keeping the processes alive; false where the run ends before."""
        ticked = 0.0
        while not condition():
            if time.monotonic() - ticked > 0.05:
                self.tick()
                ticked = time.monotonic()
            if self.finished:
                return condition()
            time.sleep(pause_s)
        return True

    def finish(self) -> None:
        """Train on to the end, and have the server leave; RigError where either doesn't."""
        if "device" not in self.processes:
            self.start_device()
        self.until(lambda: self.finished)
        server = self.processes["server"]
        server.terminate()
        try:
            code = server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            raise RigError("the server does not leave on SIGTERM after the run") from None
        if code not in (0, -signal.SIGKILL):  # it may have been killed just after the device had all that it wanted
            raise RigError(f"the server of the finished run ended with {code}: {self._last_words('server')}")

    # What happens to them

    def suffer(self, blow: Blow) -> bool:
        """Have `blow` happen; false where the run ended before it could."""
        if blow.point == points.HANDSHAKE:
            fault = self.proxy.arm(self._fault(blow))
            self.start_device()
            return self.until(fault.fired.is_set)
        if "device" not in self.processes:
            self.start_device()
        if blow.point == points.RECONNECT:
            cut = self.proxy.arm(Fault(proxy.CUT, points.moment(points.FORWARD, blow.step)))
            if not self.until(cut.fired.is_set):
                return False
        if blow.point == points.CHECKPOINT and not self._await_files(blow):
            return False
        if not blow.point and not self.until(lambda: self.step >= blow.step):
            return False
        fault = self._fault(blow)
        if blow.point == points.CHECKPOINT and blow.kind in SIGNALS:
            fault.act()  # at once, not at the next byte
            return True
        self.proxy.arm(fault)
        fired = self.until(fault.fired.is_set)
        self.proxy.disarm()
        return fired

    def recovered(self) -> bool:
        """Wait until a step is answered that never was before; false where the run ends instead."""
        before = self.step
        return self.until(lambda: self.step > before)

    def _fault(self, blow: Blow) -> Fault:
        moment = points.moment(blow.point, blow.step) if blow.point else points.bulk(UP, 400)
        part = points.part_of(blow.point) if blow.part is None else blow.part
        if blow.kind in (proxy.TRUNCATE, proxy.DELAY):  # with all of it gone, nothing would be cut or held up
            part = 0.5
        if blow.kind == proxy.FLIP and blow.anywhere:
            moment = points.widened(moment)
        fault = Fault(blow.kind, moment, part, blow.seconds, blow.bit)
        if blow.kind in SIGNALS:
            side, number = SIGNALS[blow.kind]
            fault.kind, fault.lossy = proxy.CALL, number == signal.SIGKILL
            fault.act = lambda: self.signal(side, number)
        return fault

    def _await_files(self, blow: Blow) -> bool:
        """Wait until a checkpoint starts to be written, on the side that the fault is for."""
        if not self.until(lambda: self.step >= blow.step):
            return False
        side = SIGNALS[blow.kind][0] if blow.kind in SIGNALS else "device"
        known = _names(self.run_of(side))
        # Often: the files have their final names a few milliseconds later.
        return self.until(lambda: bool(_names(self.run_of(side)) - known), pause_s=0.0005)


def _names(folder: Path) -> set[str]:
    return {os.path.join(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files)}  # noqa: PTH118
