"""What a person sees of long work: the time left fits the narrowest terminal, and reading many pictures is told."""

from __future__ import annotations

import errno
import io
import re
import time

import pytest
from rich.console import Console

from common.progress import Counting, RunningMean, Screen, StepProgress, note, warn
from common.words import several, size


@pytest.mark.parametrize(
    ("width", "told"),
    [
        (30, "step 10002/123456"),
        (40, "step 10002/123456  acc 50.0%"),
        (60, "step 10002/123456  acc 50.0%  up 123.5 MB"),
        (80, "step 10002/123456  width 16  acc 50.0%  up 123.5 MB  down 98.8 MB"),
        (140, "step 10002/123456  width 16  loss 2.345  acc 50.0%  up 123.5 MB  down 98.8 MB"),
    ],
)
def test_what_matters_most_fits(width: int, told: str) -> None:
    """The time left and the accuracy above all; what once had no room does not come and go with a number's length."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    with StepProgress(console, 123_456) as live:
        for done, up in ((9_990, 99_999_999), (10_000, 123_456_789), (10_001, 9_000_000), (10_002, 123_456_789)):
            live.step(done, RunningMean(2.345, 0.5), (16,), (up, 98_765_432))
            live._bar.refresh()
    lines = [line for line in _lines(console) if "/123456" in line]
    assert re.fullmatch(rf"{told}  [0-9:]+ left", lines[-1].rstrip("━╸╺ "))
    assert max(len(line.rstrip()) for line in lines) <= width and "…" not in lines[-1]
    assert re.findall("[a-z]+", lines[-1]) == re.findall("[a-z]+", next(line for line in lines if "10001/" in line))


def test_one_short_step_says_nothing_of_the_time_left() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with StepProgress(console, 100) as live:
        for done in (1, 2, 20):
            live.step(done, RunningMean(2.345, 0.5))
            live._bar.refresh()
    lines = _lines(console)
    assert {step: any(" left" in line for line in lines if f" {step}/100" in line) for step in (2, 20)} == {
        2: False,
        20: True,
    }


@pytest.mark.parametrize(("each", "left"), [(0.1, "0:16"), (30.0, "50:00")])
def test_the_time_left_is_of_the_last_minute_or_of_some_steps(
    each: float, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came before was ten times slower, and is over for as long."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=100)
    with StepProgress(console, 3100) as live:
        for done in range(1, 3001):
            now += 10 * each if done < 1000 else each
            live.step(done, RunningMean(2.345, 0.5))
    assert console.file.getvalue().splitlines()[-1].endswith(f"{left} left")  # type: ignore[attr-defined]


def _lines(console: Console) -> list[str]:
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    return re.split(r"[\r\n]", shown)


def test_what_is_told_in_place_of_steps_is_not_cut_off() -> None:
    console = Console(file=io.StringIO(), width=40, force_terminal=True)
    with StepProgress(console, 10) as live:
        live.waiting("reconnecting, attempt 3 (no server answers at 127.0.0.1:50051); gives up in 9:41")
        live._bar.refresh()
    assert "…" not in console.file.getvalue() and "9:41" in console.file.getvalue()  # type: ignore[attr-defined]
    log = Console(file=io.StringIO(), width=40)
    with StepProgress(log, 10) as live:
        live.waiting("judging")
    assert log.file.getvalue() == "judging\n"  # type: ignore[attr-defined]


def test_long_counting_is_told_with_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=80)
    with Counting(console, "Read", "pictures") as told:
        for now in (101.0, 104.0, 108.0, 115.0, 120.0):  # noqa: B007 - the clock that `told` reads
            told(round(now - 100) * 100, 2000)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "Read 400 of 2,000 pictures, 0:16 left",
        "Read 1,500 of 2,000 pictures, 0:05 left",
        "Read all 2,000 pictures in 0:20.",
    ]


def test_on_a_terminal_counting_is_a_line_below_the_steps_that_goes_when_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with StepProgress(console, 10) as live:
        live.step(5, RunningMean(2.3, 0.1))
        with pytest.raises(KeyboardInterrupt), Counting(console, "Judged", "pictures") as told:
            for now in (101.0, 104.0, 105.0, 106.0):  # noqa: B007 - the clock that `told` reads
                told(round(now - 100) * 100, 2000)
                live._bar.refresh()
            raise KeyboardInterrupt
        before = len(_lines(console))
        live._bar.refresh()
    lines = _lines(console)
    counted = [line for line in lines if line.startswith("Judged")]
    assert [line for line in dict.fromkeys(line.rstrip() for line in counted)] == [
        f"Judged {done} of 2,000 pictures, {left} left" for done, left in ((400, "0:16"), (500, "0:15"), (600, "0:14"))
    ]
    assert all(lines[at - 1].startswith("step 5/10") for at, line in enumerate(lines) if line.startswith("Judged"))
    assert not any(line.startswith("Judged") for line in lines[before:])


def test_a_log_on_a_full_disk_ends_nothing() -> None:
    class Disk(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    disk = Disk()
    screen = Screen(file=disk)
    with pytest.raises(OSError, match="No space left"):
        screen.print("a result")
    screen.may_be_lost = True
    with StepProgress(screen, 10) as live:
        for done in range(5):
            live.say(f"lost {done}")
            live.step(done, RunningMean(1.0, 0.5), (done,))
        disk.full = False
        live.say("there is room again")
    assert disk.getvalue() == "there is room again\n"


def test_a_terminal_that_is_gone_ends_nothing() -> None:
    """The bar is drawn by a thread of its own, and once more as it ends: neither goes through `print`."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            self.write("")

    screen = Screen(file=Gone(), force_terminal=True, width=140)
    screen.may_be_lost = True
    with StepProgress(screen, 10) as live:
        live.step(1, RunningMean(1.0, 0.5), (2,))
        live.say("a line")
    screen.may_be_lost = False
    with pytest.raises(OSError, match="Input/output error"):
        screen.print("a result")


def test_one_is_not_told_in_the_plural() -> None:
    told = [several(count, "epoch") for count in (0, 1, 1.0, 1.5, 12, 1200)]
    assert told == ["0 epochs", "1 epoch", "1 epoch", "1.5 epochs", "12 epochs", "1,200 epochs"]


def test_a_size_is_told_in_the_unit_that_it_rounds_to() -> None:
    told = [size(count) for count in (0, 999, 999.6, 999_949, 999_960, 12_345_678, 2e12)]
    assert told == ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "12.3 MB", "2.00 TB"]


def test_a_nested_phase_is_told_with_all_its_widths() -> None:
    console = Console(file=io.StringIO(), width=140)
    with StepProgress(console, 10) as live:
        live.step(1, RunningMean(2.3, 0.1), (2, 4, 8))
    assert "width 2/4/8" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_log_has_a_line_now_and_then_and_at_each_change_of_width(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=140)
    with StepProgress(console, 40) as live:
        for done in range(1, 31):
            now += 1.0
            live.step(done, RunningMean(2.3, 0.1), (2 if done < 14 else 4,))
        live.plan(50)
        now += 5.0
        live.step(35, RunningMean(2.3, 0.1), (4,))
    told = [line.split("  ") for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert [(line[0], line[1], line[-1]) for line in told] == [
        ("step 1/40", "width 2", "acc 10.0%"),
        ("step 11/40", "width 2", "0:29 left"),
        ("step 14/40", "width 4", "0:26 left"),
        ("step 24/40", "width 4", "0:16 left"),
        ("step 35/50", "width 4", "0:15 left"),
    ]


def test_loss_and_accuracy_are_shares_of_what_they_were_of_late() -> None:
    mean = RunningMean()
    for _ in range(3):
        mean.add(2.0, 0.5)
    assert (mean.loss, mean.accuracy) == (pytest.approx(2.0), pytest.approx(0.5))
    mean.add(0.0, 1.0)
    assert (mean.loss, mean.accuracy) == (pytest.approx(1.5), pytest.approx(0.625)), "the first steps count alike"
    for _ in range(200):
        mean.add(2.0, 0.5)
    mean.add(0.0, 1.0)
    assert (mean.loss, mean.accuracy) == (pytest.approx(1.9, abs=1e-3), pytest.approx(0.525, abs=1e-3))


def test_a_mean_that_says_not_over_how_many_steps_is_none_of_the_first() -> None:
    mean = RunningMean(0.3, 0.9)
    mean.add(2.3, 0.1)
    assert mean.loss == pytest.approx(0.4)


def test_what_a_user_has_named_is_no_markup() -> None:
    console = Console(file=io.StringIO(), width=140)
    note(console, "there is no class [red]")
    warn(console, "nor [/red]")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown == "Note: there is no class [red]\nWarning: nor [/red]\n"


def test_lines_of_a_log_may_begin_with_the_time() -> None:
    file = io.StringIO()
    screen = Screen(file=file, soft_wrap=True)
    screen.print("one")
    screen.timed = True
    screen.print("two\n\nthree")
    first, *rest = file.getvalue().splitlines()
    assert first == "one" and rest[1] == ""
    assert all(
        re.fullmatch(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ {word}", rest[at]) for at, word in ((0, "two"), (2, "three"))
    )
