"""The optimiser does torch.optim's arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common import optim
from common.recipe import OptimiserRecipe


@pytest.mark.parametrize(
    "recipe",
    [
        OptimiserRecipe(lr=0.1, momentum=0.9, weight_decay=0.01),
        OptimiserRecipe(lr=0.1, momentum=0.0, weight_decay=0.0),
        OptimiserRecipe(name="adamw", lr=0.01, weight_decay=0.05),
    ],
)
def test_it_moves_as_torch_does(recipe: OptimiserRecipe) -> None:
    """Bit for bit, with a rate that changes and a parameter that has no gradient at first."""
    torch.manual_seed(3)
    halves = [nn.Linear(5, 4), nn.Linear(4, 2)]
    copies = [nn.Linear(5, 4), nn.Linear(4, 2)]
    for copy, half in zip(copies, halves, strict=True):
        copy.load_state_dict(half.state_dict())
    ours = optim.build(recipe, halves[0], halves[1])
    groups = [
        {"params": list(copies[0].parameters()), "weight_decay": recipe.weight_decay},
        {"params": list(copies[1].parameters()), "weight_decay": 0.0},
    ]
    if recipe.name == "adamw":
        theirs: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    else:
        theirs = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    for step in range(6):
        pictures = torch.randn(7, 5)
        for (first, second), optimiser in ((halves, ours), (copies, theirs)):
            optimiser.zero_grad()
            hidden = first(pictures)
            (second(hidden) if step > 1 else hidden).square().sum().backward()
        ours.lr = theirs.param_groups[0]["lr"] = theirs.param_groups[1]["lr"] = recipe.lr / (step + 1)
        ours.step()
        theirs.step()
    for mine, other in zip(halves, copies, strict=True):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(("able", "slow"), [({}, True), ({"amx_bf16": True}, False), ({"avx2": True}, True)])
def test_who_must_imitate_bf16_is_told(able: dict[str, bool], slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert bool(optim.imitated("bf16")) is slow and not optim.imitated("fp32")
