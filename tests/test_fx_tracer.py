"""What forward does besides computing is refused where a graph would do it once and never again."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import ModelError
from common.partition import split

INPUT = (3, 32, 32)


class Odd(nn.Module):
    """Does in forward, besides the rest, something that a graph would do once and never again."""

    def __init__(self, deed: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.last, self.count, self.deed = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), 0, deed
        self.scale, self.unknown = torch.tensor(2.0), float("nan")
        self.notes, self.seen, self.means = {"n": [0], "nan": [float("nan")]}, deque([0]), [torch.zeros(4)]
        self.register_buffer("mean", torch.zeros(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.scale * self.deed(self, self.scale * self.conv(x)).relu()).mean((2, 3))


def _frozen(odd: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return odd.conv(x[:, :3])  # type: ignore[no-any-return]


def _exact(_odd: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return x.float()


def _counted(odd: Any, x: torch.Tensor) -> torch.Tensor:
    odd.count += 1
    return x


def _noted(odd: Any, x: torch.Tensor) -> torch.Tensor:
    odd.notes["n"][0] += 1
    return x


def _kept(odd: Any, x: torch.Tensor) -> torch.Tensor:
    odd.seen.append(1)
    return x


def _swapped(odd: Any, x: torch.Tensor) -> torch.Tensor:
    odd.means[0] = odd.means[0] * 0.9
    return x


def _added(odd: Any, x: torch.Tensor) -> torch.Tensor:
    odd.mean += 1
    return x


def _averaged(odd: Any, x: torch.Tensor) -> torch.Tensor:
    odd.mean[0].mul_(0.9).add_(x.detach().mean())
    return x - odd.mean


def _within(odd: Any, x: torch.Tensor) -> torch.Tensor:
    odd.last.weight.data = torch.renorm(odd.last.weight.data, 2, 0, 1.0)
    return x


def _clamped(odd: Any, x: torch.Tensor) -> torch.Tensor:
    """What changes nothing as yet."""
    for parameter in odd.parameters():
        parameter.data.clamp_(-9, 9)
    return x


def _replaced(odd: Any, x: torch.Tensor) -> torch.Tensor:
    for parameter in odd.parameters():
        parameter.data = parameter.data.clamp(-9, 9)
    return x


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        (_within, "sets the data of a tensor"),
        (_clamped, "changes conv.weight itself"),
        (_replaced, "changes conv.weight itself"),
        (_frozen, "runs without gradients"),
        (_exact, "sets torch.autocast"),
        (_counted, "changes count itself"),
        (_noted, "changes notes itself"),
        (_kept, "changes seen itself"),
        (_swapped, "changes means itself"),
        (_added, "changes mean itself"),
        (_averaged, "changes mean itself"),
        (lambda _, x: x + torch.randn(4, 1, 1), "draws random numbers"),
        (lambda _, x: x * 2 if random.random() < 0.5 else x, "draws random numbers"),
        (lambda _, x: x * float(np.random.uniform()), "draws random numbers"),
    ],
)
def test_what_a_graph_would_do_only_once_is_refused(deed: Any, words: str) -> None:
    with pytest.raises(ModelError, match=f"^Odd cannot be cut: .*{words}"):
        split(Odd(deed), "relu", INPUT)


@pytest.mark.parametrize("deed", [lambda _, x: x + torch.rand_like(x), lambda odd, x: (x - odd.mean).add_(1)])
def test_what_is_done_to_the_input_alone_may_be_random_and_in_place(deed: Any) -> None:
    head, tail = split(Odd(deed), "relu", INPUT)
    assert tail(head(torch.zeros(2, *INPUT))).shape == (2, 2)
