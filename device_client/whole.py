"""A whole run on the device, from an opened session to the summary, or to where its user stops it."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Any

import torch
from rich.console import Console

from common import halves, signals
from common.errors import DivergedError, LinkError
from common.run import RunFolder
from device_client.data import Dataset
from device_client.remote_tail import RemoteTail
from device_client.trainer import Trainer


def train(
    remote: RemoteTail, data: Dataset, folder: RunFolder, console: Console, allowed: tuple[str, ...],
    init: RunFolder | None, publish: bool, processor: torch.device = halves.CPU, anew: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A whole run over an opened session, or what is left of one, the head on `processor`; the summary. `anew`: it
    replaces another that may lie in the folder.

    The first Ctrl-C (SIGTERM, or the end of its terminal) lets the present step end, keeps a checkpoint and tells the
    server; a second one, or one while there is no connection, ends at once: the run goes on from before the step that
    was under way where it waited for the server, else from its newest checkpoint. The process then ends as shells have
    it for a program that a signal stopped: with 130, 143 after SIGTERM, 129 after the end of its terminal.
    """
    trainer = Trainer(remote, data, folder, console, processor)
    trainer.prepare(allowed, init)
    if not trainer.begun:
        folder.start(remote.opened.text)

    caught = signal.SIGINT

    def on_signal(number: int, _frame: object) -> None:
        nonlocal caught
        caught = signal.Signals(number)
        if trainer.stopping or remote.offline:
            raise KeyboardInterrupt
        trainer.stopping = True
        again = "; press Ctrl-C again to stop at once" if caught == signal.SIGINT else ""
        # Where the output is held up, this is called in the middle of a write, and another may not begin.
        with contextlib.suppress(RuntimeError):
            console.print(f"Stopping after this step or evaluation{again}.")

    before = signals.hear(on_signal)
    how = "start it again with the same --run to go on"
    try:
        return trainer.run(publish, anew)
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # whoever presses it once more waits for no server
            trainer.rest()
        kept = max(trainer.checkpoints.written, default=0)
        back = f" from step {kept:,}, its newest checkpoint" if trainer.begun and kept != trainer.step else ""
        console.print(f"Stopped{trainer.where}; the run is not finished: {how}{back}.", highlight=False)
        sys.exit(128 + caught)
    except DivergedError as error:
        if trainer.begun:
            remote.interrupt(trainer.step, trainer.phase, "its training has diverged")
        text = f"{error}; then begin anew, with --overwrite on both sides"
        if trainer.local:
            text += f": with local.lr = {trainer.recipe.local_lr:g} what the head has learnt alone is taken again"
        raise DivergedError(text) from error
    except LinkError as error:
        raise LinkError(f"{error}; the run stopped{trainer.where} and is not finished: {how}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        folder.close()
