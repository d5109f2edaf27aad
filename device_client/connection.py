"""A device's session with its server, kept up over as many connections as it takes.

Handshake, the training stream, and what is done where it breaks: connect again, say at which step the device stands,
go on. What crosses the stream is remote_tail.py's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import grpc
import numpy as np

from common import channel, tls, wire
from common.errors import (
    SAME_RELEASE,
    AbsentError,
    AuthError,
    BusyError,
    ClockError,
    CodecError,
    DepruneError,
    FrameError,
    LinkError,
    MismatchError,
    RolledBackError,
    SessionError,
    StoppedError,
    UntrustedError,
    VersionError,
)
from common.meter import DOWN, UP, Draft, Meter
from common.pulse import STALLED_S
from common.report import Faults
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from common.rpc_errors import from_rpc, was_sent
from common.tcp_info import Kernel, KernelBytes, find_server
from common.wire import Place
from common.words import gives_up
from device_client.handshake import Opened, opened_by
from device_client.link import CURABLE, Backoff, Came, Stream

GIVE_UP_S = 600.0

T = TypeVar("T")


class Connection:
    """A session with one server, from `open` to `close`; `stub` is given where no network lies in between."""

    def __init__(
        self, server: str, access: tls.Access | None = None, stub: Any = None, give_up_s: float = GIVE_UP_S,
        stalled_s: float = STALLED_S,
    ) -> None:  # fmt: skip
        """`give_up_s`: how long to go on trying where the link breaks in training. `stalled_s`: how long to wait for an
        answer of a server that is there, while nothing moves on the link.
        """
        self.server, self.give_up_s, self._stalled_s = server, give_up_s, stalled_s
        self.meter, self.kernel, self.faults = Meter(), Kernel(), Faults()
        self.opened: Opened
        # Set by whoever shows progress, and by whoever keeps checkpoints.
        self.say: Callable[[str], None] = lambda text: None
        self.kept: Callable[[], Sequence[int]] = lambda: ()
        self.leaving: Callable[[], bool] = lambda: False  # whether the user has stopped the run
        self.offline = False  # waiting for a connection at this moment
        self._access = access or tls.Access()
        self._channel: grpc.Channel | None = None
        self._stub: Any = stub
        if stub is None:
            self._connect()
        self._train: Stream | None = None
        self._came = Came()  # on the newest stream, Begin and Ready aside: whether an attempt got anywhere
        self._begun: pb.Begin | None = None  # what every Begin of the run has in common; None before the first
        self._joined = False  # the server has confirmed that the run has begun
        self._ready: pb.Ready
        # Where a run starts from principal components: sent once on each stream on which the server still wants them.
        self._basis: Sequence[pb.Frame] = ()
        self._basis_on: Stream | None = None  # the newest stream that it was sent on
        self._basis_booked = False  # the books have it: what is sent from now on is sent again
        self._channels = 0  # of the cut
        self._sensitivity: np.ndarray | None = None  # [C, C], came with Ready; by which the basis is to be weighted
        self._answered = 0  # answers still to come to steps that were sent on an earlier stream
        self._wait_s = 0.0  # on streams before this one

    def _connect(self) -> None:
        """A connection of our own making: gRPC's way to get one back takes minutes where a link was gone for long."""
        if self._channel:
            self._channel.close()
        self._channel = channel.connect(self.server, self._access)
        self._stub = split_pb2_grpc.SplitStub(self._channel)

    def take_up(self, kernel: Mapping[str, int] | None, faults: Mapping[str, int]) -> None:
        """Add to what an earlier process of this run has counted."""
        self.kernel.carry(KernelBytes(**kernel) if kernel else None)
        self.faults = Faults(**faults)

    # Handshake

    def open(self, trains: bool, run_id: str = "", kept: Sequence[int] = (), wait_s: float = 0.0) -> Opened:
        """Handshake; checks version and digest before anything is believed.

        `run_id`: of the run that the device's half belongs to, in training with the steps that it can go on from.
        `wait_s`: how long to keep trying while no server answers yet.
        """
        request = pb.OpenRequest(
            protocol_version=wire.PROTOCOL_VERSION, purpose=pb.TRAIN if trains else pb.USE, run_id=run_id, kept=kept
        )
        reply = self._first_handshake(request, trains, wait_s)
        self.opened = opened_by(reply, trains, self.server)
        self._joined = reply.resumed or reply.finished
        return self.opened

    def _first_handshake(self, request: pb.OpenRequest, trains: bool, wait_s: float) -> pb.OpenReply:
        """The server's answer, for which is waited up to `wait_s`: it may not be up yet."""
        backoff, told = Backoff(wait_s), False
        while True:
            try:
                return self._handshake(request, again=trains and bool(request.run_id))
            except (LinkError, FrameError, ClockError, StoppedError, BusyError) as error:
                # A server that is full, or trains, is not waited for here in two cases: who uses a run does so itself
                # (use.patiently), and as long as another device trains the run there is no knowing how long it takes.
                full = isinstance(error, BusyError) and (not trains or error.retry_after_s is None)
                if wait_s <= 0 or full:
                    if isinstance(error, AbsentError):
                        raise AbsentError(f"{error}, or give it time with --wait SECONDS") from error
                    raise
                if not told:
                    self.say(f"{error}; waiting, {gives_up(wait_s)}")
                    told = True
                backoff.wait(error, lambda text: None)
                self._connect()

    def _handshake(self, request: pb.OpenRequest, again: bool) -> pb.OpenReply:
        try:
            reply = self._stub.Open(wire.seal(request), timeout=channel.HANDSHAKE_S)
        except grpc.RpcError as error:
            if was_sent(error):
                self.meter.control(UP, request, again=True)
            raise self._told(from_rpc(error, self.server, self._access.doubt)) from error
        if reply.protocol_version != wire.PROTOCOL_VERSION:
            raise VersionError(
                f"the server speaks protocol version {reply.protocol_version}, this device {wire.PROTOCOL_VERSION}; "
                f"{SAME_RELEASE}"
            )
        self._find_connection()
        try:
            sound = wire.unsealed(reply)
        except CodecError:
            self.meter.control(UP, request, again=True)  # it will be asked anew
            raise
        self.meter.control(UP, request, again)
        self.meter.control(DOWN, sound, again)
        return reply

    def _told(self, error: DepruneError) -> DepruneError:
        """`error` of a handshake, with what only this side can know of its cause."""
        if isinstance(error, AuthError) and (behind := self._access.clock):
            return ClockError(behind)
        if isinstance(error, UntrustedError) and not channel.proxy(self.server):  # which we would go past
            shown = tls.presented(*channel.parse_address(self.server))
            return UntrustedError(f"{error}; {shown}") if shown else error
        if isinstance(error, AbsentError) and (proxy := channel.proxy(self.server)):
            return AbsentError(f"{error} ({proxy} has it called through a proxy; name it in no_proxy to go direct)")
        return error

    def _find_connection(self) -> None:
        """Count the connection that we are on now: gRPC makes a new one where the last was lost between streams."""
        if self._channel:
            self.kernel.add(find_server(self.server))

    def head_weights(self) -> bytes:
        """safetensors bytes of the head, as the server hands them out."""
        if self.opened.phase:  # of a finished run that is used: its user tries again
            return self._head_weights(again=False)

        def attempt(failed: type[DepruneError] | None) -> bytes:
            if failed is SessionError:
                self._reopen(0)
            return self._head_weights(again=failed is not None)

        return self._over_connections(attempt)

    def _head_weights(self, again: bool) -> bytes:
        request = pb.HeadRequest(session=self.opened.session)
        self.meter.control(UP, request, again)
        with Draft(self.meter) as draft:
            receive = partial(self._open_stream(lambda _: self._stub.Head(request)).receive, draft)
            result = wire.unpack_bytes(receive(), receive, Place(pb.WEIGHTS, 0, 0), self.opened.head_size)
            draft.keep()
            return result

    # Training: the stream

    def begin(
        self, samples: int, classes: tuple[str, ...], step: int = 0, judged: tuple[int, int] = (0, 0), head: int = 0,
        channels: int = 0,
    ) -> tuple[pb.Ready, np.ndarray | None]:  # fmt: skip
        """Start the training stream at `step`: the server's answer, whether a basis is wanted and the phase, and the
        sensitivity [C, C] by which the basis is to be weighted, where it told one.

        `judged`: how many pictures each validation has, and the test at the end. `head`: bytes of the trained head,
        where it is to be published. `channels` of the cut, and so of the sensitivity that may come.

        A run that is finished has no such stream any more; what is left to do needs none.
        """
        self._channels = channels
        self._begun = pb.Begin(samples=samples, classes=classes, validation=judged[0], test=judged[1], head=head)
        if self.opened.finished:
            return pb.Ready(), None
        answer = self._steadily(step, lambda: (self._ready, self._sensitivity))
        self._sensitivity = None  # megabytes, where there are many channels
        return answer

    def _steadily(self, step: int, attempt: Callable[[], T]) -> T:
        """What `attempt` comes to on the run's stream, which is opened again each time that it breaks.

        The device stands at `step`. A finished run has no stream any more: what is left to do needs its session alone.
        """

        def on_stream(failed: type[DepruneError] | None) -> T:
            if not self.opened.finished and self._train is None:
                self._join(step, again=failed is not None)
            elif self.opened.finished and failed is SessionError:
                self._reopen(step)
            return attempt()

        return self._over_connections(on_stream)

    def _over_connections(self, attempt: Callable[[type[DepruneError] | None], T]) -> T:
        """What `attempt` comes to; tried again, over a new connection each time, where that may cure its error.

        `attempt` is given the kind of error that its last try ended with; None at first.
        """
        backoff: Backoff | None = None
        failed: type[DepruneError] | None = None
        try:
            while True:
                try:
                    if failed:  # inside the try: while certificates are being exchanged, this may fail for a moment too
                        self._connect()
                    return attempt(failed)
                except CURABLE as error:
                    moved = self._came.frames > 0
                    self._lose()
                    if self.leaving():
                        raise KeyboardInterrupt from error
                    if self._channel is None:  # there is no network in between that could fail
                        raise
                    backoff, failed = backoff or Backoff(self.give_up_s), type(error)
                    self.offline = True
                    backoff.wait(error, self.say, moved)
        finally:
            self.offline = False

    def _lose(self) -> None:
        """The stream is broken, or not to be trusted any more."""
        if self._train:
            self._wait_s += self._train.wait_s
            self._train.close()
        self._train = None
        self._came = Came()

    def _join(self, step: int, again: bool) -> None:
        """Open a stream for the run, on this session or on a new one where the server knows it no more."""
        try:
            self._start(step)
        except SessionError:
            self._lose()
            if not self._reopen(step):
                return
            self._start(step)
        self.offline = False
        if again:
            self.faults.reconnects += 1
            self.say(f"connected again, at step {step:,}")

    def _start(self, step: int) -> None:
        """Open a stream and begin on it: Begin, Ready, and the basis where that is wanted."""
        assert self._begun
        stream = self._train = self._open_stream(self._stub.Train)
        begin = pb.Begin(session=self.opened.session, step=step)
        begin.MergeFrom(self._begun)
        frame = wire.seal(Place(pb.CONTROL, 0, 0).frame(begin=begin))
        with Draft(self.meter) as draft:
            stream.send(draft.frame(UP, frame))
            ready: pb.Ready = wire.body(stream.receive(draft), "ready")
            self._sensitivity = self._receive_sensitivity(stream, draft) if ready.sensitivity_follows else None
            # The books have one Begin and Ready of a run, its first; on a reconnect they count as sent again.
            if not self._joined:
                draft.keep()
        self._joined, self._ready, self._answered = True, ready, ready.answered
        self.opened = replace(self.opened, run_id=ready.run_id)
        self._came.frames = 0  # Ready is nothing yet of the answer that is waited for
        self._find_connection()
        self._bring_basis()

    def _receive_sensitivity(self, stream: Stream, draft: Draft) -> np.ndarray:
        """What the server has noted of the run before [C, C]."""
        receive = partial(stream.receive, draft)
        came = wire.unpack(receive(), receive, Place(pb.WEIGHTS, 0, 0), (self._channels, self._channels), "fp32")
        if not np.allclose(came, came.T) or not came.trace() > 0:
            raise FrameError("the sensitivity that came is not symmetric and positive: nothing can be weighted by it")
        return came

    def _bring_basis(self) -> None:
        """Send the basis where the server has not got it and this stream has not brought it."""
        if self._ready.basis_wanted and self._basis and self._basis_on is not self._train:
            self._send(self._basis, self._basis_booked)
            self._basis_booked, self._basis_on = True, self._train

    def _open_stream(self, call: Callable[..., Any]) -> Stream:
        stream = Stream(call, self.server, self._stalled_s, watched=self._channel is not None)
        self._came = stream.came
        return stream

    def _reopen(self, step: int) -> bool:
        """Open a new session of the same run; False where the run was finished meanwhile.

        RolledBackError where it goes on from another step than the device stands at.
        """
        request = pb.OpenRequest(protocol_version=wire.PROTOCOL_VERSION, purpose=pb.TRAIN)
        if self._joined:
            request.run_id = self.opened.run_id
            request.kept.extend([*self.kept(), step])
        reply = self._handshake(request, again=True)
        same_run = not self._joined or reply.run_id == self.opened.run_id
        if reply.digest != self.opened.recipe.digest() or not same_run:
            raise MismatchError(f"the server at {self.server} has another run now; start this one's server again")
        self.opened = replace(
            self.opened, session=reply.session, finished=reply.finished,
            checkpoint_every=reply.checkpoint_every or self.opened.checkpoint_every,
            max_elements=reply.limits.max_tensor_elements,
        )  # fmt: skip
        if reply.resumed and reply.step != step:
            raise RolledBackError(
                "the server goes on from its checkpoint of that step, and the device with it", reply.step
            )
        return not reply.finished

    def _send(self, frames: Sequence[pb.Frame], booked: bool) -> None:
        """Send frames, which the books are to have once; `booked`: they have them from an earlier attempt."""
        for frame in frames:
            self._stream.send(self.meter.frame(UP, frame, again=booked))

    @property
    def _stream(self) -> Stream:
        if self._train is None and self.opened.finished:
            raise MismatchError(
                f"run {self.opened.run_id} was finished meanwhile by a device with a copy of this folder; the trained "
                f"head is there"
            )
        assert self._train is not None, "begin comes first"
        return self._train

    @property
    def _waited(self) -> float:
        return self._wait_s + (self._train.wait_s if self._train else 0.0)

    def close(self) -> None:
        self._lose()
        self.kernel.close()
        if self._channel:
            self._channel.close()
