"""gRPC options with the reason beside each, and TLS. Both sides take theirs from here, so they fit."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

from common import tokens
from common.errors import AuthError, DepruneError
from common.reloaded import Reloaded
from common.wire import FRAME_BYTES

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)

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


@dataclass(frozen=True)
class Access:
    """How a device reaches its server. Files, and not what is in them: they are read anew at each connection."""

    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise AuthError("--tls-cert and --tls-key go together")
        if self.tls_cert and not self.tls_ca:
            raise AuthError("--tls-cert needs --tls-ca as well: the authority that the server's certificate is from")

    @property
    def doubt(self) -> str:
        """What may be amiss with it where a server closes the connection at once, which TLS itself doesn't tell."""
        if not self.tls_ca:
            return "if it speaks TLS, pass --tls-ca"
        if not self.tls_cert:
            return "it may want a certificate: pass --tls-cert and --tls-key"
        return f"it may not accept {self.tls_cert}, which must be of the authority that it trusts"

    @property
    def clock(self) -> str:
        """Words for a clock that is behind, as a small board's is until the network has set it; "" where it isn't."""
        if not self.tls_ca:
            return ""
        since, now = _certificates(_read(self.tls_ca), self.tls_ca)[0].not_valid_before_utc, datetime.now(UTC)
        if since <= now:
            return ""
        return f"this device's clock says {now:%Y-%m-%d}, and {self.tls_ca} is valid from {since:%Y-%m-%d} on: set it"

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Of a connection that is made now; None: in the clear."""
        token = tokens.own(self.token_file)
        if not self.tls_ca:
            if token:
                raise AuthError(
                    f"a token is only sent over TLS: give --tls-ca, or leave out --token-file and {tokens.VARIABLE}"
                )
            return None
        key, certificate = None, None
        if self.tls_cert and self.tls_key:
            key, certificate = _pair(self.tls_cert, self.tls_key, ExtendedKeyUsageOID.CLIENT_AUTH)
        tls = grpc.ssl_channel_credentials(_authority(self.tls_ca), key, certificate)
        if not token:
            return tls
        # gRPC sends it as `authorization: Bearer`, once the server has proved who it is.
        return grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(token))


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


@dataclass(frozen=True)
class ServerTls:
    """A server's certificate and key, and the authority of its devices' certificates where they must have one."""

    cert: Path
    key: Path
    client_ca: Path | None = None


def server_credentials(tls: ServerTls, tell: Callable[[str], None]) -> grpc.ServerCredentials:
    """Credentials that follow their files: a new connection gets what lies there now, if it can be used."""

    def load() -> grpc.ServerCertificateConfiguration:
        pair = _pair(tls.cert, tls.key, ExtendedKeyUsageOID.SERVER_AUTH)
        return grpc.ssl_server_certificate_configuration([pair], _authority(tls.client_ca) if tls.client_ca else None)

    paths = [tls.cert, tls.key, *([tls.client_ca] if tls.client_ca else [])]
    newest = Reloaded(paths, load, tell)
    given = first = newest()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC for every connection; None: as before."""
        nonlocal given
        before, given = given, newest()
        return None if given is before else given

    return grpc.dynamic_ssl_server_credentials(first, changed, tls.client_ca is not None)  # type: ignore[arg-type]


def _pair(certificate: Path, key: Path, purpose: x509.ObjectIdentifier) -> tuple[bytes, bytes]:
    """Key and certificate (PEM) as gRPC wants them; AuthError where they are damaged, run out, not of one pair or not
    for this `purpose`.

    gRPC itself would only print lines of its own and refuse every connection.
    """
    chain, secret = _read(certificate), _read(key)
    first = _certificates(chain, certificate)[0]
    try:
        public = serialization.load_pem_private_key(secret, None).public_key()
    except TypeError as error:
        raise AuthError(f"the key {key} is encrypted; it must be without a passphrase") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise AuthError(f"{key} holds no private key (PEM)") from error
    if public != first.public_key():
        raise AuthError(f"{key} is not the key of {certificate}")
    if first.not_valid_after_utc < datetime.now(UTC):
        raise AuthError(f"{certificate} ran out on {first.not_valid_after_utc:%Y-%m-%d}; renew it")
    allowed = _extension(first, x509.ExtendedKeyUsage)
    if allowed and not {purpose, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & set(allowed):
        mine, other = ("server", "device") if purpose == ExtendedKeyUsageOID.SERVER_AUTH else ("device", "server")
        raise AuthError(f"{certificate} is not for a {mine}; it may be a {other}'s: give the {mine}'s own")
    return secret, chain


def _authority(path: Path) -> bytes:
    data = _read(path)
    for certificate in _certificates(data, path):
        limits = _extension(certificate, x509.BasicConstraints)
        # One that has signed itself may be trusted as it is.
        if limits and not limits.ca and certificate.issuer != certificate.subject:
            raise AuthError(f"{path} is no authority's certificate but one that an authority signed; give its ca.pem")
    return data


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _certificates(data: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise AuthError(f"{path} holds no certificate (PEM)") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AuthError(f"{path} cannot be read: {error.strerror}") from error
