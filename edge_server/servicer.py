"""The RPC methods: unpack, delegate to host and session, pack. Every error of ours leaves here as a gRPC status."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from rich.markup import escape

from common import wire
from common.errors import DepruneError, FrameError, VersionError, abort
from common.meter import DOWN, UP
from common.phase_message import phase_message
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from common.wire import Place
from edge_server.evaluate_stream import evaluate
from edge_server.host import Host
from edge_server.identity import Guard
from edge_server.incoming import Incoming
from edge_server.train_stream import TrainStream


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


class Servicer(split_pb2_grpc.SplitServicer):
    def __init__(self, host: Host, guard: Guard | None = None) -> None:
        self.host = host
        self._identity = (guard or Guard()).identity

    def fail(self, context: grpc.ServicerContext, error: Exception) -> None:
        """End the RPC: an error of ours with its own sentence, a fault with a traceback for the operator alone."""
        if isinstance(error, DepruneError):
            self.host.console.print(f"[yellow]Refused[/yellow]: {escape(str(error))}", highlight=False)
            abort(context, error)
        self.host.console.print("".join(traceback.format_exception(error)), markup=False)
        context.abort(grpc.StatusCode.INTERNAL, "the server met a fault of its own; its log has the details")

    @_unary
    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
        identity = self._identity(context)
        if request.protocol_version != wire.PROTOCOL_VERSION:
            raise VersionError(
                f"the device speaks protocol version {request.protocol_version}, this server {wire.PROTOCOL_VERSION}; "
                f"install the same release of deprune on both"
            )
        if wire.opened(request).purpose not in (pb.TRAIN, pb.USE):
            raise FrameError(f"Open has purpose {request.purpose}; TRAIN (1) or USE (2) was expected")
        host, trains = self.host, request.purpose == pb.TRAIN
        session, step = host.open(trains, request.run_id, tuple(request.kept), identity)
        session.seen(context.peer())
        back = trains and bool(request.run_id)
        reply = pb.OpenReply(
            protocol_version=wire.PROTOCOL_VERSION,
            session=session.name,
            recipe=host.text,
            digest=host.recipe.digest(),
            run_id=host.run_id,
            phase=phase_message(host.served.manifest.phase) if host.served else None,
            limits=pb.Limits(max_frame_bytes=wire.FRAME_BYTES, max_tensor_elements=wire.MAX_TENSOR_ELEMENTS),
            head_size=0 if request.run_id else len(host.head_weights(session)),
            init_run_id=host.run.initial.run_id if host.run and trains and not back else "",
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
        session = self.host.session(request.session, self._identity(context))
        meter, again = session.meter, session.head_sent
        session.head_sent = True
        meter.control(UP, request, again)
        frames = list(wire.pack_bytes(Place(pb.WEIGHTS, 0, 0), self.host.head_weights(session)))
        for frame in frames:
            (meter.again if again else meter.frame)(DOWN, frame)
        yield from frames

    @_streaming
    def Train(self, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        receive = Incoming(frames, self.host, context.peer(), self._identity(context))
        session = receive.session
        begun = self.host.begin(session, receive.begin, context)
        assert session.run
        session.streams += 1
        try:
            yield from TrainStream(self.host, session.run, receive).frames(begun)
        finally:
            receive.draft.drop()
            session.streams -= 1
            session.run.part(context)

    @_streaming
    def Evaluate(self, frames: Iterator[pb.Frame], context: grpc.ServicerContext) -> Iterator[pb.Frame]:
        receive = Incoming(frames, self.host, context.peer(), self._identity(context))
        session, served = receive.session, self.host.served
        run = None if served else session.run
        if run is None and served is None:
            raise FrameError("Evaluate needs a training session, or a server with a finished run")
        if run:
            run.join(context)
        session.streams += 1
        try:
            training = run.training if run else None
            with training.lock if training else contextlib.nullcontext():
                yield from evaluate(self.host, receive, training)
        finally:
            receive.draft.drop()
            session.streams -= 1
            if run:
                run.part(context)
            elif not session.trains:
                self.host.leave(session)
