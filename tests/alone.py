"""A device in this process whose head learns alone, and the server that it will train with."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from benchmarks import inprocess
from benchmarks.recipes import recipe_text
from common.run import RunFolder
from device_client.data import Dataset
from device_client.remote_tail import RemoteTail
from device_client.trainer import Trainer
from edge_server.servicer import Servicer
from tests.legs import server_of

CODEC = 'activation = "step:10"\ngradient = "step:5"'


FROZEN = "phases = [{ width = 4, epochs = 2, views = 1 }]"


def text_of(epochs: float, schedule: str = FROZEN, start: str = "auto", **more: str) -> str:
    tables = {"local": f"epochs = {epochs}", "bottleneck": f'kind = "linear"\nstart = "{start}"'} | more
    return recipe_text("fixed", codec=CODEC, schedule=schedule, **tables)


def trainer_of(path: Path, text: str, data: Dataset) -> Trainer:
    """A device that has opened its session with a server in this process."""
    folder = RunFolder(path / "device")
    remote = RemoteTail("127.0.0.1:1", stub=inprocess.Stub(Servicer(server_of(path, text))))
    remote.open(trains=True)
    trainer = Trainer(remote, data, folder, Console(file=io.StringIO(), width=200))
    trainer.prepare((), None)
    folder.start(text)
    return trainer
