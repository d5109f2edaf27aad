"""How figures, names and errors of others are put into words for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def size(count: float) -> str:
    """Bytes for people, in powers of 1000 as links are: 12.3 MB."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1), ("GB", 1)):
        if round(count, digits) < 1000:
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def for_json(number: float) -> float | None:
    """None for what is no number, or has no end: JSON has neither."""
    return number if math.isfinite(number) else None


def several(count: float, what: str) -> str:
    """1 step, 1,200 steps, 1.57 epochs."""
    shown = f"{count:,}" if isinstance(count, int) else f"{round(count, 2):g}"
    return f"{shown} {what}" + "s" * (shown != "1")


def some(names: Sequence[str], most: int = 5) -> str:
    """a, b, c and 1,200 more: no more than `most` of the names, and how many others there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def unlike(names: Sequence[str], expected: Sequence[str]) -> str:
    """'cat' where it has 'dog', or 3 where it has 10: in what `names` are not those expected; "" where they are."""
    if len(names) != len(expected):
        return f"{len(names)} where it has {len(expected)}"
    return next((f"{a!r} where it has {b!r}" for a, b in zip(names, expected, strict=True) if a != b), "")


def by(shape: Iterable[int]) -> str:
    """3x32x32"""
    return "x".join(map(str, shape))


def one_line(error: BaseException) -> str:
    """RuntimeError: what it says, however many lines that has, and no more of it than there is room for."""
    text = str(error).partition("Original traceback:")[0]  # which torch.fx appends
    return f"{type(error).__name__}: {' '.join(text.split())}"[:300]


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def gives_up(seconds: float) -> str:
    """gives up in 9:41; never gives up"""
    return "never gives up" if math.isinf(seconds) else f"gives up in {duration(seconds)}"
