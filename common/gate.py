"""Where the gradient is never needed: behind a ReLU it is multiplied by zero wherever the activation is zero.

Both sides ask, of the same activation: the server leaves those places out of what it sends, the device knows from
its own activation which they are. So the head's gradient is exactly what it would have been.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional

from common.codecs import codec
from common.codecs.base import Aside, Mask
from common.rpc import split_pb2 as pb
from common.schedule import Phase

_RELUS = {
    nn.ReLU, nn.ReLU6, functional.relu, functional.relu6, functional.relu_, torch.relu, torch.relu_, "relu", "relu_",
}  # fmt: skip
# What hands zeros on and lets no gradient through to places that a ReLU before them has shut.
_HANDING_ON = {
    nn.Identity, nn.Flatten, nn.MaxPool1d, nn.MaxPool2d, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
    functional.max_pool1d, functional.max_pool2d, torch.flatten, torch.reshape, "flatten", "view", "reshape",
    "contiguous",
}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    rectified: bool  # whether what crosses the link comes out of a ReLU

    def mask(self, sent: np.ndarray, phase: Phase) -> Mask | None:
        """Where the activation [B, width, ...] needs a gradient; None: everywhere.

        The same on both sides only if the codec hands on which elements are zero.
        """
        exact = self.rectified and codec(phase.activation_codec).exact_zeros
        return sent != 0 if exact else None

    def aside(self, seed: int, step: int, sent: np.ndarray, phase: Phase) -> Aside:
        """What both sides know of the gradient that answers a step's activation, `sent` [B, width, ...]: the device as
        it encodes it, the server as it has decoded it."""
        return Aside((seed, step, pb.GRADIENT), self.mask(sent, phase))


def rectified(head: fx.GraphModule) -> bool:
    """Whether the output of `head` is what a ReLU gave, perhaps pooled, dropped out or reshaped since."""
    (node,) = (node for node in head.graph.nodes if node.op == "output")
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        target = type(head.get_submodule(node.target)) if node.op == "call_module" else node.target
        if target in _RELUS:
            return True
        if target not in _HANDING_ON:
            return False
    return False
