"""What both commands have in common: how options are given to them, and what they begin and end with. A user's mistake
is one sentence and an exit code, never a traceback."""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


def run(module: str) -> None:
    """Run the command line `cli` of `module`; exit 1 on an error of ours, click's own code on wrong options, 130 on
    Ctrl-C, which is what shells say of a process that it ended too."""
    # Libraries take a second to load, on a small device many. A Ctrl-C somewhere in them would be a traceback, so until
    # they are there it ends the process itself. Where it is ignored, as in a shell's background, it stays so.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = importlib.import_module(module).cli
    import click
    from rich.console import Console
    from rich.markup import escape

    from common.errors import DepruneError

    signal.signal(signal.SIGINT, before)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # a terminal or log that has no such letter must not end a run
    try:
        command(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        Console().print("Interrupted.")
        sys.exit(130)
    except DepruneError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]Error[/red]: {escape(str(error))}", highlight=False)
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            raise
        Console(stderr=True, soft_wrap=True).print(
            f"[red]Error[/red]: the output cannot be written: {error.strerror}", highlight=False
        )
        sys.exit(1)
    finally:
        _let_go_of_output()


def with_options(options: list[Any]) -> Any:
    """A decorator that gives a command these, in their order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _let_go_of_output() -> None:
    """What could not be written would be tried once more as Python ends, with a message and an exit code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
