"""The smaller tables of docs/results.md: which rows each has. `benchmarks.learning --table NAME` trains them into
benchmarks/results/learning-NAME.json."""

from __future__ import annotations

from benchmarks.learning_cases import CASES

_FROZEN = "prune to 8 weighted, head frozen"

TABLES: dict[str, tuple[str, ...]] = {
    # What a finer end is worth, and a coarser codec or a late width.
    "snr": (
        *(f"deprune {width}, 10 then 15 dB" for width in (8, 4, 2, 1)), "deprune 8, 10 then 20 dB",
        "deprune 4 then 16, late", "fixed width 8, 5 dB", "fixed width 16, 5 dB",
    ),
    # Prune's seconds beside fixed's, all on one machine, and what else was tried.
    "time": (
        "plain on other pictures", "plain on other pictures, longer", "fixed width 8", "fixed width 8, longer", _FROZEN,
        f"{_FROZEN}, 30 dB",
        *(f"{_FROZEN}, 30 dB, from a longer network{more}" for more in ("", ", 4 epochs", ", new views")),
        *(case.name for case in CASES if case.name.startswith("prune to 8 weighted, tried: ")),
    ),
    # Components by what the tail listens to, beside those by variance alone.
    "weighted": (
        "plain on other pictures", "prune to 8, head frozen", _FROZEN, "prune to 8, head frozen at first",
        "prune to 8 weighted, head frozen at first", "prune to 4, head frozen", "prune to 4 weighted, head frozen",
        "plain on other pictures, later cut", "prune to 24 of 64 weighted, later cut",
    ),
    # What the head learns alone.
    "local": (
        "deprune none then 8, head frozen", "deprune none then 8, head frozen, longer alone, 10 dB",
        "deprune none then 16, head frozen, longer alone, 20 dB", "deprune none then 8, head frozen, then learning",
        "deprune none then 1, longer alone, 28 epochs, none frozen",
        *(case.name for case in CASES if case.name.startswith("12 epochs of width 8")),
        "fixed width 1, 5 epochs, head alone before", "fixed width 1, 5 epochs, head alone before, lr 0.02",
        "plain on five other classes", "five classes: prune to 8 weighted, head frozen, longer",
        "five classes: prune to 8, head alone, then frozen, longer",
    ),
    # The learning rate halved and doubled.
    "rates": tuple(case.name for case in CASES if case.name.endswith((", lr 0.05", ", lr 0.2"))),
}  # fmt: skip
