"""What both commands have in common: how options are given to them, and what they begin and end with. A user's mistake
is one sentence and an exit code, never a traceback."""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


def run(module: str) -> None:
    """Run the command line `cli` of `module`; exit with an error's own code, click's on wrong options, and on a signal
    as shells say of a process that it ended: 130 on Ctrl-C, 143 on SIGTERM."""
    _stand_in_for_what_is_closed()
    # Where they would end the process at once they end it in order, and also as the first process of a container, whom
    # no signal ends by itself. What serves or trains hears them its own way.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        Path.cwd()
    except OSError:
        sys.exit("Error: the folder that this was started in is not there any more; start it in another")
    # Libraries take a second to load, on a small device many. A Ctrl-C somewhere in them would be a traceback, so until
    # they are there it ends the process itself. Where it is ignored, as in a shell's background, it stays so.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = importlib.import_module(module).cli
    import click
    from rich.console import Console
    from rich.markup import escape

    from common.errors import DepruneError, printable

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
        Console(stderr=True).print("Interrupted.")
        sys.exit(130)
    except DepruneError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"[red]Error[/red]: {escape(printable(str(error)))}", highlight=False
        )
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        # A path of the user's that may not be looked at, or the output.
        what = "the output cannot be written" if error.filename is None else f"{error.filename} cannot be used"
        Console(stderr=True, soft_wrap=True).print(
            f"[red]Error[/red]: {escape(printable(what))}: {error.strerror}", highlight=False
        )
        sys.exit(1)
    finally:
        _let_go_of_output()


def leave_at_once() -> NoReturn:
    """End the process in order, but without its threads, for whose end Python would wait. The kernel lets go of what is
    locked only with the process, so nobody else writes where such a thread still might."""
    _let_go_of_output()
    os._exit(0)


def with_options(options: list[Any]) -> Any:
    """A decorator that gives a command these, in their order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _stand_in_for_what_is_closed() -> None:
    """Where input or output was closed before the start, the next file or connection would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def _let_go_of_output() -> None:
    """What could not be written would be tried once more as Python ends, with a message and an exit code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
