"""Evaluate and predict with the trained halves: the head from the device's run folder, the tail on the server."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from common import codecs, halves, weights
from common.errors import SAME_RELEASE, BusyError, LinkError, MismatchError, SessionError, StoppedError
from common.halves import Head
from common.processor import fits
from common.progress import Counted, untold
from common.rpc import split_pb2 as pb
from common.run import RunFolder
from common.schedule import Phase
from common.words import gives_up
from device_client.data import Dataset, Part
from device_client.handshake import Opened
from device_client.inputs import sent_batches
from device_client.remote_tail import RemoteTail

T = TypeVar("T")

# How often a server that has no room is asked: about a minute in all, with the pause that ours asks for.
TRIES = 12
_PAUSE_S = 10.0  # where a server does not say when to try again, as while it trains
_SESSIONS = 10  # that an evaluation takes at most, on a link that breaks


def open_finished(
    remote: RemoteTail, folder: RunFolder | None, allowed: tuple[str, ...], width: int | None,
    say: Callable[[str], None], processor: torch.device, wait_s: float,
) -> Head:  # fmt: skip
    """Open a session with the server of a finished run, and return the run's head, ready to use at `width` on
    `processor`. The server is waited for up to `wait_s`.

    The head is this folder's; without a folder, the one that was published to the server. Without a width, it is the
    run's last; MismatchError where the network was not trained for the one that is asked for.
    """
    if folder:
        recipe, _, manifest = folder.read()
        opened = _open(remote, manifest.run_id, say, wait_s)
        if opened.recipe.digest() != recipe.digest():
            raise MismatchError(f"the server's recipe is not the one in {folder.path}; only halves of one run fit")
    else:
        opened = _open(remote, "", say, wait_s)
    head = halves.build(opened.recipe, allowed).head
    if folder:
        folder.fill_half("head", head)
    else:
        weights.take_over(head, remote.head_weights(), opened.recipe.model.name)
    phase = _phase(remote, width)
    codecs.load(phase.activation_codec, say=say)
    head.bottleneck.resize(phase.width, phase.order)
    with fits("the head", processor):
        return head.to(processor).eval()


def _open(remote: RemoteTail, run_id: str, say: Callable[[str], None], wait_s: float) -> Opened:
    """A session with the server, which is waited for up to `wait_s` in all, be it away or busy or both in turn."""
    until = time.monotonic() + wait_s

    def attempt() -> Opened:
        left = max(min(1.0, wait_s), until - time.monotonic())  # some: who waits is not told to wait
        return remote.open(trains=False, run_id=run_id, wait_s=left)

    return patiently(attempt, say, wait_s)


def _phase(remote: RemoteTail, width: int | None) -> Phase:
    """How the finished run left bottleneck and codecs, at another of its widths where one is asked for."""
    if remote.opened.phase is None:
        raise MismatchError(f"the server did not say in which phase its run ended; {SAME_RELEASE}")
    phase = remote.opened.phase
    if width not in (None, *phase.widths):
        served = ", ".join(map(str, sorted(phase.widths)))
        give = "give one of these" if len(phase.widths) > 1 else "leave --width out"
        raise MismatchError(
            f"width {width} was asked for, but this network was trained for {served}; {give}, or train with nested "
            f"widths"
        )
    return replace(phase, width=width or phase.width)


def _again(remote: RemoteTail, attempt: Callable[[], T], say: Callable[[str], None], wait_s: float) -> T:
    """What `attempt` comes to; on a new session where reading the pictures took longer than the server keeps one, or
    where the link broke, whose server is then waited for up to `wait_s`."""
    before = remote.opened
    for _ in range(_SESSIONS - 1):
        try:
            return patiently(attempt, say, wait_s)
        except SessionError:
            pass
        except (LinkError, StoppedError) as error:
            if wait_s <= 0:
                raise type(error)(f"{error}; with --wait SECONDS it is tried again when the server is back") from error
            say(f"{error}; trying again")
        opened = _open(remote, before.run_id, say, wait_s)
        if (opened.recipe.digest(), opened.phase) != (before.recipe.digest(), before.phase):
            raise MismatchError(f"the server at {remote.server} serves another run now; start again")
    return patiently(attempt, say, wait_s)


def patiently(attempt: Callable[[], T], say: Callable[[str], None], wait_s: float = 0.0) -> T:
    """What `attempt` comes to; where the server has no room now and says when it may, tried again then: TRIES times,
    and for no less than `wait_s`. Where it does not say, as while it trains, for `wait_s` alone."""
    until, left, told = time.monotonic() + wait_s, TRIES, ""
    while True:
        left -= 1
        try:
            return attempt()
        except BusyError as error:
            rest, pause = until - time.monotonic(), error.retry_after_s
            if rest <= 0 and (pause is None or left <= 0):
                if pause is None and wait_s <= 0:
                    raise BusyError(f"{error}; with --wait SECONDS it is waited for") from error
                raise
            if pause is not None or str(error) != told:  # else it may be hours
                told = str(error)
                say(f"{error}; waiting, {gives_up(rest) if rest > 0 else f'{left} more tries'}")
            # Jitter, so that devices which were refused together do not come back together.
            time.sleep((min(_PAUSE_S, max(rest, 1.0)) if pause is None else pause) * random.uniform(1.0, 1.5))


def evaluate(
    remote: RemoteTail, head: Head, data: Dataset, say: Callable[[str], None], wait_s: float = 0.0,
    progress: Counted = untold,
) -> pb.Verdict:  # fmt: skip
    """Judge the test part."""
    opened = remote.opened
    phase = _phase(remote, head.bottleneck.width)

    def attempt() -> pb.Verdict:
        batches = functools.partial(sent_batches, head, data.test, opened.recipe)
        return remote.evaluate(batches, len(data.test), pb.TEST, phase, data.classes, progress=progress)

    return _again(remote, attempt, say, wait_s)


def predict(
    remote: RemoteTail, head: Head, part: Part, say: Callable[[str], None], wait_s: float = 0.0,
    progress: Counted = untold,
) -> np.ndarray:  # fmt: skip
    """Logits [pictures, classes] for each picture of a part, in order."""
    answers: list[np.ndarray] = []

    def attempt() -> np.ndarray:
        left = Part(part.pictures[len(answers) :], part.labels[len(answers) :])  # where the link broke before
        # Each by itself: a codec rounds what crosses together by one step, and a picture's answer is its own.
        sent = (batch for batch, _ in sent_batches(head, left, remote.opened.recipe, 1))
        if len(left):
            phase = _phase(remote, head.bottleneck.width)
            answers.extend(remote.predict(sent, len(left), phase, len(answers), progress))
        return np.concatenate(answers)

    return _again(remote, attempt, say, wait_s)
