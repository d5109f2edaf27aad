"""Convolutions work with their channels last; what crosses, and what a checkpoint brings back, is laid out as ever."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.recipes import recipe_text
from common import halves, optim
from common.errors import ModelError
from common.recipe import OptimiserRecipe, parse

LAST = torch.channels_last


def net(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A user's own, that counts on how its maps lie."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(input_shape[0], 4, 3, padding=1)
            self.fc = nn.Linear(4 * 8 * 8, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.first(x)).view(x.shape[0], -1))

    return Viewing()


@pytest.mark.parametrize(("kind", "precision"), [("linear", "bf16"), ("linear", "fp32"), ("none", "fp32")])
def test_every_convolution_has_channels_last_in_and_out(kind: str, precision: str) -> None:
    width = "8" if kind == "linear" else "0"
    built = halves.build(
        parse(recipe_text("fixed", bottleneck=f'kind = "{kind}"', schedule=f"phases = [[{width}, 1]]"))
    )
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in (*built.head.modules(), *built.tail.modules()):
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    if kind == "linear":
        built.head.bottleneck.resize(8)
        built.tail.resize(8)
    with optim.arithmetic(precision, "cpu"):
        sent = built.head(torch.randn(4, *parse(recipe_text("fixed")).model.input))
        received = sent.detach().requires_grad_()
        built.tail(received).sum().backward()
    assert sent.is_contiguous() and received.grad is not None and received.grad.is_contiguous()
    assert len(seen) == 13, "of tiny"
    # The first is given the picture as it comes.
    assert all(given.is_contiguous(memory_format=LAST) for given, _ in seen[1:])
    assert all(made.is_contiguous(memory_format=LAST) for _, made in seen)


def test_a_model_of_the_users_own_is_as_it_comes() -> None:
    table = 'name = "tests.test_channels_last:net"\ninput = [1, 8, 8]\nclasses = 3\ncut = "first"'
    built = halves.build(parse(recipe_text("fixed", model=table)), ("tests.test_channels_last:net",), compared=True)
    assert built.tail(built.head(torch.randn(2, 1, 8, 8))).shape == (2, 3)


def lying_otherwise(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A user's own whose convolutions have their channels last, and whose map at the cut has not."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(channels, 4, 3, padding=1) for channels in (input_shape[0], 4))
            self.view, self.fc = nn.Linear(4 * 8 * 8, classes), nn.Linear(4, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(x)).contiguous()
            return self.view(x.view(x.shape[0], -1)) + self.fc(self.second(x).mean((2, 3)))

    return Mixed().to(memory_format=LAST)  # type: ignore[call-overload,no-any-return]


def test_what_crosses_comes_to_a_model_of_the_users_own_as_it_does_where_it_is_looked_at() -> None:
    name = "tests.test_channels_last:lying_otherwise"
    table = f'name = "{name}"\ninput = [1, 8, 8]\nclasses = 3\ncut = "contiguous"'
    built = halves.build(parse(recipe_text("fixed", model=table)), (name,), compared=True)
    assert built.tail(built.head(torch.randn(2, 1, 8, 8))).shape == (2, 3)


def counting_on_strides(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fc = nn.Conv2d(input_shape[0], 4, 3, padding=1), nn.Linear(4 * 8 * 8, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.first(x)).permute(0, 2, 3, 1).view(x.shape[0], -1))

    return Strided().to(memory_format=LAST)  # type: ignore[call-overload,no-any-return]


def test_a_model_that_needs_what_crosses_to_lie_otherwise_is_refused_at_the_start() -> None:
    name = "tests.test_channels_last:counting_on_strides"
    table = f'name = "{name}"\ninput = [1, 8, 8]\nclasses = 3\ncut = "relu"'
    with pytest.raises(ModelError, match="cut in two it fails in evaluation"):
        halves.build(parse(recipe_text("fixed", model=table)), (name,), compared=True)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_an_optimiser_gets_back_lies_as_it_lay(name: str) -> None:
    """torch chooses its loops by it, and two loops may round differently: a run that went on would be another."""
    layer = nn.Conv2d(3, 4, 3).to(memory_format=LAST)  # type: ignore[call-overload]
    before, after = (optim.build(OptimiserRecipe(name=name), layer, nn.Identity()) for _ in range(2))
    layer(torch.randn(2, 3, 8, 8)).sum().backward()
    before.step()
    kept = {key: value.contiguous() for key, value in optim.tensors_of(before).items()}
    optim.restore(after, kept, "a file")
    for parameter in after.parameters:
        for key, value in after.state[parameter].items():
            assert torch.equal(value, before.state[parameter][key])
            assert value.stride() == before.state[parameter][key].stride()
