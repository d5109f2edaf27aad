"""The optimiser does torch.optim's arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common import bottleneck, optim
from common.recipe import OptimiserRecipe
from common.schedule import Phase


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
            expected = other.state_dict()[name]
            if recipe.name == "adamw" and mine is halves[1]:  # whose arithmetic is ours
                assert torch.allclose(value, expected, 1e-5, 1e-7), name
            else:
                assert torch.equal(value, expected), name


def test_counted_by_element_it_moves_as_torch_does_where_all_elements_have_gradients() -> None:
    torch.manual_seed(4)
    recipe = OptimiserRecipe(name="adamw", lr=0.01, weight_decay=0.05)
    mine, copy = nn.Linear(5, 4), nn.Linear(5, 4)
    copy.load_state_dict(mine.state_dict())
    ours = optim.build(recipe, mine, bottleneck.build("channels", 4, 0)[1])
    theirs = torch.optim.AdamW(copy.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    for _ in range(20):
        pictures = torch.randn(7, 5)
        for layer, optimiser in ((mine, ours), (copy, theirs)):
            optimiser.zero_grad()
            layer(pictures).square().sum().backward()
            optimiser.step()
    for value, expected in zip(mine.parameters(), copy.parameters(), strict=True):
        assert torch.allclose(value, expected, 1e-4, 1e-6)


@pytest.mark.parametrize("kind", ["linear", "channels"])
def test_channels_that_are_sent_late_have_first_steps_of_their_own(kind: str) -> None:
    """As large as those of a parameter that begins then, however many steps the others have made: the bottleneck's own
    parameters, and where it has none, those of the layers beside it."""
    recipe = OptimiserRecipe(name="adamw", lr=0.01, weight_decay=0.0)

    def built(layer: nn.Module) -> optim.Optimiser:
        if kind == "linear":
            return optim.build(recipe, nn.Identity(), layer)
        return optim.build(recipe, layer, bottleneck.build("channels", 4, 0)[0])

    mixed, alone = nn.Linear(3, 4, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        alone.weight.copy_(mixed.weight[2:])
    ours, fresh = built(mixed), built(alone)
    slopes = torch.randn(300, 4, 3)
    for step, slope in enumerate(slopes):
        mixed.weight.grad = slope * (torch.arange(4) < (4 if step >= 290 else 2))[:, None]
        ours.step()
        if step >= 290:
            alone.weight.grad = slope[2:]
            fresh.step()
        if step == 289:
            assert torch.equal(mixed.weight[2:], alone.weight), "and until then they stay"
    assert torch.equal(mixed.weight[2:], alone.weight)
    kept = {name: value.clone() for name, value in optim.tensors_of(ours).items()}
    again = built(mixed)
    optim.restore(again, kept, "the checkpoint")
    before = mixed.weight.detach().clone()
    moved = []
    for optimiser in (ours, again):
        with torch.no_grad():
            mixed.weight.copy_(before)
        mixed.weight.grad = slopes[0]
        optimiser.step()
        moved.append(mixed.weight.detach().clone())
    assert torch.equal(*moved)


@pytest.mark.parametrize(("able", "slow"), [({}, True), ({"amx_bf16": True}, False), ({"avx2": True}, True)])
def test_who_must_imitate_bf16_is_told(able: dict[str, bool], slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert bool(optim.imitated("bf16")) is slow and not optim.imitated("fp32")


def test_the_rate_rises_and_falls_within_its_own_course() -> None:
    """Counted from where the course begins, and the fall from where the rise is over."""
    phase = Phase(1, 100, 2, "fp32", "fp32", 0.2, 100, 200)
    rates = [optim.learning_rate(OptimiserRecipe(warmup=10), step, phase) for step in range(100, 200)]
    assert rates[:10] == pytest.approx([0.02 * number for number in range(1, 11)])
    assert rates[10] == pytest.approx(0.2) and rates[55] == pytest.approx(0.1) and 0 < rates[-1] < 0.001
    steady = OptimiserRecipe(warmup=10, decay="constant")
    assert {optim.learning_rate(steady, step, phase) for step in range(110, 300)} == {0.2}
