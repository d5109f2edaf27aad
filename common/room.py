"""Whether a budget has room for a run at all; asked by the server, and by a device before its head learns alone."""

from __future__ import annotations

import math

from common.codecs import codec
from common.errors import RecipeError
from common.recipe import Recipe
from common.schedule import ends_of, steps_per_epoch
from common.words import several, size

# After so many steps a run is judged by what they cost.
FIRST = 8
# Tensors may come to less than `bits` says: a budget is only refused if this share of the estimate is over it.
_SURE = 0.7


def require_weights(recipe: Recipe, head: int) -> None:
    """RecipeError where the budget is less than the `head` bytes of weights that a device begins with."""
    allowed = round(recipe.schedule.budget_mb * 1e6)
    if 0 < allowed <= head:
        raise RecipeError(
            f"schedule.budget_mb is {recipe.schedule.budget_mb:g} ({size(allowed)}), and the weights of the head alone "
            f"are {size(head)}: give more"
        )


def require_room(recipe: Recipe, cut: tuple[int, ...], samples: int, test: int, head: int) -> None:
    """RecipeError where the budget cannot be kept, or is far less than a run on `samples` pictures takes before it has
    learnt anything: `head` bytes of weights, choosing the first channels, the first steps, judging `test` pictures.
    `cut`: [C, ...] of one picture."""
    batch = min(samples, recipe.data.batch)
    ends = ends_of(recipe.schedule, steps_per_epoch(samples, batch))
    # The first entry that comes to a step at all.
    first, steps = next(
        (entry, end - start)
        for entry, start, end in zip(recipe.schedule.phases, (0, *ends), ends, strict=False)
        if end > start
    )
    if steps == 1 < ends[-1]:
        raise RecipeError(
            "the first of schedule.phases comes to one step on these pictures, and a budget is kept by what steps have "
            "cost: give it more epochs, or leave it out"
        )
    place = math.prod(cut[1:]) / 8  # bytes of one channel of one picture, a bit each
    up = place * bits(first.activation or recipe.codec.activation)
    both = up + place * bits(first.gradient or recipe.codec.gradient)
    width = first.width or cut[0]
    ranked = 0
    if recipe.bottleneck.kind == "channels" and width < cut[0]:
        ranked = max(0, min(recipe.bottleneck.ranking_steps, steps - 1))
    few = max(1, min(max(FIRST, recipe.optimiser.warmup), steps - ranked))
    parts = {
        "the head's weights": head,
        "choosing channels": ranked * batch * cut[0] * both,
        several(few, "step"): few * batch * width * both,
        several(test, "test picture"): test * width * up,
    }
    allowed, needed = recipe.schedule.budget_mb * 1e6, sum(parts.values())
    if allowed < head + _SURE * (needed - head):
        told = ", ".join(f"{size(part)} for {name}" for name, part in parts.items() if part)
        raise RecipeError(
            f"schedule.budget_mb is {recipe.schedule.budget_mb:g} ({size(allowed)}), and a run takes about "
            f"{size(needed)} before it has learnt much ({told}): give more"
        )


def bits(name: str) -> float:
    """About how many bits an element takes. With codecs that have an SNR they grow with it, as in docs/codec.md."""
    chosen = codec(name)
    snr = getattr(chosen, "snr", None)
    if name == "int8":  # zstd leaves 5 to 7 of the 8, by tensor
        return 6.0
    return 8 * chosen.bound((1, 1, 64, 64)) / 4096 if snr is None else (snr + 6) / 10
