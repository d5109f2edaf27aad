"""What options of both commands have in common."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

# More only take memory, and far more end the process.
THREADS = click.option("--threads", type=click.IntRange(1, 1024), help="Threads for computing; default: all cores.")
TIMES = click.option("--times", is_flag=True, help="Begin each line with the time (UTC), in a log that nobody stamps.")


class Amount(click.FloatRange):
    """A number, or inf: so many, or no bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            known = not math.isnan(float(value))
        except ValueError:
            known = False
        if not known:
            self.fail(f"{value} is no number; give one, or inf.", param, ctx)
        return super().convert(value, param, ctx)


class File(click.Path):
    """A file that is there."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            Path(value).stat()
        except FileNotFoundError:
            pass  # which is told as such
        except OSError as error:  # else it would be told so as well
            self.fail(f"File {str(value)!r} cannot be reached: {error.strerror}.", param, ctx)
        return super().convert(value, param, ctx)


class Named(click.Path):
    """A path to `what`, whether something is there or not; where it is, a "folder" is one, and a "file" isn't."""

    def __init__(self, what: str) -> None:
        super().__init__(file_okay=what != "folder", dir_okay=what != "file", path_type=Path)
        self._what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):  # an unset variable of a script: the folder that it happens to run in
            self.fail(f"no {self._what} is named.", param, ctx)
        return super().convert(value, param, ctx)


FILE = File()
FOLDER = Named("folder")
