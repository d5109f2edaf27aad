"""What a person sees: notes and warnings, and live progress, a moving line on a terminal or a plain line now and then
where output is a file."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from common.errors import printable
from common.words import duration, size

# Plain lines come at most this often, and at each change of width.
_EVERY_S = 10.0
_COUNTED_S = 3.0  # before the first line of what is counted
_SHARE = 0.05  # of a step in a running mean
_LATE_S = 60.0  # that an estimate looks back: less, and it jumps with whatever else the machine does
_ENOUGH, _ENOUGH_S = 8, 10.0  # steps or seconds that it needs
_TO_SPARE = 6  # columns by which numbers may grow
_BAR, _ENDLESS = 24, 100_000  # columns of a bar, and of a file
# What a terminal that is too narrow goes without, the first of them first.
_SPARED = ("loss", "down", "width", "up", "accuracy")


def note(console: Console, sentence: str) -> None:
    console.print(f"[yellow]Note[/yellow]: {escape(printable(sentence))}", highlight=False)


def warn(console: Console, sentence: str) -> None:
    console.print(f"[yellow]Warning[/yellow]: {escape(printable(sentence))}", highlight=False)


def warn_unencrypted(console: Console) -> None:
    console.print("[bold red]Not encrypted[/bold red]: anyone on the way can read and change what crosses the link.")


class _Losing:
    """A file whose writes may fail; all else is the file's."""

    def __init__(self, file: IO[str], screen: Screen) -> None:
        self._file, self._screen = file, screen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with self._screen.losing():
            return self._file.write(self._screen.stamped(text))
        return len(text)

    def flush(self) -> None:
        with self._screen.losing():
            self._file.flush()


class Screen(Console):
    """Where both sides say what they do. While a run is trained a log may be lost, on a full disk or because whoever
    read it is gone, its terminal too: that must not end what it tells of. A result that cannot be written is an error.
    """

    may_be_lost = False
    timed = False  # each line begins with the time: for a log that nobody else stamps

    @property  # type: ignore[misc]
    def file(self) -> IO[str]:
        return cast(IO[str], _Losing(Console.file.fget(self), self))  # type: ignore[attr-defined]

    def stamped(self, text: str) -> str:
        """`text`, of whole lines where it goes to a file, as it is written."""
        if not self.timed:
            return text
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return "".join(f"{now} {line}" if line.strip() else line for line in text.splitlines(keepends=True))

    @contextlib.contextmanager
    def losing(self) -> Iterator[None]:
        """Ignore that something cannot be written, where it may be lost."""
        try:
            yield
        except OSError as error:
            if not self.may_be_lost:
                raise
            if isinstance(error, BrokenPipeError):
                self.quiet = True  # nobody will ever read it


Counted = Callable[[int, int], None]  # told how many of many things are done, and of how many


def untold(done: int, total: int) -> None:
    """Where nobody looks."""


class Counting:
    """Says how many of many things are done, once that has taken a while: "Read 1,200 of 50,000 pictures".

    While it is entered, which may be inside a StepProgress: the two lines then stand below each other.
    """

    def __init__(self, console: Console, doing: str, what: str) -> None:
        self._console, self._doing, self._what = console, doing, what
        self._started = self._shown = time.monotonic()
        self._line = _line(console, [])
        self._task = self._line.add_task("")

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._line.stop()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        told = self._shown != self._started
        if done == total and told:
            took = duration(now - self._started)
            self._line.stop()
            self._console.print(f"{self._doing} all {total:,} {self._what} in {took}.", highlight=False)
            self._shown = self._started
        live = told and self._console.is_terminal
        if not 0 < done < total or not live and now - self._shown < (_EVERY_S if told else _COUNTED_S):
            return
        self._shown = now
        left = duration((now - self._started) / done * (total - done))
        text = f"{self._doing} {done:,} of {total:,} {self._what}, {left} left"
        if self._console.is_terminal:
            self._line.start()
            self._line.update(self._task, description=text)
        else:
            self._console.print(text, highlight=False)


def _line(console: Console, bar: Sequence[BarColumn]) -> Progress:
    """A line on a terminal that changes in place and goes when it is stopped; nothing elsewhere."""
    text = TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold"))
    return Progress(text, *bar, console=console, disable=not console.is_terminal, transient=True)


@dataclass
class RunningMean:
    """Loss and share of right answers over about 20 steps, for single batches jump; a run goes on with them."""

    loss: float | None = None
    accuracy: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        if self.loss is not None and not self.steps:  # a checkpoint's that does not say over how many
            self.steps = round(1 / _SHARE)

    def add(self, loss: float, accuracy: float) -> None:
        self.steps += 1
        share = max(_SHARE, 1 / self.steps)  # the first ones alike: else the very first would weigh most for long
        self.loss = loss if self.loss is None else (1 - share) * self.loss + share * loss
        self.accuracy = (1 - share) * self.accuracy + share * accuracy


class StepProgress:
    """Shows steps done, width, loss, accuracy, bytes and the time left, while it is entered."""

    def __init__(self, console: Console, steps: int, done: int = 0, name: str = "step") -> None:
        """`done` of the `steps`, which are called `name`, were made before, by another process perhaps."""
        self._name = name
        self._console = console
        self._steps = steps
        # Steps of late and when they were done: the first here also waits for what is set up.
        self._late: deque[tuple[int, float]] = deque()
        self._shown = 0.0
        self._width = ""
        self._columns = self._spared = 0  # of the terminal; how many of _SPARED it goes without
        # The bar is for wide terminals; what is told in place of steps may be longer than a line.
        bar = [BarColumn(bar_width=_BAR)] if console.width >= 120 else []
        self._room = _BAR + 1 if bar else 0
        self._bar = _line(console, bar)
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def step(
        self,
        done: int,
        mean: RunningMean,
        widths: Sequence[int] = (),
        crossed: tuple[int, int] | None = None,
        left_s: float | None = None,
        frozen: bool = False,
    ) -> None:
        """`done` steps are done, with this `mean` of late, and the last had one of these widths; bytes up and down, of
        the run, where any crossed; `left_s` until the end, else as the steps of late let expect; `frozen`: the head.
        """
        now = time.monotonic()
        self._late.append((done, now))
        while len(self._late) > _ENOUGH + 1 and now - self._late[1][1] > _LATE_S:
            self._late.popleft()
        parts = {"step": f"{self._name} {done}/{self._steps}"}
        width = "/".join(map(str, sorted(widths))) + " frozen" * frozen
        if width:
            parts["width"] = f"width {width}"
        parts |= {"loss": f"loss {mean.loss:.3f}", "accuracy": f"acc {mean.accuracy:.1%}"}
        if crossed:
            parts |= {"up": f"up {size(crossed[0])}", "down": f"down {size(crossed[1])}"}
        first, since = self._late[0]
        if left_s is None and done > first and (done - first >= _ENOUGH or now - since >= _ENOUGH_S):
            left_s = (now - since) / (done - first) * (self._steps - done)
        if left_s is not None:
            parts["left"] = f"{duration(left_s)} left"
        text = self._fitting(parts)
        self._bar.update(self._task, completed=done, description=text)
        if self._console.is_terminal:
            return
        if now - self._shown >= _EVERY_S or width != self._width:
            self._console.print(text, highlight=False)
            self._shown, self._width = now, width

    def _fitting(self, parts: dict[str, str]) -> str:
        """The parts as one line, without those that a narrow terminal has no room for; one that had to go stays away
        until there is room to spare, for the line's length changes with every step."""
        columns = self._console.width - self._room if self._console.is_terminal else _ENDLESS
        if columns != self._columns:
            self._columns, self._spared = columns, 0

        def line(spared: int) -> str:
            return "  ".join(part for name, part in parts.items() if name not in _SPARED[:spared])

        while self._spared < len(_SPARED) and len(line(self._spared)) > columns:
            self._spared += 1
        # Back with the last that had to go, where there is room to spare.
        if self._spared and len(line(self._spared - 1)) <= columns - _TO_SPARE:
            self._spared -= 1
        return line(self._spared)

    def plan(self, steps: int) -> None:
        """The run will have so many steps."""
        if steps != self._steps:
            self._steps = steps
            self._bar.update(self._task, total=steps)

    def waiting(self, text: str) -> None:
        """What is done in place of steps, for a moment or long: the bar shows it, and output to a file gets a line."""
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(text, highlight=False, markup=False)

    def say(self, text: str) -> None:
        """A line of its own that stays; with rich's markup."""
        self._bar.console.print(text, highlight=False)
