"""Whether a budget has room for a run at all; asked by the server, and by a device before its head learns alone."""

from __future__ import annotations

import math
from collections.abc import Callable

from common.codecs import Codec, codec
from common.errors import RecipeError
from common.recipe import Recipe
from common.schedule import ends_of, phase_of_entry, ranked_at, steps_per_epoch
from common.words import several, size

# After so many steps a run is judged by what they cost.
FIRST = 8
# Tensors may come to less than a codec's `bits` says, where that is an estimate: a budget is only refused if this share
# of it is over it.
_SURE = 0.7


def require_weights(recipe: Recipe, head: int) -> None:
    """RecipeError where the budget is less than the `head` bytes of weights that a device begins with."""
    allowed = round(recipe.schedule.budget_mb * 1e6)
    if 0 < allowed <= head:
        raise RecipeError(
            f"schedule.budget_mb is {recipe.schedule.budget_mb:g} ({size(allowed)}), and the weights of the head alone "
            f"are {size(head)}: give more"
        )


def require_room(
    recipe: Recipe, cut: tuple[int, ...], samples: int, test: int, head: int, sent: int | None = None
) -> None:  # fmt: skip
    """RecipeError where the budget cannot be kept, or is far less than a run on `samples` pictures takes before it has
    learnt anything: `head` bytes of weights, choosing the first channels, the first steps, judging `test` pictures.
    `cut`: [C, ...] of one picture. `sent`: as many of its channels as an earlier run has chosen, 0 where it used all or
    there was none; None where that is not known."""
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
    phase = phase_of_entry(recipe, first, cut[0])
    ranking, ranks_at = 0, 0
    if recipe.bottleneck.kind == "channels" and not first.views:
        ranks_at = ranked_at(first, cut[0], phase.width if sent is None else sent)
        ranking = max(0, min(recipe.bottleneck.ranking_steps, steps - 1)) if ranks_at else 0
    few = max(1, min(max(FIRST, recipe.optimiser.warmup), steps - ranking))
    codecs = codec(phase.activation_codec), codec(phase.gradient_codec)

    def parts_by(bits_of: Callable[[Codec], float]) -> dict[str, float]:
        up, down = (math.prod(cut[1:]) / 8 * bits_of(chosen) for chosen in codecs)  # bytes of a channel of a picture
        down = 0.0 if first.views else down
        return {
            "the head's weights": head,
            "choosing channels": ranking * batch * ranks_at * (up + down),
            several(few, "step"): few * batch * phase.mean_width * (up + down),
            several(test, "test picture"): test * phase.width * up,
        }

    parts = parts_by(lambda chosen: chosen.bits)
    allowed, needed = recipe.schedule.budget_mb * 1e6, sum(parts.values())
    if allowed < sum(parts_by(_least_bits).values()):
        told = ", ".join(f"{size(part)} for {name}" for name, part in parts.items() if part)
        raise RecipeError(
            f"schedule.budget_mb is {recipe.schedule.budget_mb:g} ({size(allowed)}), and a run takes about "
            f"{size(needed)} before it has learnt much ({told}): give more"
        )


def _least_bits(chosen: Codec) -> float:
    """How many bits an element takes at least, on the tensors of training."""
    return chosen.bits * (_SURE if chosen.varies else 1.0)
