"""MobileNetV2 for small pictures: the first three strides are 1, so that 32x32 still ends at 4x4.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2, with plain ReLU. Every
block ends in an identity named `out`, which gives the cut a readable name: after the first stage `stage1_0_out`,
16xHxW.
"""

from __future__ import annotations

import torch
from torch import nn

# One stage a row: expansion, output channels, blocks, stride of the first block.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class ConvNorm(nn.Sequential):
    """Convolution and batch norm, then a ReLU unless `linear`: (N, inputs, H, W) to (N, outputs, H', W')."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outputs))
        if not linear:
            self.add_module("relu", nn.ReLU())


class Block(nn.Module):
    """Inverted residual: widen, filter each channel, project; (N, inputs, H, W) to (N, outputs, H', W')."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expand = ConvNorm(inputs, middle, 1) if expansion != 1 else nn.Sequential()
        self.depthwise = ConvNorm(middle, middle, 3, stride, groups=middle)
        self.project = ConvNorm(middle, outputs, 1, linear=True)
        self.out = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return self.out(x + y if self.residual else y)


class MobileNetV2(nn.Module):
    """(N, channels, H, W) pictures to (N, classes) logits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = ConvNorm(channels, 32, 3)
        inputs = 32
        self.stages = len(STAGES)
        for number, (expansion, outputs, blocks, stride) in enumerate(STAGES, start=1):
            stage = nn.Sequential()
            for _ in range(blocks):
                stage.append(Block(inputs, outputs, expansion, stride))
                inputs, stride = outputs, 1
            self.add_module(f"stage{number}", stage)
        self.last = ConvNorm(inputs, 1280, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(1280, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"stage{number}")(x)
        return self.fc(self.flatten(self.pool(self.last(x))))


def mobilenetv2(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """MobileNetV2 for pictures of (channels, height, width); any height and width will do."""
    return MobileNetV2(input_shape[0], classes)
