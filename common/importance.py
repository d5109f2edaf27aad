"""Which channels or directions at the cut count: by variance, by the loss's sensitivity to them, by rank.

Plain functions of tensors; both sides take the sensitivity, the device takes components, the server ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from common.errors import DivergedError

# Every direction is given at least this share of the mean sensitivity: one that has not mattered so far may matter yet.
_LEAST = 0.01
# No component is longer than this, nor shorter than its inverse. Where few directions matter, as at a late cut, lengths
# came to be a tenth and four, and what goes with them learnt so many times too fast that the loss was soon not finite.
_LONGEST = 2.5


def principal_components(activations: Iterable[Tensor], sensitivity: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Components [C, C] (rows, most important first) and mean [C] of activations [B, C, ...] over all else.

    Without a `sensitivity` they are orthonormal, by variance. With one, S [C, C], they are the components of sqrt(S) x:
    the first w keep the weighted error (x - x')' S (x - x') smallest, where x' is what w of them can say of x. Their
    lengths are then 0.4 to 2.5.
    Activations are taken batch by batch: all of them at once would take gigabytes where maps are large.
    """
    count, total, products = 0, torch.zeros(()), torch.zeros(())
    for activation in activations:
        points = activation.detach().transpose(0, 1).reshape(activation.shape[1], -1).double()
        count += points.shape[1]
        total = total + points.sum(dim=1)
        products = products + points @ points.T
    mean = total / count
    covariance, root = products / count - torch.outer(mean, mean), torch.eye(len(mean), dtype=torch.float64)
    if sensitivity is not None and sensitivity.trace() > 0:  # one of zeros says nothing
        root = _root(sensitivity.double())
    if not torch.isfinite(covariance).all():
        raise DivergedError(
            "what the head makes of the pictures is not finite before any training: its first weights or the data are "
            "too large, or none"
        )
    _, vectors = torch.linalg.eigh(root @ covariance @ root)
    components = vectors.flip(1).T @ root
    lengths = components.norm(dim=1, keepdim=True)
    components *= lengths.clamp(1 / _LONGEST, _LONGEST) / lengths
    # eigh leaves the sign open; the largest entry is made positive so that equal data give equal components.
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    return (components * largest.sign()).float().contiguous(), mean.float()


def _root(sensitivity: Tensor) -> Tensor:
    """Symmetric square root of a sensitivity whose mean is made 1."""
    values, vectors = torch.linalg.eigh(sensitivity)
    values = values.clamp_min(0)
    values = values / values.mean() * (1 - _LEAST) + _LEAST
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def sensitivity_of(gradient: Tensor) -> Tensor:
    """The loss's sensitivity to each direction of the sent channels [w, w], from dLoss/dSent [B, w, ...]: the mean of
    g g' over pictures and places (the activation's empirical Fisher information; Hsu et al., arXiv 2207.00112, weight a
    factorisation by that of the weights)."""
    points = gradient.detach().transpose(0, 1).reshape(gradient.shape[1], -1)
    return points @ points.T / points.shape[1]


def rank_channels(activation: Tensor, gradient: Tensor) -> Tensor:
    """What each channel [C] is worth to the loss: |sum of activation x gradient| a picture, summed over pictures.

    First-order Taylor criterion (Molchanov et al., arXiv 1611.06440): the change of the loss if it were zero.
    """
    product = (activation * gradient).flatten(2) if activation.dim() > 2 else (activation * gradient)[:, :, None]
    return product.sum(dim=2).abs().sum(dim=0)


def reorder(order: tuple[int, ...], sent: int, scores: Tensor) -> tuple[int, ...]:
    """A new order by `scores` [C]; the first `sent` of the old one stay in front, so widths stay prefixes."""
    best = sorted(order[:sent], key=lambda channel: -float(scores[channel]))
    rest = sorted(order[sent:], key=lambda channel: -float(scores[channel]))
    return tuple(best + rest)
