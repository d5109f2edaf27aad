"""What every call passes before its method: a place among its caller's calls, and the wait where those are too many."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from common.errors import BusyError, FrameError
from common.rpc_errors import abort
from edge_server.host import Host
from edge_server.identity import Guard
from edge_server.incoming import hold_up
from edge_server.servicer import SERVICE


class Door(grpc.ServerInterceptor):
    """Every call comes in here, those of health and reflection too: it takes a place of its caller's while it lasts,
    and waits in it where the caller calls too often.
    """

    def __init__(self, host: Host, guard: Guard) -> None:
        self._host, self._guard = host, guard

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The method's handler, behind this door.

        Handlers of one message are made to take a stream too. gRPC would else wait for that message by itself, with a
        thread that no limit of ours counts and no watch ends.
        """
        handler = continuation(details)
        if handler is None:
            return handler
        if handler.response_streaming:
            behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
        else:
            behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary
        if not handler.request_streaming:
            behaviour = self._of_one(behaviour)
        elif not details.method.startswith(f"/{SERVICE}/"):  # streams of ours are watched by their session
            behaviour = self._of_many(behaviour)
        wrap, make = self._single, grpc.stream_unary_rpc_method_handler
        if handler.response_streaming:
            wrap, make = self._streamed, grpc.stream_stream_rpc_method_handler
        return make(wrap(behaviour), handler.request_deserializer, handler.response_serializer)

    def _single(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        def counted(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            with self._place(context):
                return behaviour(requests, context)

        return counted

    def _streamed(self, behaviour: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def counted(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._place(context):
                yield from behaviour(requests, context)

        return counted

    def _of_one(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        """A method of one message, from one that takes a stream; the message is waited for as the first of a stream."""

        def with_request(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            with self._host.watch.over(context) as stream, stream.waiting():
                request = next(requests, None)
            if request is None:
                abort(context, FrameError("a call came without its message"))
            return behaviour(request, context)

        return with_request

    def _of_many(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        """A method of many messages; each is waited for no longer than the first of one of our own streams."""

        def heard(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            with self._host.watch.over(context) as stream:
                while True:
                    with stream.waiting():
                        request = next(requests, None)
                    if request is None:
                        return
                    yield request

        return lambda requests, context: behaviour(heard(requests, context), context)

    @contextlib.contextmanager
    def _place(self, context: grpc.ServicerContext) -> Iterator[None]:
        """One of the caller's places for calls, once it is not over its rate; a refusal where it has none left."""
        with contextlib.ExitStack() as stack:
            try:
                caller = stack.enter_context(self._host.callers.call(self._guard.caller(context)))
            except BusyError as error:
                abort(context, error)
            hold_up(caller.often.take(1), context, self._host)
            yield
