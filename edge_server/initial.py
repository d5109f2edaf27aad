"""Where a run's first weights come from: random, a .safetensors of the whole model, or a finished run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from common import halves as halves_module
from common import weights
from common.errors import ModelError, RunFolderError
from common.halves import Halves
from common.inherit import adopt, require_all, with_classes
from common.recipe import Recipe
from common.run import TAIL, RunFolder


@dataclass(frozen=True)
class Initial:
    """What to fill new halves with; where `head` or `tail` is empty, that half stays random.

    `run_id`: of the finished run whose head the device must bring itself; "" where it need not. `known`: the channels
    that this run's tail was trained with, the most important first, where a run with bottleneck "channels" sent only
    some. `told`: what a run starts from, in words.
    """

    head: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tail: Mapping[str, torch.Tensor] = field(default_factory=dict)
    run_id: str = ""
    known: tuple[int, ...] = ()
    told: str = ""

    def fill(self, halves: Halves) -> None:
        if self.head:
            weights.fill(halves.head, self.head, "model.init")
        if self.tail:
            weights.fill(halves.tail, self.tail, "model.init")


def initial_weights(recipe: Recipe, halves: Halves, allowed: Collection[str]) -> Initial:
    """The weights that `model.init` names; ModelError or RunFolderError where they cannot be had."""
    init = recipe.model.init
    if not init:
        return Initial()
    if init.startswith("run:"):
        return _from_run(recipe, halves, Path(init.removeprefix("run:")), allowed)
    return _split(weights.read(Path(init)), halves, init)


def _split(whole: Mapping[str, torch.Tensor], halves: Halves, source: str) -> Initial:
    """Each half's share of the whole model's weights; fills `halves` with them too."""
    for half in (halves.head, halves.tail):
        expected = set(half.layers.state_dict())
        weights.fill(half.layers, {name: value for name, value in whole.items() if name in expected}, source)
    unknown = whole.keys() - set(halves.head.layers.state_dict()) - set(halves.tail.layers.state_dict())
    if unknown:
        raise ModelError(f"the weights in {source} are of another model: it has the unknown {sorted(unknown)[0]}")
    halves.tail.norms.start()
    return Initial(halves.head.state_dict(), halves.tail.state_dict())


def _from_run(recipe: Recipe, halves: Halves, folder: Path, allowed: Collection[str]) -> Initial:
    """A finished run's server folder, or the folder that holds it as `server`.

    The head is handed out where it was published, or lies beside on the same machine (`device`, of the same run);
    else the device that trained it brings it.
    """
    if not (folder / "run.json").is_file() and (folder / "server" / "run.json").is_file():
        folder = folder / "server"
    RunFolder(folder).left_by(TAIL)
    source, _, manifest = RunFolder(folder).read()
    if source.model.name != recipe.model.name:
        raise RunFolderError(f"{folder} trained {source.model.name}; the recipe has {recipe.model.name}")
    trained = halves_module.build(source, allowed)
    RunFolder(folder).fill_half("tail", trained.tail)
    here = False
    for place in (folder, folder.parent / "device"):
        if (place / "head.safetensors").is_file() and RunFolder(place).read()[2].run_id == manifest.run_id:
            RunFolder(place).fill_half("head", trained.head)
            here = True
    told = f"run {manifest.run_id} in {folder}{_judged(folder)} at width {manifest.phase.width}"
    if source.model.cut != recipe.model.cut:
        if not here or source.bottleneck.kind == "linear":
            raise RunFolderError(
                f"{folder} was cut at {source.model.cut}, the recipe cuts at {recipe.model.cut}: that needs a run "
                f"without a linear bottleneck whose head lies on this machine or was published"
            )
        require_all(source, recipe, manifest)
        layers = dict(trained.head.layers.state_dict()) | dict(trained.tail.layers.state_dict())
        own = dict(halves.head.layers.state_dict()) | dict(halves.tail.layers.state_dict())
        return replace(_split(with_classes(layers, own, recipe, source), halves, str(folder)), told=told)
    known = manifest.phase.order[: manifest.phase.width] if recipe.bottleneck.kind == "channels" else ()
    tail = adopt(halves.tail, trained.tail.state_dict(), recipe, source, manifest)
    if here:
        head = adopt(halves.head, trained.head.state_dict(), recipe, source, manifest)
        return Initial(head, tail, known=known, told=told)
    return Initial(tail=tail, run_id=manifest.run_id, known=known, told=told)


def _judged(folder: Path) -> str:
    """How good a finished run was, as its summary has it; "" where that is gone."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return f", {json.loads((folder / 'summary.json').read_text())['accuracy']:.2%}"
    return ""
