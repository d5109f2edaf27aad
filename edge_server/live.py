"""The run that a server trains: begun, kept in checkpoints, taken up again and finished.

A run outlives the streams, sessions and processes that it takes. Of all streams that devices open for it one is the
run's at a time: a new one ends the old, which may hang in a dead connection.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from rich.console import Console

from common import halves as halves_module
from common import report, weights
from common.checkpoint import EVERY, Checkpoint, Checkpoints, due
from common.errors import (
    BusyError,
    ForbiddenError,
    FrameError,
    MismatchError,
    RunFolderError,
    SessionError,
    StoreError,
    printable,
)
from common.meter import Meter
from common.progress import warn
from common.recipe import Recipe
from common.report import Faults
from common.room import require_room
from common.rpc import split_pb2 as pb
from common.run import TAIL, Manifest, RunFolder
from common.schedule import steps_asked, steps_per_epoch
from common.tcp_info import Kernel, KernelBytes
from edge_server.budget import Beside, Budget
from edge_server.checks import require_batch
from edge_server.coordinator import Coordinator, Decision
from edge_server.identity import name_of
from edge_server.initial import Initial
from edge_server.training import Training, reached

# An older stream of the same run gets this long to end, which it does at once unless a step is being computed.
_TAKE_OVER_S = 20.0
# A stop waits so long for a step or an evaluation to end.
_PAUSE_S = 3.0


class Stream(Protocol):
    """A device's stream as far as it matters here: it can be ended."""

    def cancel(self) -> object: ...


class LiveRun:
    """One run in training. `training` is None until a device begins it, or takes it up in this process."""

    def __init__(
        self, recipe: Recipe, text: str, folder: RunFolder, console: Console, allowed: Collection[str],
        initial: Initial | None, saved: Mapping[str, Any] | None, store_limit: int, processor: torch.device,
    ) -> None:  # fmt: skip
        """`initial`: what a device begins with; None where the run has gone too far for one to begin it. `saved`: head
        of the newest checkpoint in the folder, where the run is to go on from there. `store_limit`: bytes on disk for
        what its device sends while the head is frozen. `processor`: where the tail computes.
        """
        self.recipe, self.text, self.folder, self.console = recipe, text, folder, console
        self.initial, self._allowed, self._processor = initial, allowed, processor
        self.every, self.store_limit = EVERY, store_limit
        self.run_id: str = saved["run_id"] if saved else ""  # until a device begins it
        self.owner: str | None = saved["state"]["owner"] if saved else None  # identity of the device that began it
        # Pictures of an epoch, and classes, that it began with.
        self._data = (saved["state"]["samples"], tuple(saved["state"]["classes"])) if saved else None
        self.training: Training | None = None
        self.meter, self.kernel, self.faults = Meter(), Kernel(), Faults()
        self.checkpoints = Checkpoints(folder.checkpoints, self.run_id, recipe.digest())
        # The step that the run stands at as long as no device has taken it up, and those at which one can.
        self._at, self._reached = 0, set[int]()
        self._writing = threading.Lock()
        self._streams: set[Stream] = set()
        self._changed = threading.Condition()
        if saved:
            found, warnings = self.checkpoints.sound()
            self._at, state = found[-1], saved["state"]
            self._reached = reached(self._at, len(state["answers"]), {tuple(one) for one in state["evaluated"]})
            for warning in warnings:
                warn(console, warning)

    # Who may have it

    @property
    def attended(self) -> bool:
        """Whether a device has a stream open for it."""
        return bool(self._streams)

    @property
    def step(self) -> int:
        return self.training.step if self.training else self._at

    @property
    def _named(self) -> str:
        return f"trains run {self.run_id}" if self.run_id else "has a new run, which no device has begun"

    def check_free(self, identity: str) -> None:
        """Raise where a device that brings no half of this run may not begin it."""
        self.check_owner(identity)
        if self.training and self.attended:
            raise BusyError(
                f"a device is training this run already (step {self.step} of {self.training.coordinator.steps}); start "
                f"another server for a second run"
            )
        if self.step or self.initial is None:
            raise MismatchError(
                f"run {self.run_id} stands at step {self.step} and its head is on the device that began it: start that "
                f"device again with the same --run, or the server anew with --overwrite"
            )

    def check_owner(self, identity: str) -> None:
        """Raise where the run is another's. One that was begun when nobody had to say who they are is nobody's yet."""
        if self.owner and not identity:
            raise ForbiddenError(
                "this run was begun by a device that proved who it is: start the server with --tls-client-ca or "
                "--token-file as then"
            )
        if self.owner and name_of(self.owner) != name_of(identity):
            raise ForbiddenError(
                "this run was begun by another device and is its own; start another server for a second"
            )

    def check_data(self, samples: int, classes: tuple[str, ...]) -> None:
        """Raise where a device that comes back has other pictures than the run began with."""
        if self._data and self._data != (samples, classes):
            raise MismatchError(
                f"the device came back with {samples:,} pictures of {len(classes)} classes; the run began with "
                f"{self._data[0]:,} of {len(self._data[1])}: use the data it began with"
            )

    def check_head(self, size: int) -> None:
        """Raise where a device that comes back is to publish a head that the run's budget has no room for."""
        if self.recipe.schedule.budget_mb and self.training and size > self.training.beside.head:
            raise MismatchError(
                "the run began without --publish-head, and its budget has nothing set aside for the head: leave it out"
            )

    # Streams

    def join(self, context: Stream) -> None:
        with self._changed:
            self._streams.add(context)

    def part(self, context: Stream) -> None:
        with self._changed:
            self._streams.discard(context)
            self._changed.notify_all()

    def take_over(self, context: Stream | None = None) -> None:
        """End all streams of this run, so that `context` can be its only one; BusyError where they take too long."""
        with self._changed:
            for stream in self._streams:
                stream.cancel()
            if not self._changed.wait_for(lambda: not self._streams, _TAKE_OVER_S):
                raise BusyError("an older connection of this device is still at work; try again in a moment")
            if context:
                self._streams.add(context)

    # From start to end

    def begin(self, samples: int, classes: tuple[str, ...], identity: str, beside: Beside) -> None:
        """Start from step 0."""
        expected = self.recipe.model.classes
        if len(classes) != expected:
            raise MismatchError(
                f"the device's pictures have {len(classes)} classes, the recipe {self.recipe.name} has {expected}; "
                f"use other data, or change model.classes on the server"
            )
        if strange := [name for name in classes if printable(name) != name]:
            raise MismatchError(
                f"the class {printable(strange[0], 100)!r} has characters in its name that no terminal shows: rename it"
            )
        if not 1 <= samples <= 2**40:
            raise FrameError(f"Begin says {samples} training pictures; at least 1 is needed")
        if (most := max(beside.validation, beside.test, beside.head)) > 2**40:
            raise FrameError(f"Begin says {most} pictures to judge or bytes of a head; that is more than there can be")
        training = self._new(samples, classes, beside)
        if samples == 1:
            require_batch(self.recipe, training.halves, samples)
        assert self.initial  # check_free has looked
        if self.recipe.schedule.budget_mb:
            head = 0 if self.initial.run_id else len(weights.to_bytes(training.halves.head))
            sent, cut = len(self.initial.known), training.halves.cut
            require_room(self.recipe, cut, samples, beside.test, head + beside.head, sent)
        self.initial.fill(training.halves)
        if self.training:  # begun by a device that made no step and is gone
            self.training.close()
        self.folder.start(self.text)
        # An id of its own: whoever began the run before, and made no step of it, is not taken for this device.
        self.run_id = secrets.token_hex(8)
        self.checkpoints = Checkpoints(self.folder.checkpoints, self.run_id, self.recipe.digest())
        training.switch(training.phase)
        self.training, self.owner, self._data = training, identity, (samples, classes)

    def _new(self, samples: int, classes: tuple[str, ...], beside: Beside) -> Training:
        halves = halves_module.build(self.recipe, self._allowed, self._processor)
        batch, budget = min(samples, self.recipe.data.batch), None
        epoch = steps_per_epoch(samples, batch)
        if self.recipe.schedule.budget_mb:
            budget = Budget(self.recipe, halves.channels, epoch, batch, beside)
        known = self.initial.known if self.initial else ()  # else a checkpoint knows
        coordinator = Coordinator(self.recipe, halves.channels, epoch, budget, known)
        return Training(
            self.recipe, halves, coordinator, classes, samples, beside, self.checkpoints.folder, self.store_limit
        )

    def common(self, run_id: str, kept: Sequence[int]) -> int:
        """The newest step from which both sides can go on, of those that the device has `kept`; changes nothing.

        Rather one that the run can go on from as it stands, for then nothing is undone; else a checkpoint's.
        """
        if run_id != self.run_id:
            raise MismatchError(
                f"the device's folder holds run {run_id}, this server {self._named}; start the server with the folder "
                f"of the same run, or the device with another --run (or --overwrite)"
            )
        training = self.training
        here = [step for step in kept if (training.can_be_taken_up(step) if training else step in self._reached)]
        if here:
            return max(here)
        common = max(self.checkpoints.written.intersection(kept), default=None)
        if common is None:
            raise MismatchError(
                f"the two sides of run {run_id} have no step in common to go on from (device {_steps(kept)}, server "
                f"{_steps(sorted(self.checkpoints.written))}); start both anew with --overwrite"
            )
        return common

    def put_back(self, step: int) -> None:
        """Stand where a device can go on from `step`, which `common` told; no stream is open any more."""
        if self.training and self.training.can_be_taken_up(step):
            return
        if not self.training and step in self._reached:
            self._go_back(self._at)
            return
        if step not in self.checkpoints.written:
            raise SessionError(f"the run has gone on from step {step} meanwhile; open another session")
        self._go_back(step)

    def _go_back(self, step: int) -> None:
        """Stand where the checkpoint of `step` was taken."""
        kept = self.checkpoints.read(step)
        if self.training:
            self.training.close()
            self.training.spoiled = True  # where what follows fails, nothing goes on from it, nor keeps it
        training = self._new(kept.state["samples"], tuple(kept.state["classes"]), Beside(**kept.state["beside"]))
        training.restore(kept)
        lost = self.folder.resume(step)
        self.meter.restore(kept.state["meter"], None if self.training else lost)
        if self.training is None:
            self.kernel.carry(KernelBytes(**kept.state["kernel"]) if kept.state["kernel"] else None)
            self.faults = Faults(**kept.state["faults"])
        self.faults.resumed += 1
        self.faults.steps_again += lost["steps"]
        self.training = training
        self.checkpoints.forget_after(step)
        self.keep(anew=True)  # with what the fault cost: a second one before the next checkpoint must not forget it

    def keep(self, anew: bool = False) -> None:
        """Write a checkpoint of where the run stands, unless there is one. `anew`: in its place.

        Called with `training.lock` held, or where nothing else can use the training.
        """
        if snapshot := self.snapshot(anew):
            self.write(snapshot, anew)

    def snapshot_after(self, decision: Decision) -> Checkpoint | None:
        """What `write` is to be given after the step that led to `decision`; None where no checkpoint is due."""
        assert self.training
        turn = bool(decision.phase) or decision.then != pb.STEP
        return self.snapshot() if due(self.training.step, self.every, turn=turn) else None

    def snapshot(self, anew: bool = False) -> Checkpoint | None:
        """A checkpoint of the run as it is now, for `write`; None where it has one, unless that is to be made `anew`,
        or cannot have any. Called as `keep`."""
        training = self.training
        assert training
        if training.spoiled or (training.step in self.checkpoints.written and not anew):
            return None
        kernel = self.kernel.read()
        books = {
            "meter": self.meter.state(), "kernel": asdict(kernel) if kernel else None, "faults": asdict(self.faults),
            "half": TAIL, "owner": self.owner,
        }  # fmt: skip
        try:
            tensors, state = training.state()
        except StoreError as error:
            self._unkept(training.step, error)
            return None
        return Checkpoint(training.step, tensors, state | books)

    def write(self, snapshot: Checkpoint, anew: bool = False) -> None:
        """Write it, unless another thread has written one of this step meanwhile. A full disk is told, and that is all.

        Apart from `snapshot`, so that a step's answer need not wait for the disk.
        """
        training = self.training
        assert training
        with self._writing:
            if snapshot.step in self.checkpoints.written and not anew:
                return
            try:
                self.folder.sync()
                self.checkpoints.write(snapshot.step, snapshot.tensors, snapshot.state)
                training.forget_stores(min(self.checkpoints.written))
            except RunFolderError as error:
                self._unkept(snapshot.step, error)

    def _unkept(self, step: int, error: Exception) -> None:
        warn(self.console, f"no checkpoint of step {step}: {error}; the run goes on")

    def pause(self) -> bool:
        """Keep where the run stands; False, and nothing kept, where a step or an evaluation takes too long to end."""
        training = self.training
        if not training or not training.lock.acquire(timeout=_PAUSE_S):
            return False
        try:
            self.keep()
        finally:
            training.lock.release()
        return True

    def rest(self) -> None:
        """The process ends."""
        if self.pause() and self.training:
            self.training.close()
        self.folder.close()

    def finish(self, head: bytes) -> Manifest:
        """Keep the trained half; what it is to be served with."""
        training = self.training
        assert training and training.test
        manifest = Manifest(self.run_id, self.recipe.digest(), training.classes, training.phase)
        if head:
            weights.fill(training.halves.head, weights.from_bytes(head, "the published head"), "the published head")
            self.folder.write_half("head", training.halves.head, manifest)
        training.halves.tail.settle(training.phase.width, training.phase.order)
        self.folder.write_half("tail", training.halves.tail, manifest)
        outcome = report.Outcome(
            run_id=self.run_id, accuracy=training.test.accuracy, loss=training.test.mean_loss, steps=training.step,
            samples=training.step * training.batch, epochs=training.epochs,
            steps_asked=steps_asked(self.recipe.schedule, training.per_epoch), wall_s=training.elapsed_s,
            busy_s=training.busy_s, phases=tuple(training.coordinator.phases), faults=self.faults,
        )  # fmt: skip
        cut, kernel = training.halves.cut, self.kernel.read()
        summary = report.summarise(self.recipe, cut, outcome, self.meter, kernel, "server")
        training.close()
        self.folder.write_summary(summary)
        self.folder.close()
        self.folder.forget_checkpoints()
        report.show(self.console, summary)
        if head:
            self.console.print("The device has published its head: others can use it without a folder of their own.")
        return manifest


def _steps(steps: Sequence[int]) -> str:
    return f"at {', '.join(map(str, steps))}" if steps else "nowhere"
