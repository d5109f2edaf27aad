"""Gradients that are left out are exactly those that the head would have multiplied by zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from common import models
from common.gate import Gate, rectified
from common.partition import split
from common.schedule import Phase

INPUT = (3, 32, 32)


def phase(activation: str) -> Phase:
    return Phase(0, 0, 1, activation, "step:10", 0.1, 0, 1)


def head_gradients(head: nn.Module, pictures: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    head.zero_grad()
    head(pictures).backward(gradient)
    return [parameter.grad.clone() for parameter in head.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    ("name", "cut", "gated"),
    [
        ("tiny", "stage1_relu2", True),
        ("resnet20", "stage2_1_relu2", True),
        ("vgg11", "stage2_pool", True),
        ("mobilenetv2", "stage2_0_expand_relu", True),
        ("resnet20", "add_1", False),
        ("resnet20", "stem_bn", False),
        ("mobilenetv2", "stage1_0_out", False),
    ],
)
def test_the_heads_gradient_does_not_need_them(name: str, cut: str, gated: bool) -> None:
    torch.manual_seed(0)
    model = models.build(name, INPUT, 10).train()
    head, _ = split(model, cut, INPUT)
    assert rectified(head) is gated
    pictures = torch.randn(4, *INPUT)
    activation = head(pictures)
    gradient = torch.randn_like(activation)
    mask = torch.from_numpy(Gate(True).mask(activation.detach().numpy(), phase("step:15")))
    if gated:
        assert 0.05 < mask.float().mean() < 0.95
    whole = head_gradients(head, pictures, gradient)
    part = head_gradients(head, pictures, gradient * (mask if gated else (activation > 0)))
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True)) is gated


class Tail(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(x))


class Called(nn.Module):
    def __init__(self, *functions: Any) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for function in self.functions:
            x = function(x)
        return x


@pytest.mark.parametrize(
    ("last", "gated"),
    [
        (nn.ReLU(), True),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1), nn.Flatten()), True),
        (Called(torch.relu, torch.flatten), True),
        (Called(torch.relu_, torch.sigmoid), False),
        (nn.LeakyReLU(), False),
        (nn.GELU(), False),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), False),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), False),
    ],
)
def test_only_what_keeps_a_relus_zeros_counts(last: nn.Module, gated: bool) -> None:
    assert rectified(fx.symbolic_trace(Tail(last))) is gated


def test_each_steps_gradient_is_rounded_by_draws_of_its_own() -> None:
    """With the same at every step what rounding does to a place would add up there instead of evening out."""
    sent = np.zeros((1, 1, 2, 2), np.float32)
    drawn = {Gate(True).aside(seed, step, sent, phase("step:15")).dither for seed in (3, 4) for step in (0, 1)}
    assert len(drawn) == 4
    assert Gate(True).aside(3, 0, sent, phase("step:15")).dither in drawn, "the other side draws the same"


def test_no_support_where_the_codec_makes_zeros_of_its_own() -> None:
    """int8 rounds small values to zero: the two sides would not agree on the places."""
    sent = np.zeros((1, 1, 2, 2), np.float32)
    assert Gate(True).mask(sent, phase("int8")) is None and Gate(True).mask(sent, phase("fp16")) is None
    assert Gate(False).mask(sent, phase("step:15")) is None
    for name in ("fp32", "step:15", "auto:5"):
        assert Gate(True).mask(sent, phase(name)) is not None
