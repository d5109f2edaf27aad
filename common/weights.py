"""Weights as safetensors: bytes and files that are checked against the module before anything is copied into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from common import models
from common.errors import ModelError
from common.words import some


def to_bytes(module: nn.Module) -> bytes:
    """safetensors bytes of the module's whole state (parameters and buffers)."""
    state = module.state_dict()
    # Copies: tied weights share their memory, which safetensors refuses.
    return safetensors.torch.save({name: value.detach().cpu().clone().contiguous() for name, value in state.items()})


def room(module: nn.Module) -> int:
    """The most bytes that anyone's `to_bytes` of such a module comes to: other metadata may stand in its header."""
    return len(to_bytes(module)) + 4096


def from_bytes(data: bytes, source: str) -> dict[str, torch.Tensor]:
    """The tensors in safetensors bytes; ModelError names `source` where they are damaged."""
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"the weights in {source} are not valid safetensors: {error}") from error


def read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return from_bytes(path.read_bytes(), str(path))
    except OSError as error:
        raise ModelError(f"the weights in {path} cannot be read: {error}") from error


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy `tensors` into the module; ModelError, and nothing copied, unless names, shapes and dtypes all fit."""
    state = module.state_dict()
    missing, extra = sorted(state.keys() - tensors.keys()), sorted(tensors.keys() - state.keys())
    if missing or extra:
        words = [
            f"{what} {some(names, 3)}"
            for what, names in (("it lacks", missing), ("it has the unknown", extra))
            if names
        ]
        raise ModelError(f"the weights in {source} are of another model: {' and '.join(words)}")
    for name, value in state.items():
        came = tensors[name]
        if came.shape != value.shape or came.dtype != value.dtype:
            raise ModelError(
                f"the weights in {source} are of another model: {name} is {list(came.shape)} {came.dtype}, "
                f"{list(value.shape)} {value.dtype} was expected"
            )
    module.load_state_dict(dict(tensors))


def take_over(module: nn.Module, data: bytes, model: str) -> None:
    """Copy the weights that a server hands out into the module; ModelError also where the two sides' models of the name
    `model` are not the same."""
    tensors = from_bytes(data, "the server's answer")
    try:
        fill(module, tensors, "the server's answer")
    except ModelError as error:
        same = f"the module of {model}" if models.is_own(model) else "the release of deprune"
        raise ModelError(f"{error}; {same} must be the same on both sides") from error
