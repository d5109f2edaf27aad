"""A residual network of half a million parameters that trains fast on one CPU core.

The stem folds 2x2 pixels into channels before its first convolution, so nothing runs at full resolution; three
residual stages at 32, 64 and 96 channels follow. The cut after the first stage is `stage1_relu2`, 32xH/2xW/2.
"""

from __future__ import annotations

import torch
from torch import nn

from common.errors import ModelError
from common.models.resnet20 import Block


class Tiny(nn.Module):
    """(N, channels, H, W) pictures, H and W even, to (N, classes) logits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        self.stem.add_module("fold", nn.PixelUnshuffle(2))
        self.stem.add_module("conv", nn.Conv2d(4 * channels, 32, 3, padding=1, bias=False))
        self.stem.add_module("bn", nn.BatchNorm2d(32))
        self.stem.add_module("relu", nn.ReLU())
        self.stage1 = Block(32, 32, 1)
        self.stage2 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1))
        self.stage3 = nn.Sequential(Block(64, 96, 2), Block(96, 96, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(96, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.flatten(self.pool(x)))


def tiny(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The tiny network for pictures of (channels, height, width).

    Raises:
        ModelError: an odd height or width, which cannot be folded.
    """
    channels, height, width = input_shape
    if height % 2 or width % 2:
        raise ModelError(f"the model tiny needs an even height and width, not {height}x{width}; use resnet20 instead")
    return Tiny(channels, classes)
