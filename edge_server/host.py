"""What one server process holds: the sessions, and the one run it trains or serves.

The servicer calls it for everything that isn't packing and unpacking. A device's visit is its Session; the run that
it trains outlives visits and processes, and is in live.py.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.markup import escape

from common import codecs, models, weights, wire
from common import halves as halves_module
from common.errors import (
    BusyError,
    FrameError,
    MismatchError,
    ModelError,
    RecipeError,
    RunFolderError,
    SessionError,
    StoppedError,
)
from common.halves import Halves
from common.progress import note
from common.recipe import Recipe
from common.room import require_weights
from common.rpc import split_pb2 as pb
from common.run import TAIL, Manifest, RunFolder
from common.wire import Place
from edge_server import checks
from edge_server.budget import Beside
from edge_server.callers import Callers
from edge_server.initial import initial_weights
from edge_server.limits import Limits
from edge_server.live import LiveRun, Stream
from edge_server.sessions import Session, Sessions
from edge_server.training import Training
from edge_server.watch import Watch


@dataclass(frozen=True)
class Served:
    """A finished run: both halves where the head was published, else the tail alone."""

    halves: Halves
    manifest: Manifest
    head: bytes = b""


class Host:
    def __init__(
        self, recipe: Recipe, text: str, folder: RunFolder, console: Console, limits: Limits | None = None
    ) -> None:
        self.recipe, self.text, self.folder, self.console = recipe, text, folder, console
        self.limits = limits or Limits()
        self.callers = Callers(self.limits)
        self.watch = Watch(self.limits, self.note)
        self._beginning = threading.Lock()  # held while a stream takes another's place, and while the run is put back
        self.sessions = Sessions(self.limits)
        self.run: LiveRun | None = None
        self.served: Served | None = None
        self._first_head = b""
        self.stopping = False
        # Set when the run's device knows that the run is finished.
        self.ended = threading.Event()
        # The device of a run that is finished may still have to hear of that. Since when it is waited for, on the clock
        # of time.monotonic(); inf while it judges, None where no run was finished by this process.
        self.finished_at: float | None = None

    @classmethod
    def to_train(
        cls, recipe: Recipe, text: str, folder: RunFolder, console: Console, allowed: Collection[str], overwrite: bool,
        limits: Limits | None = None, processor: torch.device = halves_module.CPU,
    ) -> Host:  # fmt: skip
        """A host that trains `recipe` in `folder`, from where it was left, with the tail on `processor`; what could
        fail later is tried now."""
        host = cls(recipe, text, folder, console, limits)
        saved = folder.left_by(TAIL)  # also where it is to be replaced: a device's only head is no server's to delete
        if overwrite:
            saved = None
        halves = halves_module.build(recipe, allowed, compared=models.is_own(recipe.model.name))
        checks.require_elements(recipe, halves, host.limits.elements)
        checks.require_head(recipe, halves)
        checks.require_schedule(recipe, halves)
        checks.require_output(recipe, halves)
        checks.require_batch(recipe, halves)
        if saved and saved["digest"] != recipe.digest():
            raise RunFolderError(
                f"{folder.path} holds an unfinished run of another recipe, at step {saved['step']:,}"
                f"{folder.differs(recipe)}; go on with {folder.path / 'recipe.toml'}, choose another --run, or pass "
                f"--overwrite, which deletes that run"
            )
        initial = None
        if not (saved and saved["step"]):  # else no device can begin it any more
            # Read before prepare: with --overwrite a run may start from what lay in its own folder.
            try:
                initial = initial_weights(recipe, halves, allowed)
            except (RunFolderError, ModelError, MismatchError, RecipeError):
                if not saved:  # else the checkpoint has all that came of it, for the device that began the run
                    raise
            if initial and initial.told:
                console.print(f"Starts from {escape(initial.told)}.", highlight=False)
            if initial and not initial.run_id:
                initial.fill(halves)
                host._first_head = weights.to_bytes(halves.head)
        require_weights(recipe, len(host._first_head))
        if not saved:
            size = sum(value.numel() * value.element_size() for value in halves.tail.state_dict().values())
            # The tail and three checkpoints of it with its optimiser, and with the answer to a step.
            numbers = math.prod(halves.sent_shape(recipe.data.batch, halves.channels))
            answer = round(numbers * max(codecs.codec(name).bits for name in recipe.codecs) / 8)
            folder.prepare(overwrite, 10 * size + 3 * answer, recipe)
        for wasted in checks.wasteful(recipe, halves):
            host.note(wasted)
        codecs.load(*recipe.codecs, say=console.print)  # now, for a stream of a run would have to wait
        host.run = LiveRun(recipe, text, folder, console, allowed, initial, saved, host.limits.store, processor)
        return host

    @classmethod
    def to_serve(
        cls, folder: RunFolder, console: Console, allowed: Collection[str], limits: Limits, processor: torch.device
    ) -> Host:
        """A host that serves the finished run in `folder`, with the tail on `processor`."""
        if saved := folder.left_by(TAIL):
            raise RunFolderError(
                f"{folder.path} holds an unfinished run, at step {saved['step']:,}: to go on with it, give its recipe "
                f"too, of which {folder.path / 'recipe.toml'} is a copy"
            )
        recipe, text, manifest = folder.read()
        folder.forget_checkpoints()  # of a process that ended as it finished the run
        host = cls(recipe, text, folder, console, limits)
        halves = halves_module.build(recipe, allowed, processor)
        checks.require_elements(recipe, halves, host.limits.elements)
        folder.fill_half("tail", halves.tail)
        published = folder.path / "head.safetensors"
        host._serve(halves, manifest, published.read_bytes() if published.is_file() else b"")
        return host

    def _serve(self, halves: Halves, manifest: Manifest, head: bytes) -> None:
        halves.tail.resize(manifest.phase.width, manifest.phase.order)
        halves.tail.eval()
        codecs.load(manifest.phase.activation_codec, say=self.console.print)
        self.served = Served(halves, manifest, head)

    @property
    def run_id(self) -> str:
        """Of the finished run that is served, or of the one in training; "" until a device begins that."""
        return self.served.manifest.run_id if self.served else self.run.run_id if self.run else ""

    @property
    def at_work(self) -> bool:
        """Whether the server itself computes a step of the run, judges a batch of it or writes its end.

        The lock alone does not say: an evaluation holds it while it waits for its device too.
        """
        training = self.run.training if self.run else None
        return training is not None and training.lock.locked() and self.watch.at_work

    def note(self, sentence: str) -> None:
        """Tell the operator."""
        note(self.console, f"{sentence}.")

    def tend(self) -> None:
        """End what is silent and forget what was left behind; called a few times a second."""
        now = time.monotonic()
        self.watch.tend(now)
        self.sessions.tend(now)

    # Sessions

    def open(self, trains: bool, run_id: str, kept: Sequence[int], identity: str, caller: str) -> tuple[Session, int]:
        """A new session of `identity`'s, and the step that it goes on from (0 unless it takes up a run).

        `caller`: whose share of the server it takes: the identity's, or an address's where none is asked for.
        BusyError without room, ForbiddenError where the run is another's, MismatchError where the device's half is of
        another run or cannot go on.
        """
        if self.stopping:
            raise StoppedError("the server is being stopped; try again later")
        session, step = Session(secrets.token_hex(16), trains, identity, caller), 0
        if trains:
            step = self._open_training(session, run_id, kept)
        else:
            self._check_use(run_id)
        self.sessions.add(session)
        return session, step

    def _open_training(self, session: Session, run_id: str, kept: Sequence[int]) -> int:
        if self.served:
            if run_id != self.run_id:
                raise MismatchError(
                    f"this server serves the finished run {self.run_id} and trains nothing: start edge-server with a "
                    f"recipe and another --run, or --overwrite"
                )
            if self.run:
                self.run.check_owner(session.identity)
                if self.finished_at != math.inf:  # its own device has not heard of the end, and judges once more
                    self.finished_at = time.monotonic()
            return 0
        assert self.run
        if not run_id:
            self.run.check_free(session.identity)
            return 0
        self.run.check_owner(session.identity)
        # The run is put back when the device begins, not now. Else whoever has seen a handshake could disturb it by
        # sending that once more; to begin, one has to know the answer too.
        session.back_to = self.run.common(run_id, kept)
        session.take_up(self.run)
        return session.back_to

    def _check_use(self, run_id: str) -> None:
        if run_id and run_id != self.run_id:
            has = f"{'serves' if self.served else 'trains'} run {self.run_id}" if self.run_id else "has a new run"
            raise MismatchError(f"the device's head is of run {run_id}, this server {has}; only halves of one run fit")
        if not self.served:
            raise BusyError("this server has no finished run yet, and serves one when its training has ended")
        if not run_id and not self.served.head:
            raise MismatchError(
                f"the head of run {self.run_id} was not published; "
                f"use --run with the folder of the device that trained it"
            )

    @contextmanager
    def telling(self) -> Iterator[None]:
        """The run's own device is back to hear of the end; a server that only waits for that stays until it has."""
        if self.run:
            self.finished_at = math.inf
        try:
            yield
        finally:
            if self.run:
                self.finished_at = time.monotonic()
        self.ended.set()

    # Training

    def begin(self, session: Session, begin: pb.Begin, context: Stream) -> bool:
        """Let `context` be the one stream of the session's run, which is started where it was not; whether it was.

        FrameError where the device stands at a step from which the run cannot go on: nothing is disturbed by it.
        """
        run = self.run
        if session.run or session.trains:
            self._require_unfinished()
        if not session.trains or run is None:
            raise FrameError("Begin of training came on a session that does not train")
        with self._beginning:
            starts = session.run is None
            if starts:
                self._start(run, session, begin, context)
            else:
                self._go_on(run, session, begin, context)
            session.joined = True
            return starts

    def _start(self, run: LiveRun, session: Session, begin: pb.Begin, context: Stream) -> None:
        """Start the run for a device that brings no half of it; the session's books become the run's."""
        run.check_free(session.identity)
        run.take_over(context)
        try:
            beside = Beside(begin.validation, begin.test, begin.head)
            run.begin(begin.samples, tuple(begin.classes), session.identity, beside)
        except BaseException:
            run.part(context)
            raise
        self._book_head(session)
        run.meter, run.kernel = session.meter, session.kernel
        session.run, session.run_id = run, run.run_id

    def _go_on(self, run: LiveRun, session: Session, begin: pb.Begin, context: Stream) -> None:
        """Go on with the run where its device stands. Checks come first: a device that fails one disturbs nothing."""
        _check_same(session, run)
        run.check_data(begin.samples, tuple(begin.classes))
        run.check_head(begin.head)
        if session.back_to is not None:
            self._put_back(session, begin.step)
        assert run.training
        _check_whole(run.training)
        run.training.answered_from(begin.step)
        run.take_over(context)
        try:
            self._require_unfinished()  # an older stream of the device may just have finished it
        except SessionError:
            run.part(context)
            raise
        run.owner = run.owner or session.identity
        run.faults.reconnects += session.joined

    def _require_unfinished(self) -> None:
        if self.served:
            raise SessionError("the run of this session is finished; open another to hear of it")

    def _book_head(self, session: Session) -> None:
        """Count the head's first weights where this session has not: the device was given them on an earlier one.

        A head that learns alone takes longer than a session is kept, and with the session its books were forgotten.
        """
        if self._first_head and not session.head_sent:
            session.book_head(wire.pack_bytes(Place(pb.WEIGHTS, 0, 0), self._first_head))

    def _put_back(self, session: Session, step: int) -> None:
        """Have the session's run stand where its device goes on from, as the handshake told it."""
        assert session.run
        if step != session.back_to:
            raise FrameError(f"Begin came at step {step}; the handshake told this device to go on at {session.back_to}")
        session.run.take_over()
        self._require_unfinished()
        session.run.put_back(step)
        session.back_to = None

    @contextmanager
    def judging(self, session: Session, context: Stream) -> Iterator[Training]:
        """Let `context` judge the session's run as it stands, which waits meanwhile.

        Not where the run is yet to be put back: the device would go on with a verdict that this side then gives up.
        """
        with self._beginning:
            if session.run is None or session.run.training is None or session.back_to is not None:
                raise FrameError("Evaluate came before Begin")
            run, training = session.run, session.run.training
            _check_same(session, run)
            _check_whole(training)
            run.join(context)
        try:
            with training.lock:
                yield training
        finally:
            run.part(context)

    def finish(self, head: bytes) -> None:
        """Keep the trained half and serve it from now on."""
        assert self.run and self.run.training
        manifest = self.run.finish(head)
        self._serve(self.run.training.halves, manifest, head)
        self.finished_at = time.monotonic()

    def close(self) -> None:
        self.sessions.close()
        if self.run:
            if not self.served:
                self.run.rest()
            self.run.kernel.close()

    def head_weights(self, session: Session) -> bytes:
        """The weights that the device's head starts from (TRAIN) or ended with (USE, if published)."""
        if not session.trains:
            return self.served.head if self.served else b""
        return self._first_head


def _check_same(session: Session, run: LiveRun) -> None:
    """SessionError where another device has begun the run anew since this one began it and made no step."""
    if session.run_id != run.run_id:
        raise SessionError("another device has begun this run since; open another session")


def _check_whole(training: Training) -> None:
    if training.spoiled:
        raise SessionError("a step failed half-way, and the run goes on from a checkpoint; open another session")
