"""Evaluate and predict with the trained halves: the head from the device's run folder, the tail on the server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common import halves, weights
from common.errors import MismatchError
from common.halves import Head
from common.recipe import Recipe
from common.rpc import split_pb2 as pb
from common.run import RunFolder
from common.schedule import Phase
from device_client.data import Dataset, Part, load_picture
from device_client.remote_tail import RemoteTail
from device_client.trainer import sent_batches


def open_finished(
    remote: RemoteTail, folder: RunFolder | None, allowed: tuple[str, ...], width: int | None = None
) -> Head:
    """Open a session with the server of a finished run and return its head, ready to use at `width`.

    The head is this folder's; without a folder, the one that was published to the server. Without a width, it is the
    run's last; MismatchError where the network was not trained for the one that is asked for.
    """
    if folder:
        recipe, _, manifest = folder.read()
        opened = remote.open(trains=False, run_id=manifest.run_id)
        if opened.recipe.digest() != recipe.digest():
            raise MismatchError(f"the server's recipe is not the one in {folder.path}; only halves of one run fit")
    else:
        opened = remote.open(trains=False)
    head = halves.build(opened.recipe, allowed).head
    if folder:
        folder.fill_half("head", head)
    else:
        weights.fill(head, weights.from_bytes(remote.head_weights(), "the server"), "the server")
    phase = _phase(remote, width)
    head.bottleneck.resize(phase.width, phase.order)
    return head.eval()


def _phase(remote: RemoteTail, width: int | None) -> Phase:
    """How the finished run left bottleneck and codecs, at another of its widths where one is asked for."""
    if remote.opened.phase is None:
        raise MismatchError(
            "the server did not say in which phase its run ended; install the same release on both sides"
        )
    phase = remote.opened.phase
    if width not in (None, *phase.widths):
        served = ", ".join(map(str, sorted(phase.widths)))
        raise MismatchError(
            f"width {width} was asked for, but this network was trained for {served}; give one of these as --width, or "
            f"train with nested widths"
        )
    return replace(phase, width=width or phase.width)


def evaluate(remote: RemoteTail, head: Head, data: Dataset) -> pb.Verdict:
    """Judge the test part."""
    opened = remote.opened
    phase = _phase(remote, head.bottleneck.width)
    return remote.evaluate(
        lambda: sent_batches(head, data.test, opened.recipe), len(data.test), pb.TEST, phase, data.classes
    )


def predict(remote: RemoteTail, head: Head, paths: Sequence[Path]) -> Iterator[tuple[Path, str, float]]:
    """Class and probability of each picture file."""
    opened = remote.opened
    recipe: Recipe = opened.recipe
    channels, height, width = recipe.model.input
    pictures = np.stack([load_picture(path, (channels, height, width)) for path in paths])
    part = Part(pictures, np.zeros(len(pictures), np.int64))
    sent = (batch for batch, _ in sent_batches(head, part, recipe))
    logits = np.concatenate(list(remote.predict(sent, len(part), _phase(remote, head.bottleneck.width))))
    chances = torch.from_numpy(logits).softmax(1)
    for path, chance in zip(paths, chances, strict=True):
        best = int(chance.argmax())
        yield path, opened.classes[best], float(chance[best])
