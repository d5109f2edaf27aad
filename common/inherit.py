"""A half of a finished run becomes the start of a new one, also where the kind of bottleneck changes.

Both sides call it with the same source recipe and manifest, so encoder and decoder stay each other's answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from common import weights
from common.bottleneck import LinearDecoder, LinearEncoder
from common.errors import MismatchError
from common.halves import Head, Tail
from common.recipe import Recipe
from common.run import Manifest


def with_classes(
    trained: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], recipe: Recipe, source: Recipe
) -> dict[str, torch.Tensor]:
    """`trained`; but where the recipe has more or fewer classes than the source, the classifier begins anew: what has
    a row for each class is taken from `own`, the new network's random weights."""
    before, now = source.model.classes, recipe.model.classes
    return {
        name: own[name]
        if before != now and name in own and (value.shape[:1], own[name].shape[:1]) == ((before,), (now,))
        else value
        for name, value in trained.items()
    }


def require_all(source: Recipe, recipe: Recipe, manifest: Manifest) -> None:
    """MismatchError where the source was trained with some of the cut's channels only, and the new run would use them
    all: it sends them as they are, or cuts elsewhere. The tail has never seen the others."""
    phase, moved = manifest.phase, source.model.cut != recipe.model.cut
    if source.bottleneck.kind != "channels" or phase.width >= len(phase.order):
        return
    if moved or recipe.bottleneck.kind == "none":
        what = f"another cut than {source.model.cut}" if moved else 'bottleneck.kind "none"'
        instead = "cut there" if moved else 'choose "channels" or "linear"'
        raise MismatchError(
            f"model.init has learnt with {phase.width} of {len(phase.order)} channels, and {what} would open the "
            f"others: {instead}, or start from a run that had all"
        )


def adopt(
    half: Head | Tail, trained: Mapping[str, torch.Tensor], recipe: Recipe, source: Recipe, manifest: Manifest
) -> dict[str, torch.Tensor]:
    """The state of `half` after taking over `trained`, the same half of a finished run of `source`.

    MismatchError where the source learnt a linear bottleneck and the new recipe has none: its layers would lose
    the map they were trained with.
    """
    old, new = source.bottleneck.kind, recipe.bottleneck.kind
    if old == "linear" and new != "linear":
        raise MismatchError(
            f'model.init has learnt a linear bottleneck; bottleneck.kind "{new}" cannot go on from it: choose '
            f'"linear", or start from a run without one'
        )
    require_all(source, recipe, manifest)
    kept = ("layers.", "bottleneck.", "sensitivity") if old == new else ("layers.", "sensitivity")
    # What the widths of a nested run learnt apart is not taken over: the new run has widths of its own.
    theirs = {name: value for name, value in trained.items() if name.startswith(kept)}
    own = {name: value for name, value in half.state_dict().items() if not name.startswith(kept)}
    theirs = with_classes(theirs, half.state_dict(), recipe, source)
    weights.fill(half, theirs | own, "model.init")
    if isinstance(half, Tail):
        half.norms.start()
    if old == new:
        if isinstance(half.bottleneck, LinearEncoder):
            # Rows that were never sent are still random: principal components are not to be taken of them too.
            half.bottleneck.close_from(manifest.phase.width)
        return dict(half.state_dict())
    order = torch.tensor(manifest.phase.order or range(half.bottleneck.channels))
    if isinstance(half.bottleneck, LinearEncoder | LinearDecoder):
        half.bottleneck.select(order)
        if isinstance(half.bottleneck, LinearEncoder):
            half.bottleneck.close_from(manifest.phase.width)  # the tail has never seen the others
        if isinstance(half, Tail) and len(half.sensitivity):
            half.sensitivity.copy_(half.sensitivity[order][:, order])
    return dict(half.state_dict())
