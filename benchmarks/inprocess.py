"""Trains without sockets: device and server in one process, the device's stub calling the servicer's methods.

Frames, codecs, checks and meters are those of two processes, only gRPC and TCP are missing: the same losses and the
same payload and message bytes (tests/test_inprocess.py), so many runs can be compared without starting processes.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import torch
from rich.console import Console

from common import checkpoint
from common import recipe as recipes
from common.halves import CPU
from common.run import RunFolder
from common.schedule import Phase
from device_client.data import Dataset
from device_client.remote_tail import RemoteTail, StepResult
from device_client.trainer import Trainer
from edge_server.host import Host
from edge_server.limits import Limits
from edge_server.servicer import Servicer
from edge_server.training import Training


class _Failed(grpc.RpcError):
    """What a stub raises where the servicer ended the RPC with a status."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Any) -> None:
        super().__init__(details)
        self._answer = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str:
        return self._answer[1]

    def trailing_metadata(self) -> Any:
        return self._answer[2]


class _Context:
    """The little of grpc.ServicerContext that the servicer uses."""

    metadata: Any = ()

    def peer(self) -> str:
        return "inprocess"

    def is_active(self) -> bool:
        return True

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.metadata = metadata

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise _Failed(code, details, self.metadata)


class _Call:
    """The little of a stream's call that the device uses: its frames, and word of its end."""

    def __init__(self, frames: Iterator[Any]) -> None:
        self._frames = frames

    def close(self) -> None:
        """The device is gone: the servicer's method ends where it stands."""
        self._frames.close()  # type: ignore[attr-defined] -- it is a generator

    def __next__(self) -> Any:
        return next(self._frames)

    def add_callback(self, _callback: Callable[[], None]) -> bool:
        """Asked for when the device has said its last: the servicer reads that, and has ended by then."""
        for _ in self._frames:
            pass
        return False


class Stub:
    """A stub whose calls run in the caller's thread: a stream's generator advances when its next frame is asked for."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer
        self._training: weakref.ref[_Call] | None = None

    def close(self) -> None:
        """End the last stream of training: before its host is closed, and not whenever it is collected."""
        if call := self._training and self._training():
            call.close()

    def Open(self, request: Any, **_options: Any) -> Any:
        return self._servicer.Open(request, _Context())

    def Head(self, request: Any) -> Iterator[Any]:
        return self._servicer.Head(request, _Context())

    def Train(self, frames: Iterator[Any]) -> _Call:
        call = _Call(self._servicer.Train(frames, _Context()))
        self._training = weakref.ref(call)  # it ends with the device's last word of it, too
        return call

    def Evaluate(self, frames: Iterator[Any]) -> _Call:
        return _Call(self._servicer.Evaluate(frames, _Context()))


# Called after each step with its number, its phase, the device's loop and what the server holds for it.
Watch = Callable[[int, Phase, Trainer, Training], None]


def train(
    text: str, data: Dataset, remote_class: type[RemoteTail] = RemoteTail, folder: Path | None = None,
    watch: Watch | None = None, limits: Limits | None = None, publish: bool = False, processor: torch.device = CPU,
    **remote: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train the recipe in `text` on `data`; the device's summary.

    `remote_class`: a RemoteTail that also looks on. `folder`: where the two run folders are kept, `device` and
    `server`, if they are. `watch` sees the halves as they are after each step. Both compute on
    `processor`.
    """
    quiet = Console(file=io.StringIO())
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        host = Host.to_train(
            recipes.parse(text), text, RunFolder(place / "server"), quiet, (), folder is not None, limits, processor
        )
        stack.callback(host.close)
        stub = Stub(Servicer(host))
        stack.callback(stub.close)
        tail = remote_class("127.0.0.1:1", stub=stub, **remote)
        stack.callback(tail.close)
        tail.open(trains=True)
        run = RunFolder(place / "device")
        run.prepare(overwrite=folder is not None)
        checkpoint.clear(run.local)
        trainer = Trainer(tail, data, run, quiet, processor)
        trainer.prepare((), None)
        if watch:
            _observe(watch, trainer, host)
        run.start(text)
        return trainer.run(publish)


def _observe(watch: Watch, trainer: Trainer, host: Host) -> None:
    """Have `watch` called where the device takes in the result of a step: both halves have applied it by then."""
    after = trainer._after

    def watched(result: StepResult, seconds: dict[str, float]) -> dict[str, Any]:
        assert host.run and host.run.training
        watch(trainer.step, trainer.phase, trainer, host.run.training)
        return after(result, seconds)

    trainer._after = watched  # type: ignore[method-assign]
