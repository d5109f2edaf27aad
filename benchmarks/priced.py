"""What a run coded by `step` would have sent with `context`: both train alike, so a sample of its steps tells it.

`context` takes so long that coding all tensors of all rows of a benchmark by it would take most of its time. Of each
phase the first step that sends and every 16th after it are coded by both.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

from common.codecs import NOTHING, Aside
from common.codecs.base import Buffer, Tensor
from common.codecs.step import Step
from common.meter import DOWN, UP
from common.schedule import Phase
from device_client.remote_tail import RemoteTail

EVERY = 16


class Prices:
    """Bytes that `context` saves in one run, and the seconds that finding out has taken."""

    def __init__(self, every: int = EVERY) -> None:
        self.seconds = {UP: 0.0, DOWN: 0.0}
        self._every = every
        self._steps: Counter[int] = Counter()  # that sent something, by the number of their phase
        self._sampled: Counter[int] = Counter()
        self._saved = {UP: Counter[int](), DOWN: Counter[int]()}

    @property
    def spent(self) -> float:
        return sum(self.seconds.values())

    def saved(self, way: str) -> int:
        """Bytes until now: in each phase as many a step as the sampled ones had on average."""
        saved = self._saved[way]
        return round(sum(saved[phase] / count * self._steps[phase] for phase, count in self._sampled.items()))

    @contextlib.contextmanager
    def step(self, phase: int) -> Iterator[None]:
        """One step's way there and back, in one thread."""
        due = self._steps[phase] % self._every == 0
        self._steps[phase] += 1
        if not due:
            yield
            return
        self._sampled[phase] += 1
        plain = Step.encode

        def encode(codec: Step, tensor: Tensor, aside: Aside = NOTHING) -> Buffer:
            payload, way = plain(codec, tensor, aside), DOWN if aside.dither else UP
            if codec.coder == "step":
                started = time.perf_counter()
                self._saved[way][phase] += len(payload) - len(plain(codec.by("context"), tensor, aside))
                self.seconds[way] += time.perf_counter() - started
            return payload

        with mock.patch.object(Step, "encode", encode):
            yield


class Priced(RemoteTail):
    """A RemoteTail whose training steps are priced."""

    def __init__(self, *arguments: Any, prices: Prices, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._prices = prices

    def learn(self, step: int, phase: Phase, *arguments: Any, **options: Any) -> Any:
        with self._prices.step(phase.index):
            return super().learn(step, phase, *arguments, **options)


def main() -> None:
    """`python -m benchmarks.priced SOURCE`: how far the sample is off in two epochs of "fixed width 8"."""
    from benchmarks.inprocess import train
    from benchmarks.learning_cases import CASES
    from benchmarks.options import add_source
    from device_client.data import load

    parser = argparse.ArgumentParser(description=main.__doc__)
    add_source(parser)
    data = load(parser.parse_args().source, (3, 32, 32), 0, 0.0, limit=20_000)
    text = next(case for case in CASES if case.name == "fixed width 8").recipe("tiny", 0, "")
    prices = Prices(every=1)
    told: list[tuple[int, int]] = []
    train(
        text.replace("[8, 20]", "[8, 2]"), data, Priced, prices=prices,
        watch=lambda *_: told.append((prices.saved(UP), prices.saved(DOWN))),
    )  # fmt: skip
    for way, total in zip((UP, DOWN), zip(*told, strict=True), strict=True):
        each = [after - before for before, after in zip((0, *total), total, strict=False)]
        sampled = each[::EVERY]
        off = sum(sampled) / len(sampled) * len(each) / total[-1] - 1
        print(f"{way}: {total[-1] / 1e6:.2f} MB saved in {len(each)} steps; every {EVERY}th tells {off:+.2%}")


if __name__ == "__main__":
    main()
