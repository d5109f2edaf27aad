"""The bottleneck: an encoder on the device and a decoder on the server, so that only `width` channels cross.

Channels are ordered and a narrower width is always a prefix of a wider one, so a change of width changes how
much of the same weights is used and nothing else. Kinds: "none" sends all channels, "channels" the most
important ones (the paper's way), "linear" a learnt 1x1 map. Shapes: activation [B, C, ...], sent [B, width, ...].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.errors import SAME_RELEASE, ModelError


class _Sized(nn.Module):
    """What all encoders and decoders share: the channels of the cut, the width now sent, the channels' order."""

    order: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.width = channels
        # A buffer, so that it travels with the weights; only "channels" ever changes it.
        self.register_buffer("order", torch.arange(channels))

    def resize(self, width: int, order: tuple[int, ...] = ()) -> None:
        """Send `width` channels from now on, chosen by `order` (most important first; empty: as before); ModelError
        where there are no such channels."""
        if not 1 <= width <= self.channels:
            raise ModelError(f"{width:,} channels are to be sent of a cut that has {self.channels:,}; {SAME_RELEASE}")
        if order and sorted(order) != list(range(self.channels)):
            raise ModelError(
                f"an order of channels came that has not each of the {self.channels:,} once; {SAME_RELEASE}"
            )
        self.width = width
        if order:
            self.order.copy_(torch.tensor(order))

    def places(self, width: int) -> Tensor:
        """Which channel of the cut (linear: which direction) each of `width` sent channels is."""
        return torch.arange(width, device=self.order.device)


class Pass(_Sized):
    """All channels as they are, on either side."""

    def forward(self, activation: Tensor) -> Tensor:
        return activation


class ChannelEncoder(_Sized):
    def forward(self, activation: Tensor) -> Tensor:
        if self.width == self.channels:
            return activation
        return activation.index_select(1, self.order[: self.width])


class ChannelDecoder(_Sized):
    """Puts the sent channels in their places; the others are zero."""

    def places(self, width: int) -> Tensor:
        return super().places(width) if width == self.channels else self.order[:width]

    def forward(self, sent: Tensor) -> Tensor:
        if self.width == self.channels:
            return sent
        full = sent.new_zeros(sent.shape[0], self.channels, *sent.shape[2:])
        return full.index_copy(1, self.order[: self.width], sent)


class LinearEncoder(_Sized):
    """z = E[:width] x + b[:width]: `weight` is E [C, C], its first rows are used, `bias` is b [C]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.eye(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, activation: Tensor) -> Tensor:
        return _map_channels(activation, self.weight[: self.width], self.bias[: self.width])

    @torch.no_grad()
    def rotate(self, components: Tensor, mean: Tensor) -> None:
        """Let z become components (z - mean), in the first w channels for `components` [w, w] and `mean` [w]."""
        components, mean, count = components.to(self.weight.device), mean.to(self.weight.device), len(mean)
        self.weight[:count] = components @ self.weight[:count]
        self.bias[:count] = components @ (self.bias[:count] - mean)

    @torch.no_grad()
    def select(self, order: Tensor) -> None:
        """Let z be the activation's channels in this order."""
        self.weight.copy_(torch.eye(self.channels)[order])

    @torch.no_grad()
    def close_from(self, width: int) -> None:
        """Let the channels from `width` on be zero. They still learn, and so may become more later."""
        self.weight[width:] = 0
        self.bias[width:] = 0


class LinearDecoder(_Sized):
    """x = D[:, :width] z + b: `weight` is D [C, C], its first columns are used, `bias` is b [C]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.eye(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, sent: Tensor) -> Tensor:
        return _map_channels(sent, self.weight[:, : self.width], self.bias)

    @torch.no_grad()
    def rotate(self, inverse: Tensor, mean: Tensor) -> None:
        """The answer to the encoder's `rotate`, with the components' inverse: what is decoded stays the same."""
        inverse, mean, count = inverse.to(self.weight.device), mean.to(self.weight.device), len(mean)
        self.bias.add_(self.weight[:, :count] @ mean)
        self.weight[:, :count] = self.weight[:, :count] @ inverse

    @torch.no_grad()
    def select(self, order: Tensor) -> None:
        """Put channels sent in this order back in their places."""
        self.weight.copy_(torch.eye(self.channels)[order].T)


def _map_channels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution over whatever comes after the channels: nothing, a sequence or a map."""
    kernel = weight.reshape(*weight.shape, *(1,) * (x.dim() - 2))
    if x.dim() == 2:
        return nn.functional.linear(x, kernel, bias)
    return (nn.functional.conv1d if x.dim() == 3 else nn.functional.conv2d)(x, kernel, bias)


_KINDS: dict[str, tuple[type[_Sized], type[_Sized]]] = {
    "none": (Pass, Pass),
    "channels": (ChannelEncoder, ChannelDecoder),
    "linear": (LinearEncoder, LinearDecoder),
}
Encoder = _Sized
Decoder = _Sized


def build(kind: str, channels: int, seed: int) -> tuple[Encoder, Decoder]:
    """Encoder and decoder at full width, where decoder(encoder(x)) = x; linear starts from a random rotation."""
    encoder_class, decoder_class = _KINDS[kind]
    encoder, decoder = encoder_class(channels), decoder_class(channels)
    if isinstance(encoder, LinearEncoder) and isinstance(decoder, LinearDecoder):
        generator = torch.Generator().manual_seed(seed)
        rotation, _ = torch.linalg.qr(torch.randn(channels, channels, generator=generator))
        with torch.no_grad():
            encoder.weight.copy_(rotation)
            decoder.weight.copy_(rotation.T)
    return encoder, decoder
