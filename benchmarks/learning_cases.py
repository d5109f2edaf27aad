"""The rows of `make bench-learning`: what each trains, on which pictures, from what start."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, replace
from typing import Any

from common import optim
from common.recipe import METHODS

EPOCHS = 20
# What plain and ours differ in is the link; batch, augmentation and optimiser are one for all.
RECIPE = """
name = "{name}"
method = "{method}"
seed = {seed}
precision = "{precision}"
[model]
name = "{model}"
input = [3, 32, 32]
classes = {classes}
cut = "{cut}"
init = "{init}"
[data]
batch = 128
crop = 4
flip = true
mean = [0.49, 0.48, 0.45]
std = [0.25, 0.24, 0.26]
[bottleneck]
kind = "{kind}"
start = "{basis}"
[codec]
activation = "{up}"
gradient = "{down}"
[schedule]
phases = [{phases}]
[local]
epochs = {local}
[optimiser]
lr = {lr}
warmup = {warmup}
restart = {restart}
"""


def precision(kind: str = "cpu") -> str:
    """bf16 where such a processor multiplies it; where it must imitate it, fp32 is twice as fast."""
    return "fp32" if kind == "cpu" and optim.imitated("bf16") else "bf16"


# The cut of most rows, and a later one: 32 channels of 16x16, then 64 of 8x8 (vgg11: 128 of 8x8, 256 of 4x4).
CUTS = {
    "tiny": ("stage1_relu2", "stage2_1_relu2"),
    "resnet20": ("stage2_0_relu2", "stage3_0_relu2"),
    "mobilenetv2": ("stage3_0_out", "stage4_0_out"),
    "vgg11": ("stage2_pool", "stage3_pool"),
}
# Epochs as a share of a row's own where it starts from nothing: a step of these takes several times longer.
SHARES = {"resnet20": 0.5, "mobilenetv2": 0.5, "vgg11": 0.5}
QUICK_SHARE = 0.5
# Which pictures a row trains on: a half of those that are read, all classes or five of them.
ALL, OTHERS, LAST_FIVE, FIRST_FIVE = "all", "others", "last five", "first five"


@dataclass(frozen=True)
class Case:
    """One row. `phases` is TOML; `start` names the case whose trained network it goes on from, seed by seed."""

    name: str
    method: str  # plain (also as "pretrained", "fine-tuned"), fixed, deprune, prune; "federated", "jpeg"
    phases: str = f"[0, {EPOCHS}]"
    kind: str = "none"
    up: str = "fp32"
    down: str = "fp32"
    basis: str = "auto"  # what a linear bottleneck starts from
    part: str = ALL
    start: str = ""
    local: float = 0  # epochs that the head learns alone before
    lr: float = 0.1
    warmup: int = 100
    restart: bool = False
    later: bool = False  # cut later, where the device computes more and less crosses
    quick: bool = False  # in the quick benchmark too
    main: bool = False  # of the larger networks too
    network: str = ""  # the only one that has such a row
    apart: bool = False  # trained only where it is asked for by name, or with the table that it is in

    def is_of(self, model: str) -> bool:
        """Whether it is among a network's rows, where none are asked for by name."""
        if self.apart:
            return False
        return self.network == model if self.network else self.main or model == "tiny"

    @property
    def epochs(self) -> float:
        """Of the run's phases, without the shares that larger networks and the quick benchmark take."""
        return sum(whole[1] if isinstance(whole, list) else whole["epochs"] for whole in _parsed(self.phases))

    def recipe(self, model: str, seed: int, init: str, quick: bool = False, kind: str = "cpu") -> str:
        """`kind` of processor: what it computes in follows from it."""
        classes = 10 if self.part in (ALL, OTHERS) else 5
        method = self.method if self.method in METHODS else "plain"
        part = 1 if self.start else share(model, quick)
        return RECIPE.format(
            name=self.name, method=method, seed=seed, model=model, classes=classes, cut=CUTS[model][self.later],
            init=f"run:{init}" if init else "", kind=self.kind, basis=self.basis, up=self.up, down=self.down,
            phases=shortened(self.phases, part), local=self.local * part, lr=self.lr, warmup=self.warmup,
            restart=str(self.restart).lower(), precision=precision(kind),
        )  # fmt: skip


def share(model: str, quick: bool) -> float:
    """The part of a row's epochs that is trained, where it starts from nothing."""
    return SHARES.get(model, 1) * (QUICK_SHARE if quick else 1)


def _parsed(phases: str) -> list[Any]:
    return tomllib.loads(f"phases = [{phases}]")["phases"]  # type: ignore[no-any-return]


def shortened(phases: str, share: float) -> str:
    """TOML phases with so much of their epochs."""
    if share == 1:
        return phases
    result = []
    for phase in _parsed(phases):
        if isinstance(phase, list):
            result.append(json.dumps([phase[0], phase[1] * share]))
        else:
            whole = phase | {"epochs": phase["epochs"] * share}
            if "views" in whole and whole["views"] >= whole["epochs"]:  # so that something is recalled
                whole["views"] = phase["views"] * share
            result.append("{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in whole.items()) + " }")
    return ", ".join(result)


KNOWN, KNOWN_LATER = "plain on other pictures", "plain on other pictures, later cut"
KNOWN_LONGER = "plain on other pictures, longer"
KNOWN_FIVE = "plain on five other classes"


def _linear(name: str, width: int, up: int = 15, down: int = 10, **more: Any) -> Case:
    return Case(name, "fixed", f"[{width}, {EPOCHS}]", "linear", f"step:{up}", f"step:{down}", **more)


def _growing(
    name: str, first: tuple[int, int], last: tuple[int, int], up: int = 15, before: str = "", **others: Any
) -> Case:  # fmt: skip
    """(width, epochs) with 10 dB up, then (width, epochs) with `up`; other phases `before` them, in TOML."""
    phases = f"{before}[{first[0]}, {first[1]}], {{ width = {last[0]}, epochs = {last[1]}, activation = 'step:{up}' }}"
    return Case(name, "deprune", phases, "linear", "step:10", "step:5", **others)


def _finer(width: int, coarse: int, fine: int, more: str = "", up: int = 15, **others: Any) -> Case:
    """One width, whose codec alone grows: so many epochs coarse, then so many fine."""
    return _growing(f"deprune {width}, 10 then {up} dB{more}", (width, coarse), (width, fine), up, **others)


def _from_nothing(
    name: str, width: int, local: float = EPOCHS, frozen: int = 4, learnt: tuple[int, int] = (10, 6), **others: Any
) -> Case:  # fmt: skip
    """The head learns alone; then each picture crosses once, and the tail learns from what it kept; then both learn,
    coarse and then finer. As many epochs of the tail as plain has, where nothing else is said."""
    sent_once = f"{{ width = {width}, epochs = {frozen}, views = 1, flip = true, shift = 2 }}, " * (frozen > 0)
    basis = "weighted" if local else "auto"
    return _growing(
        name, (width, learnt[0]), (width, learnt[1]), before=sent_once, basis=basis, local=local, **others
    )  # fmt: skip


THIRDS = "[2, 6.6667], [4, 6.6667], [8, 6.6666]"


def _five(name: str, method: str, phase: str, kind: str = "none", **more: Any) -> Case:
    """On five classes, or from a network that was trained on the other five."""
    part = FIRST_FIVE if method == "pretrained" else LAST_FIVE
    return Case(name, method, phase, kind, part=part, **more)


def _adapted(name: str, epochs: int, basis: str, local: float = 0, apart: bool = False) -> Case:
    """From the network of the other five classes: each picture crosses once; before, the head may learn alone."""
    return _five(
        name, "prune", f"{{ width = 8, epochs = {epochs}, views = 1, flip = true, shift = 2 }}", "linear",
        up="step:20", basis=basis, local=local, start=KNOWN_FIVE, lr=0.05, warmup=0, apart=apart,
    )  # fmt: skip


def _from_scratch(
    name: str, method: str, *phases: tuple[int, int], db: int, local: float = 0, quick: bool = False
) -> Case:
    """The head stays as it was drawn, or as it has learnt alone for `local` epochs, and each picture crosses once in a
    phase: (width, epochs) of each."""
    written = ", ".join(
        f"{{ width = {width}, epochs = {epochs}, views = 1, flip = true, shift = 2 }}" for width, epochs in phases
    )
    basis = "weighted" if local else "principal"
    return Case(name, method, written, "linear", f"step:{db}", basis=basis, local=local, quick=quick, apart=local > 0)


def _frozen(
    name: str, width: int, basis: str = "principal", learnt: float = 0, epochs: float = 2, up: int = 20,
    lr: float = 0.05, views: float = 1, start: str = KNOWN, **more: bool,
) -> Case:  # fmt: skip
    """From the trained network, by its principal components: each picture crosses once and is recalled, once where
    nothing else is said; then the head learns for so many epochs."""
    phases = f"{{ width = {width}, epochs = {epochs}, views = {views:g} }}"
    if learnt:
        phases += f", {{ width = {width}, epochs = {learnt} }}"
    return Case(
        name, "prune", phases, "linear", f"step:{up}", "step:10" if learnt else "fp32", basis, start=start, lr=lr,
        warmup=0, **more,
    )  # fmt: skip


def _stored(
    name: str, width: int, up: str, later: bool = False, basis: str = "principal", start: str = KNOWN,
    apart: bool = False,
) -> Case:  # fmt: skip
    """From the trained network, its head frozen: each picture crosses once. Width 0: without compression.

    What was kept is flipped when it is recalled and not shifted: a place of an 8x8 map is four pixels.
    """
    more = "epochs = 8, views = 1, flip = true" if later else "epochs = 12, views = 1, flip = true, shift = 2"
    method, kind = ("prune", "linear") if width else ("fine-tuned", "none")
    phase, lr = f"{{ width = {width}, {more} }}", 0.02 if later else 0.05
    return Case(name, method, phase, kind, up, basis=basis, start=start, lr=lr, warmup=0, later=later, apart=apart)


CASES = [
    Case("plain", "plain", quick=True, main=True),
    Case("plain, longer", "plain", "[0, 32]"),
    Case(KNOWN, "pretrained", part=OTHERS, quick=True, main=True),
    _growing("deprune 8 then 16", (8, 18), (16, 8), quick=True, main=True),
    _growing("deprune 8 then 16, longer", (8, 20), (16, 12)),
    _linear("fixed width 8", 8, quick=True, main=True),
    Case("fixed width 8, longer", "fixed", "[8, 32]", "linear", "step:15", "step:10"),
    _linear("fixed width 16", 16),
    Case("fixed width 16, longer", "fixed", "[16, 32]", "linear", "step:15", "step:10"),
    # As coarse as the growing ones are: what the width alone is worth.
    Case("fixed width 8, coarse, longer", "fixed", "[8, 32]", "linear", "step:10", "step:5"),
    _finer(16, 12, 8),
    _finer(16, 20, 12, ", longer"),
    # What a finer end is worth at narrower widths, and with another end; and whether coarser than 10 dB is.
    *(_finer(width, 12, 8, apart=True) for width in (8, 4, 2, 1)),
    _finer(8, 16, 4, up=20, apart=True),
    _growing("deprune 4 then 16, late", (4, 16), (16, 4), apart=True),
    _linear("fixed width 8, 5 dB", 8, 5, 1, apart=True),
    _linear("fixed width 16, 5 dB", 16, 5, 1, apart=True),
    # Nothing crosses while the head learns alone, for as many epochs again or twice as many; then each picture once.
    *(_from_nothing(f"deprune none then {width}", width) for width in (16, 8, 4)),
    *(
        _from_nothing(f"deprune none then {width}, longer alone", width, 2 * EPOCHS, main=width == 8)
        for width in (8, 4, 2, 1)
    ),
    # The narrowest need more steps of both halves together; they cost less here than *fixed*'s 20 epochs do.
    *(
        _from_nothing(f"deprune none then {width}, longer alone, 28 epochs", width, 2 * EPOCHS, learnt=(12, 12))
        for width in (2, 1)
    ),
    _from_nothing("deprune none then 1, longer alone, 28 epochs, none frozen", 1, 2 * EPOCHS, 0, (12, 12), apart=True),
    _from_nothing("deprune none then 32, longer alone", 32, 2 * EPOCHS, network="vgg11"),
    # What each part of it is worth.
    *(
        _from_nothing(f"12 epochs of width 8{more}", 8, local, frozen, (8, 4), apart=True)
        for more, local, frozen in (
            ("", 0, 0), (", head alone before", 20, 0), (", head alone for 40 before", 40, 0),
            (", head alone and frozen before", 20, 4),
        )
    ),
    _linear("fixed width 8, head alone before", 8, basis="weighted", local=EPOCHS),
    # A quarter and a half of its channels, as 8 and 16 are of the others' cuts.
    _growing("deprune 32 then 64", (32, 18), (64, 8), network="vgg11"),
    _linear("fixed width 32", 32, network="vgg11"),
    _frozen("prune to 8, head frozen", 8, quick=True),
    _frozen("prune to 8 weighted, head frozen", 8, "weighted", apart=True),
    _frozen("prune to 8 weighted, head frozen, 30 dB", 8, "weighted", epochs=2.4, up=30, lr=0.02, apart=True),
    # From a network that was trained as long as *fixed*'s longer row.
    Case(KNOWN_LONGER, "pretrained", "[0, 32]", part=OTHERS, apart=True),
    *(
        _frozen(
            f"prune to 8 weighted, head frozen, 30 dB, from a longer network{more}", 8, "weighted", epochs=epochs,
            up=30, lr=0.02, views=views, start=KNOWN_LONGER, apart=True,
        )
        for more, epochs, views in (("", 2.4, 1), (", 4 epochs", 4, 1), (", new views", 4, 4))
    ),
    # What else was tried within about a tenth of *fixed*'s time.
    *(
        Case(
            f"prune to 8 weighted, tried: {what}", "prune", phases, "linear", f"step:{up}", down, "weighted",
            start=KNOWN, lr=lr, warmup=0, apart=True,
        )
        for what, phases, up, down, lr in (
            ("lr 0.01", "{ width = 8, epochs = 2.4, views = 1 }", 20, "fp32", 0.01),
            ("lr 0.02", "{ width = 8, epochs = 2.4, views = 1 }", 20, "fp32", 0.02),
            ("lr 0.05", "{ width = 8, epochs = 2.4, views = 1 }", 20, "fp32", 0.05),
            ("lr 0.1", "{ width = 8, epochs = 2.4, views = 1 }", 20, "fp32", 0.1),
            ("flips", "{ width = 8, epochs = 2.4, views = 1, flip = true }", 20, "fp32", 0.02),
            ("flips and shifts", "{ width = 8, epochs = 2.4, views = 1, flip = true, shift = 1 }", 20, "fp32", 0.05),
            ("3.2 epochs", "{ width = 8, epochs = 3.2, views = 1 }", 30, "fp32", 0.02),
            ("two views", "{ width = 8, epochs = 3.2, views = 2 }", 30, "fp32", 0.02),
            ("new views", "{ width = 8, epochs = 2.9, views = 2.8 }", 25, "fp32", 0.02),
            ("1 epoch learnt", "{ width = 8, epochs = 1.5, views = 1 }, [8, 1]", 25, "step:10", 0.02),
            ("1.4 learnt", "{ width = 8, epochs = 0.75, views = 0.7 }, [8, 1.4]", 25, "step:10", 0.02),
        )
    ),
    _frozen("prune to 8, head frozen at first", 8, learnt=0.75, quick=True, main=True),
    _frozen("prune to 8 weighted, head frozen at first", 8, "weighted", learnt=0.75, apart=True),
    _frozen("prune to 4, head frozen", 4, apart=True),
    _frozen("prune to 4 weighted, head frozen", 4, "weighted", apart=True),
    _stored("fine-tuned, later cut, no codec", 0, "fp32", later=True),
    _stored("prune to 24 of 64, later cut", 24, "step:10", later=True),
    # What the loss feels is noted at the cut of the run before, so that one is cut there too.
    Case(KNOWN_LATER, "pretrained", part=OTHERS, later=True, apart=True),
    _stored(
        "prune to 24 of 64 weighted, later cut", 24, "step:10", later=True, basis="weighted", start=KNOWN_LATER,
        apart=True,
    ),  # fmt: skip
    _linear("fixed width 1", 1, quick=True),
    Case("fixed width 1, 5 epochs", "fixed", "[1, 5]", "linear", "step:10", "step:5", warmup=50, quick=True),
    _from_scratch("deprune 4 then 8, head frozen", "deprune", (4, 6), (8, 14), db=8),
    _from_scratch("fixed width 8, head frozen", "fixed", (8, 20), db=10, quick=True),
    # Nothing crosses while the head learns alone; then each picture once; then what a step takes, both ways.
    _from_scratch("deprune none then 8, head frozen", "deprune", (8, 20), db=10, local=20),
    *(
        _from_scratch(f"deprune none then {width}, head frozen, longer alone, {db} dB", "deprune", (width, 20), db=db,
                      local=40)
        for width, db in ((8, 10), (16, 20))
    ),
    Case(
        "deprune none then 8, head frozen, then learning", "deprune",
        "{ width = 8, epochs = 16, views = 1, flip = true, shift = 2 }, { width = 8, epochs = 4, lr = 0.06 }", "linear",
        "step:10", "step:5", "weighted", local=20, restart=True, warmup=20, apart=True,
    ),
    # What is left of that lead where the other one's head has learnt alone as well.
    *(
        Case(
            f"fixed width 1, 5 epochs, head alone before{more}", "fixed", phase, "linear", "step:10", "step:5",
            "weighted", local=20, warmup=50, restart=bool(more), apart=True,
        )
        for more, phase in (("", "[1, 5]"), (", lr 0.02", "{ width = 1, epochs = 5, lr = 0.02 }"))
    ),
    Case(
        "deprune 8, then 16 with the head frozen", "deprune",
        "[8, 6], { width = 16, epochs = 14, views = 6, flip = true, shift = 1 }", "linear", "step:10", "step:5",
    ),
    Case(
        "deprune 8 frozen, then 16", "deprune",
        "{ width = 8, epochs = 10, views = 1, flip = true, shift = 2 }, { width = 16, epochs = 3 }", "linear",
        "step:10", "step:5", "principal",
    ),
    Case("paper's deprune 2, 4, 8", "deprune", THIRDS, "channels"),
    Case("paper's fixed width 8", "fixed", f"[8, {EPOCHS}]", "channels"),
    Case("paper's fixed width 2", "fixed", f"[2, {EPOCHS}]", "channels"),
    Case("paper's prune to 8", "prune", "[8, 2]", "channels", start=KNOWN, lr=0.05, warmup=0),
    _stored("fine-tuned, no codec", 0, "fp32"),
    _stored("prune to 8, below the pictures", 8, "step:10"),
    Case("all channels, coarse codec", "fixed", up="step:10", down="step:5"),
    Case("fixed width 8, no codec", "fixed", f"[8, {EPOCHS}]", "linear"),
    _linear("fixed width 4", 4),
    _linear("fixed width 2", 2),
    Case("federated averaging", "federated"),
    _five(KNOWN_FIVE, "pretrained", f"[0, {EPOCHS}]"),
    _five("five classes: fixed width 8", "fixed", f"[8, {EPOCHS}]", "linear", up="step:15", down="step:10"),
    _adapted("five classes: prune to 8, head frozen", 4, "principal"),
    _adapted("five classes: prune to 8 weighted, head frozen, longer", 12, "weighted", apart=True),
    _adapted("five classes: prune to 8, head alone, then frozen, longer", 12, "weighted", local=10, apart=True),
    Case("pictures uploaded", "jpeg", quick=True),
]  # fmt: skip

# The learning rate of all rows that start from nothing is 0.1: what each method does at half and at twice as much, so
# that none loses by its settings.
_RATED = ("plain", "deprune 8 then 16", "fixed width 8", "fixed width 1", "paper's deprune 2, 4, 8")
CASES += [
    replace(case, name=f"{case.name}, lr {lr:g}", lr=lr, apart=True, quick=False, main=False)
    for case in CASES
    if case.name in _RATED
    for lr in (0.05, 0.2)
]
