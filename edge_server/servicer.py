"""The RPC methods: unpack, delegate to host and session, pack. Every error of ours leaves here as a gRPC status."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import Any
from urllib.parse import unquote

import grpc
from rich.markup import escape

from common import wire
from common.errors import (
    SAME_RELEASE,
    DepruneError,
    DivergedError,
    FaultError,
    FrameError,
    SessionError,
    StoppedError,
    VersionError,
    printable,
)
from common.meter import DOWN, UP
from common.phase_message import phase_message
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from common.rpc_errors import abort
from common.wire import Place
from common.words import several, size
from edge_server.bucket import Bucket
from edge_server.evaluate_stream import evaluate
from edge_server.host import Host
from edge_server.identity import Guard
from edge_server.incoming import LOST, Incoming
from edge_server.sessions import Session
from edge_server.train_stream import TrainStream
from edge_server.watch import Watched


def _unary(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(self: Servicer, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except Exception as error:  # noqa: BLE001 -- the last stop before gRPC, which would only print it
            return self.fail(context, error)

    return guarded


def _streaming(method: Callable[..., Iterator[pb.Frame]]) -> Callable[..., Iterator[pb.Frame]]:
    @functools.wraps(method)
    def guarded(self: Servicer, request: Any, context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        try:
            yield from method(self, request, context)
        except grpc.RpcError:
            return  # the device is gone; there is no one to tell, and the host has been told by the method
        except Exception as error:  # noqa: BLE001 -- as above
            self.fail(context, error)

    return guarded


def _address(context: grpc.ServicerContext) -> str:
    """Of whoever calls, as a log shows it."""
    return unquote(context.peer()).partition(":")[2]


SERVICE = pb.DESCRIPTOR.services_by_name["Split"].full_name


class Servicer(split_pb2_grpc.SplitServicer):
    def __init__(self, host: Host, guard: Guard | None = None) -> None:
        self.host = host
        self._guard = guard or Guard()
        self._identity = self._guard.identity
        # The log is read by a person and lies on a disk: many refusals must not become as many lines.
        self._lines, self._untold = Bucket(1.0, 30.0), 0
        self._faults = Bucket(0.1, 10.0)

    def fail(self, context: grpc.ServicerContext, error: Exception) -> None:
        """End the RPC: an error of ours with its own sentence, a fault with a traceback for the operator alone."""
        if isinstance(error, DepruneError):
            # That the server is being stopped need not be told to the operator, who stopped it.
            if not (self.host.stopping and isinstance(error, StoppedError)):
                self._tell(error, context)
            abort(context, error)
        if self._faults.spare(1.0):
            self.host.console.print("".join(traceback.format_exception(error)), markup=False)
        abort(context, FaultError("the server met a fault of its own; its log has the details"))

    def _tell(self, error: DepruneError, context: grpc.ServicerContext) -> None:
        where = _address(context)
        if not where and isinstance(error, StoppedError):
            return  # the server has ended the stream itself, and has said why
        if not self._lines.spare(1.0):
            self._untold += 1
            return
        untold, self._untold = self._untold, 0
        more = f" (and {untold:,} more since the last of these lines)" if untold else ""
        kind = "Note" if isinstance(error, StoppedError | SessionError) else "Refused"
        kind = "Stopped" if isinstance(error, DivergedError) else kind
        text = str(error)
        if isinstance(error, SessionError):  # whose sentence is for the device
            text = "a device came with a session of an earlier start, or one idle too long; it opens another by itself"
            if self.host.run and self.host.run.training and self.host.run.training.spoiled:
                text = "a step has failed half-way; its device goes back to a checkpoint by itself"
        # A sentence may quote what came, which may be long.
        self.host.console.print(
            f"[yellow]{kind}[/yellow]{more}: {escape(printable(text, 500))} ({where})", highlight=False
        )

    def _tell_come(self, alone: float, context: grpc.ServicerContext) -> None:
        """A device that may begin the run is there, and may take long to: its head may learn for `alone` epochs."""
        if self._lines.spare(1.0):
            first = f"; its head learns alone first, for {several(alone, 'epoch')}, unless it has" if alone else ""
            self.host.console.print(f"A device has asked for the recipe ({_address(context)}){first}.", highlight=False)

    def _tell_use(self, session: Session, pictures: int, judged: bool) -> None:
        """What a finished run was used for."""
        if self._lines.spare(1.0):
            who, sent = escape(session.identity) or "A device", session.meter.total(UP).message
            what = f"had {several(pictures, 'picture')} {'judged' if judged else 'named'}"
            self.host.console.print(f"{who} {what}: {size(sent)} up.", highlight=False)

    @_unary
    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
        identity = self._identity(context)
        if request.protocol_version != wire.PROTOCOL_VERSION:
            raise VersionError(
                f"the device speaks protocol version {request.protocol_version}, this server {wire.PROTOCOL_VERSION}; "
                f"{SAME_RELEASE}"
            )
        if wire.unsealed(request).purpose not in (pb.TRAIN, pb.USE):
            raise FrameError(f"Open has purpose {request.purpose}; TRAIN (1) or USE (2) was expected")
        host, trains = self.host, request.purpose == pb.TRAIN
        session, step = host.open(trains, request.run_id, tuple(request.kept), identity, self._guard.caller(context))
        session.seen(context.peer())
        back = trains and bool(request.run_id)
        if trains and not back and host.run:
            self._tell_come(host.recipe.local.epochs, context)
        reply = pb.OpenReply(
            protocol_version=wire.PROTOCOL_VERSION,
            session=session.name,
            recipe=host.text,
            digest=host.recipe.digest(),
            run_id=host.run_id,
            phase=phase_message(host.served.manifest.phase) if host.served else None,
            limits=pb.Limits(max_tensor_elements=host.limits.elements),
            head_size=0 if request.run_id else len(host.head_weights(session)),
            init_run_id=host.run.initial.run_id if host.run and host.run.initial and trains and not back else "",
            classes=host.served.manifest.classes if host.served else (),
            resumed=session.run is not None,
            step=step,
            finished=trains and host.served is not None,
            checkpoint_every=host.run.every if host.run else 0,
        )
        session.meter.control(UP, request, again=back)
        session.meter.control(DOWN, wire.seal(reply), again=back)
        return reply

    @_streaming
    def Head(self, request: pb.HeadRequest, context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        session = self.host.sessions.get(request.session, self._identity(context))
        head = self.host.head_weights(session)

        def frames() -> Generator[pb.Frame, None, None]:
            """Made one by one as they are sent: a caller that does not read keeps none in memory."""
            yield from wire.pack_bytes(Place(pb.WEIGHTS, 0, 0), head)

        session.book_head(frames())
        with self.host.watch.over(context) as stream:
            stream.session = session
            yield from stream.sending(frames())

    @_streaming
    def Train(self, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        with self.host.watch.over(context) as stream:
            receive = self._incoming(frames, stream)
            session = receive.session
            begun = self.host.begin(session, receive.begin, context)
            assert session.run
            lost = True
            try:
                with session.streaming():
                    yield from stream.sending(TrainStream(self.host, session.run, receive).frames(begun))
                lost = False
            except DepruneError:
                lost = False  # told as what it is
                raise
            finally:
                receive.draft.drop()
                session.run.part(context)
                if lost and not context.is_active() and not self.host.stopping:
                    self._tell(StoppedError(LOST), context)

    @_streaming
    def Evaluate(self, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        with contextlib.ExitStack() as stack:
            stream = stack.enter_context(self.host.watch.over(context))
            receive = self._incoming(frames, stream)
            session, served = receive.session, self.host.served
            run = None if served else session.run
            if run is None and served is None:
                raise FrameError("Evaluate needs a training session, or a server with a finished run")
            training = None
            if run:
                training = stack.enter_context(self.host.judging(session, context))
            else:
                stack.enter_context(self.host.callers.evaluation(session.caller))
                if session.trains:
                    stack.enter_context(self.host.telling())
                else:
                    stack.callback(self.host.sessions.leave, session)
            stack.enter_context(session.streaming())
            stack.callback(receive.draft.drop)
            yield from stream.sending(evaluate(self.host, receive, training, self._tell_use))

    def _incoming(self, frames: Iterator[pb.Frame], stream: Watched) -> Incoming:
        context = stream.context
        caller = self.host.callers[self._guard.caller(context)]
        return Incoming(frames, self.host, stream, self._identity(context), caller)
