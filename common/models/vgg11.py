"""VGG-11 with batch norm for small pictures: eight convolutions in five stages and one linear classifier.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", column A.
Each stage ends in a max pool while there is something left to pool; the cut after the first stage is
`stage1_pool`, 64xH/2xW/2.
"""

from __future__ import annotations

from torch import nn

# One stage a row: the output channels of its convolutions.
STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


def _stage(inputs: int, widths: tuple[int, ...], pool: bool) -> nn.Sequential:
    stage = nn.Sequential()
    for number, outputs in enumerate(widths, start=1):
        stage.add_module(f"conv{number}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        stage.add_module(f"bn{number}", nn.BatchNorm2d(outputs))
        stage.add_module(f"relu{number}", nn.ReLU())
        inputs = outputs
    if pool:
        stage.add_module("pool", nn.MaxPool2d(2))
    return stage


def vgg11(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """VGG-11: (N, *input_shape) pictures to (N, classes) logits.

    Pictures under 32x32 get fewer pools, since a map of one pixel cannot be halved again.
    """
    channels, height, width = input_shape
    model = nn.Sequential()
    side = min(height, width)
    for number, widths in enumerate(STAGES, start=1):
        model.add_module(f"stage{number}", _stage(channels, widths, pool=side >= 2))
        channels, side = widths[-1], side // 2
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(channels, classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
