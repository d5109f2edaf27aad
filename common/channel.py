"""gRPC options with the reason beside each, and addresses. Both sides take theirs from here, so they fit."""

from __future__ import annotations

import ipaddress
import os
import sys

import grpc

from common.errors import DepruneError
from common.tls import Access
from common.wire import FRAME_BYTES

# A frame's data, and room for the rest of its message; anything larger is refused before it is read.
_MESSAGE_BYTES = FRAME_BYTES + (64 << 10)
_PING_EVERY_MS = 10_000
# Where the kernel tells what moves, pulse.py finds a dead link, and this only what that has overlooked: for on a slow
# link with a long queue a ping, or the kernel's own confirmation, waits behind a whole frame; patience with these can't
# be short. Elsewhere it is all there is. gRPC waits for the answer to a ping as long as `ping_timeout` says, which is a
# minute unless set; `keepalive_timeout` is the kernel's patience with what isn't confirmed (TCP_USER_TIMEOUT).
_PATIENCE_MS = 120_000 if sys.platform.startswith("linux") else 10_000
# Deadline of the unary handshake; streams have keepalive instead, for on a slow link a step may take minutes.
HANDSHAKE_S = 25.0
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")

_SHARED: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", _PATIENCE_MS),
    ("grpc.http2.ping_timeout_ms", _PATIENCE_MS),
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
    # Devices ping every 10 s; a server that allows less than that would throw them out as too chatty (GOAWAY).
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_EVERY_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    # A device needs four at most; the server's own count of a caller's calls is only made once one has come in.
    ("grpc.max_concurrent_streams", 16),
    # What connects and doesn't speak HTTP/2, or TLS, is let go after this long.
    ("grpc.server_handshake_timeout_ms", 20_000),
    # A second server on the same port is a mistake, to be told at once.
    ("grpc.so_reuseport", 0),
]


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT as host and port; brackets around an IPv6 host are kept, as gRPC wants them."""
    if address.startswith(("http://", "https://")):
        raise DepruneError(f"{address!r} is a web page's address; give HOST:PORT, such as 127.0.0.1:50051")
    host, separator, port = address.rpartition(":")
    if not separator or not host or not (port.isascii() and port.isdecimal()):
        raise DepruneError(f"{address!r} is not HOST:PORT, such as 127.0.0.1:50051")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise DepruneError(f"{address!r} has an IPv6 address without brackets; write [{host}]:{port}")
    if bracketed and ":" not in host:
        raise DepruneError(f"{address!r} has brackets around what is no IPv6 address; write {host.strip('[]')}:{port}")
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


def connect(address: str, access: Access) -> grpc.Channel:
    """A channel to HOST:PORT; with TLS only to servers whose certificate the device's authority signed."""
    host, _ = parse_address(address)
    credentials = access.credentials()
    # A proxy is for what lies outside; gRPC would ask it for this very machine too.
    options = [*DEVICE_OPTIONS, ("grpc.enable_http_proxy", int(not is_loopback(host)))]
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


def proxy(address: str) -> str:
    """The variable of the environment that has gRPC call HOST:PORT through a proxy; "" where none does."""
    host, _ = parse_address(address)
    return "" if is_loopback(host) else next((name for name in _PROXIES if os.environ.get(name)), "")
