"""What one server process holds: the recipe, the run folder, the sessions, and the one run it trains or serves.

The servicer calls it for everything that isn't packing and unpacking; state of a device lives in its Session.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from rich.console import Console

from common import halves as halves_module
from common import report, weights
from common.codecs.base import elements
from common.errors import BusyError, ForbiddenError, FrameError, MismatchError, ModelError, StoppedError
from common.halves import Halves
from common.meter import Meter
from common.recipe import Recipe
from common.run import Manifest, RunFolder
from common.tcp_info import Kernel, find_peer
from common.wire import MAX_TENSOR_ELEMENTS
from edge_server.coordinator import Coordinator
from edge_server.initial import Initial, initial_weights
from edge_server.session import Training

MAX_SESSIONS = 64
# Bytes that one run may keep of what its device sent while the head was frozen.
STORE_LIMIT = 4 << 30
# A session that was opened and never begun, or left behind, makes room after this long.
_FORGET_S = 600.0
# Between the handshake and the first stream a device reads its data; it keeps its place so long at least.
_GRACE_S = 60.0


@dataclass
class Session:
    """One device's visit: its books, its connections, and its training where it trains."""

    name: str
    trains: bool
    identity: str = ""  # of the caller who opened it, and who alone may use it
    meter: Meter = field(default_factory=Meter)
    kernel: Kernel = field(default_factory=Kernel)
    peer: str = ""  # gRPC's name of the device's end of the connection
    training: Training | None = None
    streams: int = 0  # open at the moment
    touched: float = field(default_factory=time.monotonic)

    def seen(self, peer: str) -> None:
        """The device calls from `peer`: a connection that is new is counted too."""
        if peer != self.peer:
            self.peer = peer
            self.kernel.add(find_peer(peer))


@dataclass(frozen=True)
class Served:
    """A finished run: both halves where the head was published, else the tail alone."""

    halves: Halves
    manifest: Manifest
    head: bytes = b""


class Host:
    def __init__(
        self, recipe: Recipe, text: str, folder: RunFolder, console: Console, allowed: Collection[str] = ()
    ) -> None:
        self.recipe, self.text, self.folder, self.console = recipe, text, folder, console
        self._allowed = allowed
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._trainer: Session | None = None
        # Who began the run; it stays theirs when the link is lost, so that no one else can take it over.
        self.owner: str | None = None
        self.run_id = secrets.token_hex(8)
        self.served: Served | None = None
        self.initial = Initial()
        self._first_head = b""
        self.stopping = False
        self.store_limit = STORE_LIMIT
        # Set when the run's device has left: with its run finished, or interrupted by its user.
        self.ended = threading.Event()
        self.interrupted = ""

    @classmethod
    def to_train(
        cls, recipe: Recipe, text: str, folder: RunFolder, console: Console, allowed: Collection[str], overwrite: bool
    ) -> Host:
        """A host that trains `recipe` into `folder`; everything that could fail later is tried now."""
        host = cls(recipe, text, folder, console, allowed)
        halves = halves_module.build(recipe, allowed)
        _check_sizes(recipe, halves)
        size = sum(value.numel() * value.element_size() for value in halves.tail.state_dict().values())
        # Read before prepare: with --overwrite a run may start from what lay in its own folder.
        host.initial = initial_weights(recipe, halves, allowed)
        if not host.initial.run_id:
            host.initial.fill(halves)
            host._first_head = weights.to_bytes(halves.head)
        folder.prepare(overwrite, 2 * size)
        return host

    @classmethod
    def to_serve(cls, folder: RunFolder, console: Console, allowed: Collection[str]) -> Host:
        """A host that serves the finished run in `folder`."""
        recipe, text, manifest = folder.read()
        host = cls(recipe, text, folder, console, allowed)
        halves = halves_module.build(recipe, allowed)
        folder.fill_half("tail", halves.tail)
        published = folder.path / "head.safetensors"
        host._serve(halves, manifest, published.read_bytes() if published.is_file() else b"")
        return host

    def _serve(self, halves: Halves, manifest: Manifest, head: bytes) -> None:
        halves.tail.resize(manifest.phase.width, manifest.phase.order)
        halves.tail.eval()
        self.run_id = manifest.run_id
        self.served = Served(halves, manifest, head)

    # Sessions

    def open(self, trains: bool, run_id: str, identity: str) -> Session:
        """A new session of `identity`'s; BusyError without room, ForbiddenError where the run is another's,
        MismatchError where the device's head is of another run.
        """
        if self.stopping:
            raise StoppedError("the server is being stopped; try again later")
        if trains:
            if self.served:
                raise MismatchError(f"this server serves the finished run {self.run_id}; it has nothing to train")
            self._refuse_second(identity)
        elif not self.served:
            raise MismatchError("this server has no finished run yet; wait until training ends")
        elif run_id and run_id != self.run_id:
            raise MismatchError(
                f"the device's head is of run {run_id}, this server serves run {self.run_id}; "
                f"only halves of one run fit"
            )
        elif not run_id and not self.served.head:
            raise MismatchError(
                f"the head of run {self.run_id} was not published; "
                f"use --run with the folder of the device that trained it"
            )
        with self._lock:
            self._make_room()
            session = Session(secrets.token_hex(16), trains, identity)
            self._sessions[session.name] = session
        return session

    def session(self, name: str, identity: str) -> Session:
        """The session that `identity` opened. Another's is not known either: nothing tells that there is one."""
        with self._lock:
            session = self._sessions.get(name)
        if session is None or session.identity != identity:
            raise FrameError(
                "this session is not known here (the server was restarted, or it was idle too long); reconnect"
            )
        session.touched = time.monotonic()
        return session

    def _make_room(self) -> None:
        """Forget sessions without an open stream: those idle for long, and where all places are taken the oldest."""
        now = time.monotonic()
        idle = sorted((s for s in self._sessions.values() if not s.streams), key=lambda session: session.touched)
        for session in idle:
            full = len(self._sessions) >= MAX_SESSIONS and now - session.touched > _GRACE_S
            if full or now - session.touched > _FORGET_S:
                self._sessions.pop(session.name).kernel.close()
        if len(self._sessions) >= MAX_SESSIONS:
            raise BusyError(f"the server already has {MAX_SESSIONS} sessions; try again in a minute")

    def leave(self, session: Session) -> None:
        """A stream of this session has ended and the device needs it no more."""
        with self._lock:
            if not session.streams and self._sessions.pop(session.name, None) is not None:
                session.kernel.close()

    def _refuse_second(self, identity: str) -> None:
        if self.owner not in (None, identity):
            raise ForbiddenError(
                "this run was begun by another device and is its own; start another server for a second"
            )
        busy = self._trainer
        if busy and busy.training:
            raise BusyError(
                f"this run is already being trained by another device (step {busy.training.step} of "
                f"{busy.training.coordinator.steps}); start another server for a second run"
            )

    # Training

    def begin(self, session: Session, samples: int, classes: tuple[str, ...]) -> Training:
        """Start the run for this session from step 0; BusyError where another device trains it."""
        if not session.trains or session.training:
            raise FrameError("Begin of training came on a session that is not waiting for it")
        expected = self.recipe.model.classes
        if len(classes) != expected:
            raise MismatchError(
                f"the device's pictures have {len(classes)} classes, the recipe {self.recipe.name} has {expected}; "
                f"use other data or change model.classes"
            )
        if not 1 <= samples <= 2**40:
            raise FrameError(f"Begin says {samples} training pictures; at least 1 is needed")
        halves = halves_module.build(self.recipe, self._allowed)
        self.initial.fill(halves)
        per_epoch = max(1, samples // self.recipe.data.batch)
        coordinator = Coordinator(self.recipe, halves.channels, per_epoch)
        with self._lock:
            self._refuse_second(session.identity)
            self.folder.start(self.text)
            session.training = Training(
                self.recipe, halves, coordinator, classes, samples, self.folder.path, self.store_limit
            )
            self._trainer, self.owner = session, session.identity
        return session.training

    def finish(self, session: Session, head: bytes) -> None:
        """Keep the trained half and serve it from now on."""
        training = session.training
        if training is None or training.test is None:
            raise FrameError("Leave says finished, but the test part was not evaluated")
        if head:
            weights.fill(training.halves.head, weights.from_bytes(head, "the published head"), "the published head")
            self.folder.write_half("head", training.halves.head, self._manifest(training))
        training.halves.tail.settle(training.phase.width, training.phase.order)
        self.folder.write_half("tail", training.halves.tail, self._manifest(training))
        outcome = report.Outcome(
            self.run_id, training.test.accuracy, training.test.mean_loss, training.step, training.trained,
            training.epochs, time.monotonic() - training.started, training.busy_s, tuple(training.coordinator.phases),
        )  # fmt: skip
        kernel = report.kernel_of(server=session.kernel.read())
        summary = report.summarise(self.recipe, training.halves.cut, outcome, session.meter, kernel, "server")
        self.folder.write_summary(summary)
        report.show(self.console, summary)
        self._serve(training.halves, self._manifest(training), head)

    def _manifest(self, training: Training) -> Manifest:
        return Manifest(self.run_id, self.recipe.digest(), training.classes, training.phase, True)

    def end(self, session: Session, interrupted: str = "") -> None:
        """The training stream of this session is over, one way or another."""
        training, session.training = session.training, None
        if training:
            training.close()
        with self._lock:
            if self._trainer is session:
                self._trainer = None
            self._sessions.pop(session.name, None)
        session.kernel.close()
        if self.folder.metrics:
            self.folder.metrics.close()
            self.folder.metrics = None
        if self.served or training is None:
            self.ended.set()
        elif interrupted:
            self.interrupted = f"the device left at step {training.step} of {training.coordinator.steps}: {interrupted}"
            self.ended.set()
        elif not self.stopping:
            self.console.print(
                f"The link to the device was lost at step {training.step} of {training.coordinator.steps}; "
                f"a device that connects now starts the run anew.", highlight=False,
            )  # fmt: skip

    def close(self) -> None:
        with self._lock:
            for session in self._sessions.values():
                session.kernel.close()
            self._sessions.clear()

    def head_weights(self, session: Session) -> bytes:
        """The weights that the device's head starts from (TRAIN) or ended with (USE, if published)."""
        if not session.trains:
            return self.served.head if self.served else b""
        return self._first_head


def _check_sizes(recipe: Recipe, halves: Halves) -> None:
    channels = halves.channels
    largest = elements(halves.sent_shape(max(recipe.data.batch, recipe.data.evaluation_batch), channels))
    if largest > MAX_TENSOR_ELEMENTS:
        raise ModelError(
            f"an activation of {largest:,} elements would cross the link; at most {MAX_TENSOR_ELEMENTS:,} may: "
            f"lower data.batch or data.evaluation_batch, or cut later"
        )
    largest_shift = max((phase.shift for phase in recipe.schedule.phases), default=0)
    moves = largest_shift or any(phase.flip for phase in recipe.schedule.phases)
    if moves and (len(halves.cut) != 3 or largest_shift >= min(halves.cut[1:])):
        raise ModelError(
            f"the schedule flips or shifts what was kept by {largest_shift} places, which an activation of shape "
            f"{list(halves.cut)} at the cut {recipe.model.cut} does not allow; leave them out"
        )
    too_wide = [width for width in recipe.schedule.width_list if width > channels]
    if too_wide:
        raise ModelError(
            f"the schedule has width {too_wide[0]}, but only {channels} channels cross the cut {recipe.model.cut}; "
            f"give 1 to {channels}, or 0 for all"
        )
