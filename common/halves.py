"""The two halves of a network as each side holds them: layers from the graph, and a part of the bottleneck.

Both sides build the whole (random) model and keep their half, so the shape at the cut is known to both without
asking; the weights then come from the server.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from common import bottleneck, importance, models
from common.equivalence import require_same
from common.errors import ModelError
from common.gate import Gate, rectified
from common.norms import Norms
from common.partition import cut_shape, split
from common.recipe import Recipe
from common.schedule import phase_of_entry

# Channels of the cut: a linear bottleneck's matrix of more would take over 64 MB on either side,
_MOST_MIXED = 4096
# and the sensitivity of more over 16 MB.
MOST_WEIGHTED = 2048


class Head(nn.Module):
    """Picture [B, *input] to what is sent [B, width, ...], fp32 whatever the arithmetic inside."""

    def __init__(self, layers: nn.Module, encoder: bottleneck.Encoder) -> None:
        super().__init__()
        self.layers = layers
        self.bottleneck = encoder

    @property
    def processor(self) -> torch.device:
        """Where it computes, and what it sends is."""
        return self.bottleneck.order.device

    def forward(self, pictures: Tensor) -> Tensor:
        # Channels first, whatever the layers work in: so it is encoded.
        return self.bottleneck(self.layers(pictures.to(self.processor))).float().contiguous()


class Tail(nn.Module):
    """What was sent [B, width, ...] to logits [B, classes], fp32 whatever the arithmetic inside."""

    sensitivity: Tensor

    def __init__(
        self, layers: nn.Module, decoder: bottleneck.Decoder, nested: Sequence[int] = (), last: bool = False
    ) -> None:
        """`last`: hand on what came with its channels last, as its convolutions are laid out: up to the first of them
        all layers would work in what came."""
        super().__init__()
        self.layers = layers
        self.bottleneck = decoder
        self.norms = Norms(layers, nested)
        self._format = torch.channels_last if last else torch.contiguous_format
        # How sensitive the loss is to each direction at the cut, as a running mean: for runs that start from this one.
        # Empty where there are too many channels.
        size = decoder.channels if decoder.channels <= MOST_WEIGHTED else 0
        self.register_buffer("sensitivity", torch.zeros(size, size, device=decoder.order.device))

    def resize(self, width: int, order: tuple[int, ...] = ()) -> None:
        """Be ready for `width` channels; `order` as in bottleneck.resize."""
        if width != self.norms.width:
            self.norms.switch(width)
        self.bottleneck.resize(width, order)

    @torch.no_grad()
    def note_sensitivity(self, gradient: Tensor) -> None:
        """Take in dLoss/dSent [B, width, ...] of a step. What is known of channels that it did not send stays."""
        if not len(self.sensitivity):
            return
        places = self.bottleneck.places(gradient.shape[1])
        here = places[:, None], places[None]
        before, now = self.sensitivity[here], importance.sensitivity_of(gradient)
        # Zero: nothing is known of this pair of channels yet, and there is no mean to go on with.
        self.sensitivity[here] = torch.where(before == 0, now, before.lerp(now, 0.1))

    @torch.no_grad()
    def rotate(self, components: Tensor, mean: Tensor) -> None:
        """The answer to the encoder's `rotate`; ModelError where the components cannot be undone."""
        assert isinstance(self.bottleneck, bottleneck.LinearDecoder)
        inverse, info = torch.linalg.inv_ex(components.double())
        turned = self.sensitivity.cpu().double()
        if len(turned):
            turned[: len(mean)] = inverse.T @ turned[: len(mean)]
            turned[:, : len(mean)] = turned[:, : len(mean)] @ inverse
        inverse, turned = inverse.float(), turned.float()
        if info or not all(torch.isfinite(values).all() for values in (inverse, turned, mean)):
            raise ModelError("the principal components cannot be undone")
        self.bottleneck.rotate(inverse, mean)
        self.sensitivity.copy_(turned)

    def settle(self, width: int, order: tuple[int, ...] = ()) -> None:
        """Be ready for `width` channels and to be written, with each width's statistics in its own set."""
        self.resize(width, order)
        self.norms.put_away()
        self.norms.complete()

    def forward(self, sent: Tensor) -> Tensor:
        activation = self.bottleneck(sent)
        if activation.dim() == 4:
            activation = activation.contiguous(memory_format=self._format)
        if activation.requires_grad and activation.is_leaf:
            # The tail's first layer may work in place, which torch forbids on a leaf that wants a gradient.
            activation = activation.clone()
        return self.layers(activation).float()


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Halves:
    head: Head
    tail: Tail
    cut: tuple[int, ...]  # shape of one picture's activation at the cut, channels first
    gate: Gate
    processor: torch.device = CPU  # where the tail is; who trains the head moves it where it belongs
    # Held while the tail computes for devices that are served at the same time.
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def channels(self) -> int:
        return self.cut[0]

    def sent_shape(self, batch: int, width: int) -> tuple[int, ...]:
        return (batch, width, *self.cut[1:])


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Have random weights be the same in every process, whether a model draws them by torch, numpy or Python."""
    by_python, by_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(by_python)
        np.random.set_state(by_numpy)


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Say in errors which key of the recipe they are about."""
    try:
        yield
    except ModelError as error:
        raise type(error)(f"{key}: {error}") from error


def build(
    recipe: Recipe, allowed: Collection[str] = (), processor: torch.device = CPU, compared: bool = False
) -> Halves:  # fmt: skip
    """Both halves with the recipe's random weights (a function of its seed), the tail on `processor`; ModelError,
    CutError as models and partition raise them. The caller drops the half that it doesn't need.

    `compared`: make sure that they compute what the whole does; takes ten passes of a few pictures, and two backward.
    """
    with _seeded(recipe.seed), _naming("model.name"):
        whole = models.build(recipe.model.name, recipe.model.input, recipe.model.classes, allowed)
    last = not models.is_own(recipe.model.name)  # one of the user's own may count on views of its maps
    if last:
        whole = models.channels_last(whole)
    with _naming("model.cut"):
        head, tail = split(whole, recipe.model.cut, recipe.model.input)
    if compared:
        with _naming("model.name"):
            require_same(whole, head, tail, recipe.model.input, recipe.data.batch)
    shape = cut_shape(head, recipe.model.input)
    if recipe.bottleneck.kind == "linear" and shape[0] > _MOST_MIXED:
        raise ModelError(
            f"model.cut: a linear bottleneck of the {shape[0]:,} channels at {recipe.model.cut} would have as many "
            f"squared weights on each side; at most {_MOST_MIXED:,} can be mixed: cut elsewhere, or choose "
            f'bottleneck.kind "channels"'
        )
    encoder, decoder = bottleneck.build(recipe.bottleneck.kind, shape[0], recipe.seed)
    # A linear bottleneck mixes the channels: behind it nothing is zero any more.
    gate = Gate(recipe.bottleneck.kind != "linear" and rectified(head))
    phases = [phase_of_entry(recipe, entry, shape[0]) for entry in recipe.schedule.entries]
    nested = {width for phase in phases if phase.nested for width in phase.widths}
    # First to the processor, then the tail: it makes its norms' sets where the layers are.
    tail, decoder = tail.to(processor), decoder.to(processor)
    return Halves(Head(head, encoder), Tail(tail, decoder, sorted(nested), last), shape, gate, processor)


def reseed(seed: int, step: int, side: str) -> None:
    """Make what a step draws at random (dropout) a function of seed, step and side, so a replay is the same replay."""
    torch.manual_seed(seed * 1_000_003 + 2 * step + (side == "tail"))
