"""What the parts of a recipe must agree on, whatever each of them may be by itself; asked once, when one is made."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from common.errors import RecipeError
from common.tables import demand

if TYPE_CHECKING:
    from common.recipe import Recipe


def check(recipe: Recipe) -> None:
    """RecipeError where two parts do not go together."""
    channels = recipe.model.input[0]
    side = min(recipe.model.input[1:])
    demand(
        recipe.data.crop < side,
        f"data.crop is {recipe.data.crop}, and what the model takes is {side} along one side: give 0 to {side - 1}",
    )
    legal = f"1 or {channels}" if channels > 1 else "1"
    for name, values in (("mean", recipe.data.mean), ("std", recipe.data.std)):
        demand(len(values) in (1, channels), f"data.{name} has {len(values)} numbers; give {legal}")
    demand(
        recipe.schedule.kind != "plateau" or recipe.data.validation > 0,
        "a plateau schedule needs data.validation above 0: it is decided by the validation loss",
    )
    demand(
        recipe.schedule.kind != "plateau" or not recipe.optimiser.restart,
        "optimiser.restart is about schedule.phases, whose lengths are known; under a plateau the learning rate "
        "falls once, over max_epochs: leave it out",
    )
    demand(
        not recipe.local.epochs or recipe.data.batch > 1,
        "local.epochs is above 0 and data.batch is 1: its classifier has batch norm, which needs 2 or more",
    )
    _check_budget(recipe)
    _check_method(recipe)


def _check_budget(recipe: Recipe) -> None:
    if not recipe.schedule.budget_mb or not any("auto" in name for name in recipe.codecs):
        return
    given = dataclasses.asdict(recipe.codec)
    lines = [f'{way} = "{name.replace("auto", "context")}"' for way, name in given.items() if "auto" in name]
    instead = f"{' and '.join(lines)} in [codec]" if lines else "context for auto in schedule.phases"
    raise RecipeError(
        f'schedule.budget_mb needs bytes that are the same in each run, and codec "auto", the default, follows the '
        f"link: write {instead}, or step for context"
    )


def _check_method(recipe: Recipe) -> None:
    widths, kind = [entry.width for entry in recipe.schedule.entries], recipe.bottleneck.kind
    demand(
        kind != "none" or all(width == 0 for width in widths),
        'bottleneck.kind "none" sends all channels; write width 0 in the schedule, or choose channels or linear',
    )
    demand(
        recipe.optimiser.restart or not any(phase.lr for phase in recipe.schedule.phases),
        "schedule.phases has an lr of its own, which needs optimiser.restart = true: without, the learning rate "
        "falls once over the whole run",
    )
    demand(
        kind != "none" or not recipe.schedule.nested,
        'bottleneck.kind "none" sends all channels; nested widths need kind channels or linear',
    )
    if recipe.method == "plain":
        raw = (recipe.codec.activation, recipe.codec.gradient) == ("fp32", "fp32") and kind == "none"
        raw = raw and not any(phase.activation or phase.gradient for phase in recipe.schedule.phases)
        demand(not recipe.local.epochs, 'method "plain" is what others are compared with: local.epochs must be 0')
        demand(raw, 'method "plain" compresses nothing: bottleneck.kind is "none" and both codecs are "fp32"')
    if recipe.method in ("plain", "fixed"):
        demand(
            len(set(widths)) == 1,
            f'method "{recipe.method}" has one width; the schedule has {list(widths)}: give one',
        )
    # Width 0 means all channels: it counts as wider than any number.
    sizes = [width or 2**31 for width in widths]
    if recipe.method == "deprune":
        demand(
            sizes == sorted(sizes),
            f'method "deprune" widens a bottleneck; the schedule has {list(widths)}: put the widths in rising '
            f'order (0 is all), or take method "prune"',
        )
        # With all channels from the start it can still grow in the SNR of its codecs, phase by phase.
        demand(
            kind != "none" or len(widths) > 1,
            'method "deprune" widens a bottleneck, and bottleneck.kind is "none": choose channels or linear, or '
            "give phases with better and better codecs",
        )
    if recipe.method == "prune":
        demand(recipe.model.init != "", 'method "prune" starts from a trained network; set model.init')
        demand(
            kind != "none",
            'method "prune" narrows a bottleneck, and bottleneck.kind is "none": choose channels or linear',
        )
        demand(
            sizes == sorted(sizes, reverse=True),
            f'method "prune" narrows a bottleneck; the schedule has {list(widths)}: put the widths in falling '
            f'order (0 is all), or take method "deprune"',
        )
