"""Running statistics of batch and instance norms, a set for each width that a nested run serves.

Sums over few channels are not those over many: with one set for all widths the narrow ones would be judged by the
statistics of the wide ones (Yu et al., Slimmable Neural Networks, arXiv 1812.08928). Weights are shared all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextlib.contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Put the modules' buffers, running statistics above all, back to what they are now when it is left."""
    before = [{name: value.clone() for name, value in module.named_buffers()} for module in modules]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, values in zip(modules, before, strict=True):
                for name, value in module.named_buffers():
                    value.copy_(values[name])


class Norms(nn.Module):
    """Keeps the sets of the norms in `layers`, as buffers that travel with the weights."""

    begun: torch.Tensor  # for each width, whether its set has learnt anything since it was made

    def __init__(self, layers: nn.Module, widths: Sequence[int]) -> None:
        super().__init__()
        self._used: dict[str, torch.Tensor] = {}
        for name, module in layers.named_modules():
            for buffer, value in module.named_buffers(recurse=False) if isinstance(module, _NormBase) else ():
                key = f"{name}.{buffer}".replace(".", "_")
                while key in self._used:  # "a_b.c" beside "a.b_c"
                    key += "_"
                self._used[key] = value
        self.widths = tuple(widths)
        self.width: int | None = None  # whose set the layers have now; None: not set yet
        # Asked at every step: it stays on the processor, wherever the layers are.
        self.register_buffer("begun", torch.zeros(len(self.widths), dtype=torch.bool), persistent=bool(self.widths))
        for width in self.widths:
            for name, value in self._used.items():
                self.register_buffer(self._key(width, name), value.clone())

    @staticmethod
    def _key(width: int, name: str) -> str:
        return f"{name}_at_{width}"

    @torch.no_grad()
    def switch(self, width: int) -> None:
        """Put away what the layers have learnt at the width until now, and give them the set of this one.

        A width without a set (that of a ranking), or whose set has not begun, goes on from what the layers have now:
        after an earlier phase that is much better than a set that has learnt nothing.
        """
        self.put_away()
        self.width = width if width in self.widths else None
        if self.width is not None and self.begun[self.widths.index(self.width)]:
            for name, value in self._used.items():
                value.copy_(self.get_buffer(self._key(width, name)))

    @torch.no_grad()
    def put_away(self) -> None:
        """Copy what the layers have into the set of the present width."""
        if self.width is not None:
            self._put(self.width)

    def complete(self) -> None:
        """Fill the sets that have not begun, because no step drew their width, with what the layers have."""
        for width, begun in zip(self.widths, self.begun.tolist(), strict=True):
            if not begun:
                self._put(width)

    @torch.no_grad()
    def start(self) -> None:
        """Fill every set with what the layers have: the statistics of the run that this one starts from."""
        for width in self.widths:
            self._put(width)

    @torch.no_grad()
    def _put(self, width: int) -> None:
        self.begun[self.widths.index(width)] = True
        for name, value in self._used.items():
            self.get_buffer(self._key(width, name)).copy_(value)
