"""A device that stayed while its server was replaced by one that was started otherwise."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from benchmarks.inprocess import Stub
from common.checkpoint import Checkpoints
from common.run import RunFolder
from device_client.data import Dataset
from device_client.link import Stream
from device_client.remote_tail import RemoteTail
from device_client.trainer import Trainer
from edge_server.servicer import Servicer
from tests.legs import CASES, server_of


def test_a_server_that_comes_back_says_anew_when_checkpoints_are_kept(
    few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that stayed goes by it: else the two would soon have no step in common."""
    text, first, written = CASES["nested widths"], server_of(tmp_path, CASES["nested widths"]), []

    def unwatched(remote: RemoteTail, call: Any) -> Stream:
        return Stream(call, remote.server, watched=False)

    monkeypatch.setattr(RemoteTail, "_connect", lambda remote: None)
    monkeypatch.setattr(RemoteTail, "_open_stream", unwatched)
    remote = RemoteTail("127.0.0.1:1", stub=Stub(Servicer(first)))
    remote._channel = Mock()  # so that a lost stream is opened again
    remote.open(trains=True)
    trainer = Trainer(remote, few, RunFolder(tmp_path / "device"), Console(file=io.StringIO()))
    trainer.prepare((), None)
    trainer.folder.start(text)
    after, write = trainer._after, Checkpoints.write

    def replaced(*arguments: Any) -> dict[str, Any]:
        line = after(*arguments)
        if trainer.step == 6:
            assert first.run
            first.run.keep()
            first.folder.close()
            second = server_of(tmp_path, text)
            assert second.run
            second.run.every = 3
            remote._lose()
            remote._stub = Stub(Servicer(second))
        return line

    def noted(checkpoints: Checkpoints, step: int, *arguments: Any) -> None:
        written.append((checkpoints.folder.parent.name, step))
        write(checkpoints, step, *arguments)

    monkeypatch.setattr(Checkpoints, "write", noted)
    trainer._after = replaced  # type: ignore[method-assign]
    assert trainer.run(publish=False)["steps"] == 20
    for side in ("device", "server"):
        steps = {step for of, step in written if of == side}
        assert {4, 9, 12, 15} <= steps and 8 not in steps, (side, steps)
