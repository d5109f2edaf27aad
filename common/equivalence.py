"""Whether a model's halves do what the whole does; the server asks once, before it waits for a device.

A graph is what forward did while it was traced. What it is known not to do again is refused there, by name
(fx_tracer.py); running both finds the rest: hooks, draws and counters of the model's own, branches on what a tensor is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.tracing import copy_around_tensors
from common.words import one_line

# Halves compute in the order of the whole, so they are as good as equal; a difference that is one is not so small.
_TOLERANCE = 1e-3
_PICTURES = 4


def require_same(
    model: nn.Module, head: nn.Module, tail: nn.Module, shape: tuple[int, ...], batch: int = _PICTURES
) -> None:
    """ModelError where head and tail, which have the model's tensors, do not compute what it does for `shape` (no
    batch), in training or in evaluation, or do not learn what it does; or where it cannot learn. Statistics, modes and
    the random state stay as they are. `batch`: pictures that the machine is to have room for.

    Where forward of the whole itself fails, nothing is raised: whoever builds and tries the model tells of that.
    """
    whole = copy_around_tensors(model)  # it may count on things that are no tensors
    parts = (whole, head, tail)
    modes = {module: module.training for part in parts for module in part.modules()}
    statistics = {id(value): value for part in parts for value in part.buffers()}.values()
    before = [value.clone() for value in statistics]
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(min(_PICTURES, max(2, batch)), *shape, generator=generator)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def joined(inputs: Tensor) -> Tensor:
        return tail(head(inputs).float().contiguous())  # as it crosses

    def slopes(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Gradients of a weighted sum of the outputs, which a hook on a block of layers may change."""
        _put_back(statistics, before)
        torch.manual_seed(0)
        with torch.enable_grad():
            output = forward(pictures.clone())
            weighed = (output * torch.linspace(0.5, 1.5, output.numel()).view_as(output)).sum()
        found = torch.autograd.grad(weighed, learning, allow_unused=True)
        return [
            torch.zeros_like(parameter) if slope is None else slope.to_dense()
            for parameter, slope in zip(learning, found, strict=True)
        ]

    def twice(forward: Callable[[Tensor], Tensor], training: bool) -> list[Tensor]:
        """Its outputs in two calls in a row: the second shows a counter, or random numbers of the model's own."""
        _put_back(statistics, before)
        torch.manual_seed(0)
        for part in parts:
            part.train(training)
        return [forward(pictures.clone()) for _ in range(2)]

    works = False  # the forward of the whole, in training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for training in (False, True):
                try:
                    expected = twice(whole, training)
                except Exception:  # noqa: BLE001 -- forward is anybody's code; who builds the model tells of it
                    continue
                if not all(isinstance(output, Tensor) for output in expected):
                    continue
                works = training
                when = "in training" if training else "in evaluation"
                _compare(expected, lambda: twice(joined, training), when)  # noqa: B023
            if not works or not learning:
                return
            for part in parts:
                part.train()
            try:
                expected = slopes(whole)
            except Exception as error:
                raise ModelError(f"it cannot be trained, for no gradient goes back ({one_line(error)})") from error
            _compare(expected, lambda: slopes(joined), "in learning")
    finally:
        _put_back(statistics, before)
        for module, mode in modes.items():
            module.training = mode


def _compare(expected: list[Tensor], halves: Callable[[], list[Tensor]], when: str) -> None:
    try:
        found = halves()
    except Exception as error:
        raise ModelError(
            f"cut in two it fails {when}, as a whole it does not ({one_line(error)}); cut elsewhere, or "
            f"change its forward"
        ) from error
    for one, other in zip(expected, found, strict=True):
        if one.shape == other.shape and not one.numel():
            continue
        scale = float(one.nan_to_num(0, 0, 0).abs().max()) + 1e-6
        if one.shape != other.shape or not torch.allclose(one, other, 0.0, _TOLERANCE * scale, equal_nan=True):
            raise ModelError(
                f"cut in two it does not compute {when} what it does as a whole: it may have a hook, forward or "
                f"backward, on a block of layers, draw or count by itself, or ask what a tensor is; leave that out"
            )


def _put_back(values: Iterable[Tensor], before: list[Tensor]) -> None:
    with torch.no_grad():
        for value, earlier in zip(values, before, strict=True):
            value.copy_(earlier)
