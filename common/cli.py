"""What both commands end with: a user's mistake is one sentence and an exit code, never a traceback."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.markup import escape

from common.errors import DepruneError


def run(command: click.Group) -> None:
    """Run the command line; exit 1 on an error of ours, click's own code on wrong options, 130 on Ctrl-C."""
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
