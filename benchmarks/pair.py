"""Starts the two processes the way a user does; the demo, the benchmarks and the tests stand on it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LISTENS = re.compile(r"listens on (\S+),")

# How a process is started: the tests have a faster way.
popen: Any = subprocess.Popen


def command(name: str, *arguments: object) -> list[str]:
    """The command line of `edge-server` or `device-client` in this environment."""
    return [sys.executable, "-m", name.replace("-", "_"), *map(str, arguments)]


def environment() -> dict[str, str]:
    """What the processes see: passive waiting, so that one side's idle threads don't take the other's core."""
    return os.environ | {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "100"}


def start(name: str, *arguments: object, log: Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """`edge-server ARGUMENTS` or `device-client ARGUMENTS` in the background, its output in `log`.

    `prefix` stands before the command line, to run it elsewhere (`ip netns exec NAME`).
    """
    with log.open("wb") as output:
        line = [*prefix, *command(name, *arguments)]
        return _begin(line, prefix, stdout=output, stderr=subprocess.STDOUT)


@contextlib.contextmanager
def server(
    *arguments: object, log: Path, timeout: float = 60, listen: str = "127.0.0.1:0", prefix: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`edge-server serve ARGUMENTS` on a free port: the process and HOST:PORT; killed at the end."""
    process = start("edge-server", "serve", *arguments, "--listen", listen, log=log, prefix=prefix)
    try:
        yield process, address_of(process, log, timeout)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def address_of(process: subprocess.Popen[bytes], log: Path, timeout: float = 60) -> str:
    """HOST:PORT of a server that was just started; raises where it ends instead."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = _LISTENS.search(log.read_text())
        if found:
            return found.group(1)
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"edge-server did not start:\n{log.read_text()}")


def device(
    *arguments: object, prefix: tuple[str, ...] = (), capture_output: bool = False, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """`device-client ARGUMENTS`, to its end."""
    line = [*prefix, *command("device-client", *arguments)]
    if not capture_output:
        return subprocess.run(line, text=True, env=environment(), check=check)
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        with _begin(line, prefix, stdout=out, stderr=err) as process:
            process.wait()
        words = [Path(file.name).read_text() for file in (out, err)]
    done = subprocess.CompletedProcess(line, process.returncode, *words)
    if check:
        done.check_returncode()
    return done


def _begin(line: list[str], prefix: tuple[str, ...], **options: Any) -> subprocess.Popen[bytes]:
    """In another namespace only the command line itself can be started."""
    begin = subprocess.Popen if prefix else popen
    return begin(line, env=environment(), **options)  # type: ignore[no-any-return]
