"""Build the gRPC server around a host, start it, wait, and stop it cleanly on SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common import signals, tokens
from common.channel import SERVER_OPTIONS
from common.errors import DepruneError
from common.rpc import split_pb2_grpc
from common.tls import ServerTls, server_credentials
from edge_server.address import require_free
from edge_server.health import Health
from edge_server.host import Host
from edge_server.identity import Guard
from edge_server.interceptor import Door
from edge_server.servicer import SERVICE, Servicer

# A device gets this long to be told that the server stops, with the answer to its step where one is under way.
_GRACE_S = 5.0
# No step is waited for longer than this.
_STEP_S = 600.0
# A device whose link broke over the last word of a run gets this long to come back and hear it.
_LINGER_S = 60.0


class Server:
    """A host behind an address; `port` is known once it is started."""

    def __init__(
        self, host: Host, address: str, tls: ServerTls | None, insecure: bool, token_file: Path | None
    ) -> None:
        require_free(address, insecure or tls is not None)
        self.host = host
        known = tokens.known(token_file, host.note)
        if known and not tls:
            raise DepruneError(
                f"tokens are only taken over TLS: give --tls-cert and --tls-key too, or leave out --token-file and "
                f"{tokens.VARIABLE}"
            )
        guard = Guard(bool(tls and tls.client_ca), known)
        # A stream holds its thread as long as it lives. What finds none is refused: the queue would have no end.
        calls = host.limits.calls
        pool = ThreadPoolExecutor(calls, thread_name_prefix="rpc")
        door = Door(host, guard)
        self._grpc = grpc.server(pool, interceptors=[door], options=SERVER_OPTIONS, maximum_concurrent_rpcs=calls)
        split_pb2_grpc.add_SplitServicer_to_server(Servicer(host, guard), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(Health((SERVICE,), lambda: host.stopping), self._grpc)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._grpc)
        try:
            if tls:
                self.port = self._grpc.add_secure_port(address, server_credentials(tls, host.note))
            else:
                self.port = self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise DepruneError(f"cannot listen on {address}: is another program using that port?") from error

    def start(self) -> None:
        self._grpc.start()

    def stop(self, at_once: Callable[[], bool]) -> bool:
        """Refuse new work, let a step under way end and its answer go, keep a checkpoint, close: within 10 s of that
        step's end, which is not waited for where `at_once` says so. Whether something is computed still."""
        host = self.host
        host.stopping = True
        ended, started, told = self._grpc.stop(_STEP_S), time.monotonic(), False
        worked = started
        while True:
            time.sleep(0.1)
            now = time.monotonic()
            # Where a device is gone its streams have ended for gRPC, whatever is computed for it.
            if host.at_work:
                worked = now
                if now - started > _GRACE_S and not told:
                    told = True
                    host.console.print("Stopping after this step; stop it again not to wait for that.")
            elif ended.is_set():
                break
            elif now - worked > _GRACE_S:  # a device that does not hear
                ended = self._grpc.stop(0)
            if at_once() or now - started > _STEP_S:
                self._grpc.stop(0).wait()
                break
        computing = host.at_work
        host.close()
        return computing


def run(server: Server, once: bool, started: Callable[[], None]) -> tuple[str, bool]:
    """Serve until a signal, with `once` also until the run's device knows it is finished: the signal's name, "" without
    one, and whether a thread is still at work that was not waited for.

    `started` is called when devices and signals are heard.
    """
    wake = threading.Event()
    caught: list[str] = []

    def on_signal(number: int, _frame: object) -> None:
        caught.append(signal.Signals(number).name)
        wake.set()

    signals.hear(on_signal)
    server.start()
    started()
    host, told = server.host, once
    while not wake.wait(0.2):
        host.tend()
        since = host.finished_at
        if since and not told:
            told = True
            host.console.print("The run is served from now on: device-client evaluate and predict reach it here.")
        if once and since and (host.ended.is_set() or time.monotonic() - since > _LINGER_S):
            break
    computing = server.stop(lambda: len(caught) > 1)
    return caught[0] if caught else "", computing
