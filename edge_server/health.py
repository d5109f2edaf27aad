"""Health of the server (grpc.health.v1), for load balancers and orchestrators. Served by server.py."""

from __future__ import annotations

from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


class Health(health_pb2_grpc.HealthServicer):
    """Answers Check, for `services` and for "", the whole of them.

    Not Watch, and not the library's servicer, which sends to all who watch while it holds its one lock: a caller that
    reads nothing would hold up every other, and the server's stop.
    """

    def __init__(self, services: tuple[str, ...], stopping: Callable[[], bool]) -> None:
        self._services, self._stopping = services, stopping

    def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in ("", *self._services):
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:100]!r} here")
        answer = health_pb2.HealthCheckResponse
        return answer(status=answer.NOT_SERVING if self._stopping() else answer.SERVING)

    def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server answers Check, not Watch")
