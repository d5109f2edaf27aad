"""The runs of `make faults`: one without faults, one for each entry of the matrix, one that suffers many at random."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults import compare, points, proxy
from benchmarks.faults.rig import KINDS, Blow, Rig, RigError

RECIPE = """
name = "faults"
method = "deprune"
seed = 5
[model]
name = "tiny"
input = [1, 16, 16]
classes = 10
cut = "stage1_relu2"
[data]
batch = 32
crop = 1
flip = true
validation = 0.1
[bottleneck]
kind = "linear"
[codec]
activation = "step:20"
gradient = "step:5"
[schedule]
phases = [{phases}]
[optimiser]
lr = 0.05
warmup = 5
"""
# Training pictures: short epochs, for many evaluations and phase switches among few steps.
PICTURES = 400
_EPOCH = 11  # steps that they come to, less those held out
UNDER_TLS = "any bytes, under TLS"
# Steps that a fault takes of a random run, on average: its pause, the way to its point, and one to show recovery.
_STEPS_A_FAULT = 8
_MATRIX_STEP = 20  # by then each side has checkpoints; the second phase switch comes at step 33


def recipe(*phases: tuple[int, float]) -> str:
    """The digits with these (width, epochs)."""
    return RECIPE.format(phases=", ".join(f"[{width}, {epochs}]" for width, epochs in phases))


SHORT = recipe((2, 1.5), (4, 1.5), (8, 2))  # 55 steps


def long_enough(count: int) -> str:
    """A run for so many faults: a phase switch every epoch and a half."""
    stretches = max(3, round(count * _STEPS_A_FAULT / _EPOCH / 1.5))
    return recipe(*((2 if 3 * i < stretches else 4 if 3 * i < 2 * stretches else 8, 1.5) for i in range(stretches)))


def fault_free(folder: Path, text: str, pictures: int = PICTURES, processor: str = "cpu") -> Path:
    """Train `text` with nothing happening to it; the folder to compare with."""
    shutil.rmtree(folder, ignore_errors=True)
    with Rig(folder, text, pictures=pictures, processor=processor) as rig:
        rig.finish()
    return folder


@dataclass
class Entry:
    """What became of one fault, or of the run that it was in."""

    kind: str
    point: str
    step: int = -1  # the last that was answered before
    seconds: float | None = None  # until a step was answered that never was before; None: the next fault came first
    replayed: int = 0  # steps that were sent again
    problems: list[str] = field(default_factory=list)
    weights_equal: bool | None = None  # None: of one fault in a run of many, or not known


def struck(rig: Rig, blow: Blow, wait: bool = True) -> Entry | None:
    """Have `blow` happen to the run and see it recover; None where the run ended before."""
    replayed = rig.proxy.replayed
    if not rig.suffer(blow):
        return None
    entry, fired = Entry(blow.kind, blow.point or UNDER_TLS, rig.step), time.monotonic()
    if wait:
        rig.recovered()
        entry.seconds = round(time.monotonic() - fired, 2)
    entry.replayed = rig.proxy.replayed - replayed
    return entry


# The matrix


def matrix_blows(tls: bool) -> list[Blow]:
    """Each kind at each point; under TLS, where points cannot be told, each kind once."""
    where = ("",) if tls else points.POINTS
    return [_matrix_blow(kind, point) for point in where for kind in KINDS]


def _matrix_blow(kind: str, point: str) -> Blow:
    # A black hole lasts until both sides have noticed it by themselves: that is what the keepalive is for.
    return Blow(kind, point, _MATRIX_STEP, seconds=1.0 if kind == proxy.DELAY else 0.0)


def matrix_entry(folder: Path, reference: Path, blow: Blow, tls: Path | None) -> Entry:
    """A run of its own that suffers `blow`, compared with the one without."""
    shutil.rmtree(folder, ignore_errors=True)
    entry = Entry(blow.kind, blow.point or UNDER_TLS)
    started = time.monotonic()
    with Rig(folder, SHORT, pictures=PICTURES, tls=tls) as rig:
        try:
            happened = struck(rig, blow)
            entry = happened or entry
            rig.finish()
            entry.problems += compare.differences(reference, folder) if happened else ["the run ended too early for it"]
            entry.weights_equal = compare.weights_equal(reference, folder)
        except RigError as error:
            entry.problems.append(str(error))
            entry.step = rig.step
            entry.seconds = round(time.monotonic() - started, 2)
        entry.replayed = rig.proxy.replayed
    if tls and not entry.problems:  # what the proxy can't count there, the device has counted
        entry.replayed = compare.summary(folder / "device")["faults"]["steps_again"]
    if not entry.problems:
        shutil.rmtree(folder)
    return entry


# Many faults at random


@dataclass
class Random:
    """Runs that suffer `count` faults in all, drawn from `seed`; one, if its recipe is long enough."""

    folder: Path
    count: int
    seed: int
    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    runs: int = 0
    restarts: dict[str, int] = field(default_factory=dict)
    drains: list[float] = field(default_factory=list)
    weights_equal: bool = True
    counted: list[dict[str, int]] = field(default_factory=list)  # by the devices themselves, run by run

    def __iter__(self) -> Iterator[Entry]:
        """Go through it, fault by fault."""
        text = long_enough(self.count)
        reference = fault_free(self.folder / "reference", text)
        draw = random.Random(self.seed)
        while len(self.entries) < self.count and not self.problems:
            self.runs += 1
            run = self.folder / f"run-{self.runs}"
            shutil.rmtree(run, ignore_errors=True)
            with Rig(run, text, pictures=PICTURES) as rig:
                try:
                    yield from self._suffer(rig, draw)
                    rig.finish()
                    self.problems += compare.differences(reference, run)
                    self.weights_equal &= compare.weights_equal(reference, run)
                    self.counted.append(compare.summary(run / "device")["faults"])
                except RigError as error:
                    self.problems.append(str(error))
                    self.weights_equal = False
                self.drains += rig.drains
                for side, number in rig.restarts.items():
                    self.restarts[side] = self.restarts.get(side, 0) + number
        if not self.problems:
            shutil.rmtree(self.folder)

    def _suffer(self, rig: Rig, draw: random.Random) -> Iterator[Entry]:
        first = True
        while len(self.entries) < self.count:
            last = len(self.entries) == self.count - 1
            point = points.HANDSHAKE if first else points.GOODBYE if last else draw.choice(_DRAWN)
            first = False
            # One in four comes while the one before may still be felt.
            entry = struck(rig, drawn(draw, point, rig.step), wait=draw.random() < 0.75)
            if entry is None:
                return
            self.entries.append(entry)
            yield entry

    def summary(self) -> dict[str, Any]:
        times = sorted(entry.seconds for entry in self.entries if entry.seconds is not None)
        return {
            "count": len(self.entries), "seed": self.seed, "runs": self.runs, "by_kind": self.by(lambda e: e.kind),
            "by_point": self.by(lambda e: e.point), "steps_replayed": self.replayed, "restarts": self.restarts,
            "recovery_s": {"median": times[len(times) // 2], "longest": times[-1]} if times else None,
            "counted_by_device": self.counted, "longest_drain_s": round(max(self.drains), 2) if self.drains else None,
            "weights_equal": self.weights_equal, "problems": self.problems,
        }  # fmt: skip

    @property
    def replayed(self) -> int:
        return sum(entry.replayed for entry in self.entries)

    def by(self, key: Callable[[Entry], str]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for entry in self.entries:
            counts[key(entry)] = counts.get(key(entry), 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


_DRAWN = [point for point in points.POINTS if point not in (points.HANDSHAKE, points.GOODBYE)]


def drawn(draw: random.Random, point: str, step: int) -> Blow:
    """A fault of random kind and size, some steps after `step`."""
    kind = draw.choice(KINDS)
    seconds = draw.uniform(0.2, 2.0) if kind in (proxy.DELAY, proxy.HOLE) else 0.0
    part = draw.choice((None, 0.0, 0.5, 1.0))
    return Blow(kind, point, step + draw.randint(0, 6), part, seconds, draw.random(), draw.random() < 0.5)
