"""The recipe: one TOML file that says everything both sides must agree on.

Frozen dataclasses, read and checked once; the server owns the file, the device gets its text in the handshake
and checks the digest. Every default stands here, beside what it means.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from common import rules
from common.codecs import codec
from common.errors import CodecError, RecipeError
from common.tables import build, demand, one_of

METHODS = ("plain", "fixed", "deprune", "prune")
MOST, MOST_CLASSES = 1024, 65535  # channels, or pixels along a side
_MOST_NUMBERS = 1 << 26  # of one picture: layers are as large as what they take
_EPOCHS = 1_000_000


def channels_first(shape: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """What was meant where the shape is that of a picture with its channels last; None where it may be a sensor's."""
    first, second, third = shape
    like_a_picture = first == second or (third == 3 and first >= 16)
    return (third, first, second) if third in (1, 3) and first not in (1, 3) and like_a_picture else None


def in_toml(value: Any) -> str:
    """A value of a recipe as a file may have it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(in_toml, value))}]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _given(table: Any, name: str) -> bool:
    """Whether a key of a part of the recipe has another value than its default."""
    return bool(getattr(table, name) != getattr(type(table), name))


@dataclass(frozen=True)
class ModelRecipe:
    name: str  # a built-in name, or "package.module:factory" that each side's user allowed
    input: tuple[int, int, int]  # channels, height, width of a picture
    classes: int  # outputs of the network
    cut: str  # the graph node after which the model is cut; `edge-server cuts` lists them
    init: str = ""  # "" random, "run:DIR" a finished run's server folder, or a .safetensors of the whole model

    def __post_init__(self) -> None:
        legal_input = all(1 <= side <= MOST for side in self.input)
        turned = channels_first(self.input)
        demand(not turned, f"model.input is {list(self.input)}; channels come first: {list(turned or ())}")
        demand(legal_input, f"model.input is {list(self.input)}; give channels, height, width, each 1 to {MOST}")
        numbers = math.prod(self.input)
        demand(
            numbers <= _MOST_NUMBERS,
            f"model.input is {numbers:,} numbers a picture; at most {_MOST_NUMBERS:,} are taken",
        )
        demand(2 <= self.classes <= MOST_CLASSES, f"model.classes is {self.classes}; give 2 to {MOST_CLASSES}")
        known = not self.init or self.init.startswith("run:") or self.init.endswith(".safetensors")
        demand(known, f'model.init is {self.init!r}; give "run:DIR" or the path of a .safetensors file')


@dataclass(frozen=True)
class DataRecipe:
    batch: int = 128  # pictures a step
    crop: int = 0  # random crop after padding by so many pixels; 0 switches it off
    flip: bool = False  # random horizontal flip
    # Subtracted from pixels in 0..1, or from numbers as they are; one number, or one a channel.
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.25,)  # then divided by
    validation: float = 0.0  # share of the training pictures held out; a plateau schedule needs some
    # Pictures a batch when judging: a matter of speed, and of the result only slightly, for codecs round what crosses
    # together by one step.
    evaluation_batch: int = 256

    def __post_init__(self) -> None:
        demand(1 <= self.batch <= 65536, f"data.batch is {self.batch}; give 1 to 65536")
        demand(
            1 <= self.evaluation_batch <= 65536, f"data.evaluation_batch is {self.evaluation_batch}; give 1 to 65536"
        )
        demand(0 <= self.crop <= 64, f"data.crop is {self.crop}; give 0 to 64 pixels")
        demand(0 <= self.validation < 1, f"data.validation is {self.validation}; give a share from 0 up to below 1")
        demand(all(value > 0 for value in self.std), "data.std must be above 0")


@dataclass(frozen=True)
class BottleneckRecipe:
    kind: str = "none"  # "none" all channels as they are, "channels" the most important, "linear" a learnt 1x1 map
    # linear: "orthogonal" at random (from model.init's channels as they are), "principal" components of the activation,
    # "weighted" by the sensitivity to each direction in the run that `model.init` names, or where the head learnt alone
    # (without either as principal), or "auto": weighted with one of the two, else orthogonal.
    start: str = "auto"
    # linear, principal and weighted: pictures that the device takes the components of; a batch at the least.
    principal_pictures: int = 1024
    ranking_steps: int = 4  # channels: steps before each new width, with all that it may be of, to measure their worth

    def __post_init__(self) -> None:
        one_of("bottleneck.kind", self.kind, ("none", "channels", "linear"))
        one_of("bottleneck.start", self.start, ("auto", "orthogonal", "principal", "weighted"))
        demand(
            self.kind != "channels" or self.start == "auto",
            'bottleneck.start is about kind "linear"; kind "channels" begins with the channels that matter most: leave '
            "it out",
        )
        for name, kind in (("ranking_steps", "channels"), ("principal_pictures", "linear")):
            demand(
                self.kind == kind or not _given(self, name), f'bottleneck.{name} is about kind "{kind}": leave it out'
            )
        demand(self.principal_pictures >= 1, "bottleneck.principal_pictures must be 1 or more")
        demand(self.ranking_steps >= 1, "bottleneck.ranking_steps must be 1 or more")


@dataclass(frozen=True)
class CodecRecipe:
    """What a payload is made by; docs/codec.md says what each costs."""

    # What goes up: "fp32", "fp16", "int8", or "step", "context", "auto" with dB of SNR; method plain has "fp32".
    activation: str = "auto:20"
    # What comes down: the same; ":nearest" behind the SNR switches unbiased rounding off.
    gradient: str = "auto:10"

    def __post_init__(self) -> None:
        for name, value in (("activation", self.activation), ("gradient", self.gradient)):
            try:
                codec(value)
            except CodecError as error:
                raise RecipeError(f"codec.{name} is {value!r}: {error}") from error


_UNCODED = CodecRecipe("fp32", "fp32")


@dataclass(frozen=True)
class PhaseRecipe:
    """One entry of schedule.phases; the list [width, epochs] is short for a table with these two."""

    SHORT: ClassVar[str] = "[width, epochs], such as in phases = [[8, 20]]"

    width: int  # channels that cross; 0: all
    epochs: float  # parts of one are allowed
    activation: str = ""  # codec of this phase, such as a coarser one early on; "" as in [codec]
    gradient: str = ""  # the same, downwards
    lr: float = 0.0  # highest learning rate of this phase, where optimiser.restart is true; 0 as in [optimiser]
    # Narrower widths: each step uses one of these or `width`, at random, and the trained network serves all of them.
    nested: tuple[int, ...] = ()
    # Above 0 the head and the encoder stay as they are and no gradient comes back: for so many epochs pictures are
    # sent, each time in another augmented view, and for the rest of the phase the server learns from what it kept.
    views: float = 0.0
    flip: bool = False  # with views: what was kept is mirrored half of the time when it is learnt from again
    shift: int = 0  # with views: and moved by up to so many places each way

    def __str__(self) -> str:
        """As short as a file may have it."""
        given = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        more = {name: value for name, value in given.items() if value != getattr(PhaseRecipe, name, None)}
        if more.keys() == {"width", "epochs"}:
            return f"[{self.width}, {self.epochs:g}]"
        return f"{{ {', '.join(f'{name} = {in_toml(value)}' for name, value in more.items())} }}"

    def __post_init__(self) -> None:
        demand(self.width >= 0, f"schedule.phases has width {self.width}; give 0 (all channels) or more")
        fits = 0 < self.epochs <= _EPOCHS
        demand(fits, f"schedule.phases has {self.epochs} epochs; give more than 0, up to {_EPOCHS:,}")
        demand(self.lr >= 0, f"schedule.phases has lr {self.lr}; it must be 0 (as in optimiser) or more")
        demand(0 <= self.views <= 1000, f"schedule.phases has {self.views} views; give 0 to 1000")
        demand(
            self.views <= self.epochs,
            f"schedule.phases has {self.views:g} views in {self.epochs:g} epochs, and each takes one; give no more "
            f"views than epochs",
        )
        demand(
            not (self.views and self.gradient),
            f"schedule.phases has views and the gradient {self.gradient!r}, and none comes back while the head is "
            f"frozen: leave gradient out",
        )
        demand(
            0 < self.views < self.epochs or not (self.flip or self.shift),
            f"schedule.phases has flip or shift with {self.views:g} views in {self.epochs:g} epochs: they are of what "
            f"the server learns from again, after the views; pictures are varied by data.flip and data.crop",
        )
        fits = all(1 <= width < (self.width or 2**31) for width in self.nested)
        fits = fits and len(set(self.nested)) == len(self.nested)
        demand(fits, f"schedule.phases has nested {list(self.nested)}; give different widths, each below width")
        demand(not (self.nested and self.views), "schedule.phases has nested and views; a frozen head has one width")
        demand(0 <= self.shift <= 64, f"schedule.phases has shift {self.shift}; give 0 to 64 places")
        for name in (self.activation, self.gradient):
            try:
                codec(name or "fp32")
            except CodecError as error:
                raise RecipeError(f"schedule.phases has the codec {name!r}: {error}") from error


@dataclass(frozen=True)
class ScheduleRecipe:
    kind: str = "epochs"  # "epochs": the list `phases`; "plateau": the next of `widths` when validation stops gaining
    phases: tuple[PhaseRecipe, ...] = ()  # epochs: [width, epochs] or a table each, in order
    widths: tuple[int, ...] = ()  # plateau: widths in order
    patience: int = 2  # plateau: epochs without gain before the next width (after the last: the end)
    min_gain: float = 0.01  # plateau: share by which the validation loss must fall to count as a gain
    max_epochs: int = 50  # plateau: the run ends here at the latest
    # epochs: what the run may spend in all, in MB (10^6 bytes) of messages both ways, evaluations too; where that is
    # less than it would come to, all its phases become shorter. 0: no limit.
    budget_mb: float = 0.0

    def __post_init__(self) -> None:
        one_of("schedule.kind", self.kind, ("epochs", "plateau"))
        demand(self.budget_mb >= 0, f"schedule.budget_mb is {self.budget_mb}; give 0 (no limit) or more")
        if self.kind == "epochs":
            demand(
                not self.widths,
                'schedule.widths belongs to kind "plateau"; write that, or the widths into schedule.phases',
            )
            demand(len(self.phases) > 0, "schedule.phases is empty; give a list of [width, epochs]")
            for name in ("patience", "min_gain", "max_epochs"):
                demand(not _given(self, name), f'schedule.{name} belongs to kind "plateau": leave it out')
            frozen = any(phase.views for phase in self.phases)
            demand(
                not (self.budget_mb and frozen),
                "schedule.budget_mb shortens phases, and phases with views send each picture a given number of times: "
                "leave one of the two out",
            )
        else:
            demand(not self.phases, 'schedule.phases belongs to kind "epochs"; a plateau schedule has widths')
            demand(len(self.widths) > 0, "schedule.widths is empty; a plateau schedule needs the widths in order")
            demand(all(width >= 0 for width in self.widths), "schedule.widths: give 0 (all channels) or more")
            demand(self.patience >= 1, f"schedule.patience is {self.patience}; it must be 1 or more")
            fits = 1 <= self.max_epochs <= _EPOCHS
            demand(fits, f"schedule.max_epochs is {self.max_epochs}; give 1 to {_EPOCHS:,}")
            demand(
                all(one != other for one, other in pairwise(self.widths)),
                f"schedule.widths has {list(self.widths)}; the next width must be another",
            )
            demand(0 <= self.min_gain < 1, f"schedule.min_gain is {self.min_gain}; give a share from 0 up to below 1")
            demand(not self.budget_mb, 'schedule.budget_mb belongs to kind "epochs"; a plateau decides its own length')

    @property
    def nested(self) -> bool:
        """Whether some phase draws its widths."""
        return any(phase.nested for phase in self.phases)

    @property
    def entries(self) -> tuple[PhaseRecipe, ...]:
        """What may come, in order: the phases, or under a plateau one for each width, with as many epochs as the run
        may have."""
        return self.phases or tuple(PhaseRecipe(width, self.max_epochs) for width in self.widths)


@dataclass(frozen=True)
class LocalRecipe:
    """What the head learns before the run, on the device alone, by a small classifier at the cut: no byte crosses.

    Take it where bytes or the link's time cost more than the device's own; `predict alone` asks that classifier.
    """

    epochs: float = 0.0  # that the head learns alone; parts of one are allowed, 0: none
    lr: float = 0.0  # highest learning rate; 0 as in [optimiser], whose other settings hold here too

    def __post_init__(self) -> None:
        demand(0 <= self.epochs <= _EPOCHS, f"local.epochs is {self.epochs}; give 0 (none) to {_EPOCHS:,}")
        demand(self.lr >= 0, f"local.lr is {self.lr}; it must be 0 (as in optimiser) or more")
        demand(
            self.epochs > 0 or not self.lr,
            f"local.lr is {self.lr}, and the head learns nothing alone: set local.epochs, or leave lr out",
        )


@dataclass(frozen=True)
class OptimiserRecipe:
    name: str = "sgd"  # "sgd" (Nesterov) or "adamw"; each side runs it on its own half
    lr: float = 0.05  # highest learning rate
    momentum: float = 0.9  # sgd
    weight_decay: float = 5e-4  # on the model's weights; the bottleneck has none
    decay: str = "cosine"  # "cosine" down to 0 over the run, or "constant"
    restart: bool = False  # each phase of schedule.phases starts and decays anew, instead of once over the run
    warmup: int = 0  # steps over which the learning rate rises linearly, at each start

    def __post_init__(self) -> None:
        one_of("optimiser.name", self.name, ("sgd", "adamw"))
        one_of("optimiser.decay", self.decay, ("cosine", "constant"))
        demand(self.lr > 0, f"optimiser.lr is {self.lr}; it must be above 0")
        demand(0 <= self.momentum < 1, f"optimiser.momentum is {self.momentum}; give 0 up to below 1")
        demand(
            self.name == "sgd" or not _given(self, "momentum"),
            f'optimiser.momentum is {self.momentum}, and "{self.name}" has none: leave it out, or take "sgd"',
        )
        demand(self.weight_decay >= 0 and self.warmup >= 0, "optimiser.weight_decay and warmup must be 0 or more")


@dataclass(frozen=True)
class Recipe:
    name: str  # of the recipe, as both sides show it
    method: str  # plain, fixed, deprune or prune
    model: ModelRecipe
    schedule: ScheduleRecipe
    data: DataRecipe = field(default_factory=DataRecipe)
    bottleneck: BottleneckRecipe = field(default_factory=BottleneckRecipe)
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    local: LocalRecipe = field(default_factory=LocalRecipe)
    optimiser: OptimiserRecipe = field(default_factory=OptimiserRecipe)
    seed: int = 0  # of weights, data order, augmentation
    precision: str = "fp32"  # arithmetic inside both halves: "fp32" or "bf16" (autocast); the link is not concerned

    def __post_init__(self) -> None:
        demand(bool(self.name.strip()), 'name is empty; give the run one, as name = "pets"')
        for where, name in (("name", self.name), ("model.name", self.model.name)):
            demand(name.isprintable(), f"{where} is {name!r}; leave control characters out")
        one_of("method", self.method, METHODS)
        one_of("precision", self.precision, ("fp32", "bf16"))
        demand(0 <= self.seed < 2**32, f"seed is {self.seed}; give 0 to 2^32 - 1")
        rules.check(self)

    @property
    def codecs(self) -> set[str]:
        """All that its phases code with."""
        of_phases = {name for phase in self.schedule.phases for name in (phase.activation, phase.gradient)}
        return {self.codec.activation, self.codec.gradient} | (of_phases - {""})

    @property
    def principal(self) -> bool:
        """Whether the linear bottleneck starts from principal components of the activation, weighted or not."""
        return self.bottleneck.kind == "linear" and (self.bottleneck.start == "principal" or self.weighted)

    @property
    def local_lr(self) -> float:
        """The highest rate at which the head learns alone."""
        return self.local.lr or self.optimiser.lr

    @property
    def weighted(self) -> bool:
        """Whether those are weighted by the loss's sensitivity, where that is known."""
        start = self.bottleneck.start
        wanted = start == "weighted" or (start == "auto" and bool(self.model.init or self.local.epochs))
        return self.bottleneck.kind == "linear" and wanted

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical form: equal for equal meaning, whatever the file's layout."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load(path: Path) -> tuple[Recipe, str]:
    """The recipe in a file, and the file's text; RecipeError names the file, the key and what is legal."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe {path} is not text in UTF-8") from error
    return parse(text, str(path)), text


def differences(one: Recipe, other: Recipe) -> list[tuple[str, Any, Any]]:
    """Keys, as a file has them, whose values differ, and the two values."""
    found = []
    for name, before, now in _fields(one, other):
        if dataclasses.is_dataclass(before):
            found += [(f"{name}.{key}", a, b) for key, a, b in _fields(before, now) if a != b]
        elif before != now:
            found.append((name, before, now))
    return found


def _fields(one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    for each in dataclasses.fields(one):
        yield each.name, getattr(one, each.name), getattr(other, each.name)


def parse(text: str, source: str = "recipe") -> Recipe:
    """The recipe in TOML `text`; `source` is what error messages call it."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of too many digits, tables in tables without end
        how = {"declare": "a table stands once: move its keys under the first", "Invalid value": "text is quoted"}
        advice = "".join(f"; {cure}" for cause, cure in how.items() if cause in str(error))
        raise RecipeError(f"{source} is not valid TOML: {error}{advice}") from error
    try:
        if table.get("method") == "plain":  # the one method whose codec is not a choice
            table.setdefault("codec", dataclasses.asdict(_UNCODED))
        return build(Recipe, table, "")
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from error
