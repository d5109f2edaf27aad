"""gRPC options with the reason beside each, and credentials. Both sides take theirs from here, so they fit."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import grpc

from common.errors import DepruneError
from common.wire import FRAME_BYTES

# A frame's data, and room for the rest of its message; anything larger is refused before it is read.
_MESSAGE_BYTES = FRAME_BYTES + (64 << 10)
_PING_EVERY_MS = 20_000
# Deadline of the unary handshake; streams have keepalive instead, for on a slow link a step may take minutes.
HANDSHAKE_S = 30.0

_SHARED: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    # A dead link is found within 30 s, on either side, also while a step is being computed.
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]
DEVICE_OPTIONS = [
    *_SHARED,
    # Its own connection for each channel, so that the kernel's counters are of this session alone.
    ("grpc.use_local_subchannel_pool", 1),
    # A step is applied once: whether to send it again is the session's decision, never the transport's.
    ("grpc.enable_retries", 0),
]
SERVER_OPTIONS = [
    *_SHARED,
    # Devices ping every 20 s; a server that allows less than that would throw them out as too chatty (GOAWAY).
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_EVERY_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    # A second server on the same port is a mistake, to be told at once.
    ("grpc.so_reuseport", 0),
]


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT as host and port; brackets around an IPv6 host are kept, as gRPC wants them."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit():
        raise DepruneError(f"{address!r} is not HOST:PORT, such as 127.0.0.1:50051")
    if int(port) > 65535:
        raise DepruneError(f"{address} has port {port}; ports end at 65535")
    return host, int(port)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def connect(address: str, tls_ca: Path | None = None) -> grpc.Channel:
    """A channel to HOST:PORT; with `tls_ca`, TLS and only servers whose certificate that authority signed."""
    parse_address(address)
    if tls_ca is None:
        return grpc.insecure_channel(address, options=DEVICE_OPTIONS)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(_read(tls_ca)), options=DEVICE_OPTIONS)


def server_credentials(certificate: Path, key: Path) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(_read(key), _read(certificate))])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DepruneError(f"{path} cannot be read: {error.strerror}") from error
