"""Starts of the two processes without the seconds that each takes to load torch: forks of one that has loaded it.

What runs in them is what the command line would run, in a process of its own with its own sockets and signals. The fork
server never computes nor opens a channel, so that there is nothing in it that a fork could break.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import IO
from unittest import mock

from benchmarks import pair

_PRELOADED = ["torch", "common.codecs.payload", "common.codecs.mixing", "edge_server.server", "device_client.whole"]
_context = multiprocessing.get_context("forkserver")


class Forked:
    """As subprocess.Popen of `python -m MODULE ARGUMENT...` with its output in files, as far as the tests use it."""

    def __init__(self, line: list[str], *, stdout: IO[bytes], stderr: IO[bytes] | int, env: dict[str, str]) -> None:
        python, option, module, *self.args = line
        assert (python, option) == (sys.executable, "-m"), line
        out = stdout.name
        err = out if stderr == subprocess.STDOUT else stderr.name  # type: ignore[union-attr]
        _preload(env)
        # A daemon: it ends with the tests, whatever became of the one that started it.
        self._process = _context.Process(
            target=_main, args=(module, self.args, out, err, env, str(Path.cwd())), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()


def _preload(env: dict[str, str]) -> None:
    """Start the fork server with the environment that its forks have: libraries read theirs while they load."""
    _context.set_forkserver_preload(_PRELOADED)
    with mock.patch.dict(os.environ, env, clear=True):
        forkserver.ensure_running()


def _main(module: str, arguments: list[str], out: str, err: str, env: dict[str, str], folder: str) -> None:
    """What the interpreter would do with `-m module arguments`."""
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: PTH123, SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def use() -> None:
    """Have `pair` start its processes this way from here on."""
    pair.popen = Forked
