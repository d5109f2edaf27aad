"""TLS on both sides: certificates, keys and authorities, read from files and checked before gRPC gets them."""

from __future__ import annotations

import ssl
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
from common.errors import AuthError, printable
from common.reloaded import Reloaded
from common.words import some

_LOOK_S = 5.0  # for a server's certificate, to tell what is wrong with it
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


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
        since, now = certificates(read(self.tls_ca), self.tls_ca)[0].not_valid_before_utc, datetime.now(UTC)
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


def presented(host: str, port: int) -> str:
    """Words for whom the certificate that is shown there is made out to, and until when; "" where none is seen soon."""
    try:
        shown = ssl.get_server_certificate((host.strip("[]"), port), timeout=_LOOK_S)
        first = x509.load_pem_x509_certificate(shown.encode())
        names = _extension(first, x509.SubjectAlternativeName)
        made_for = [str(name.value) for name in names or ()]
    except Exception:  # noqa: BLE001 -- it is no certificate to rely on, and may be odd in any way
        return ""
    whom = printable(some(made_for), 200) or "no host name"
    return f"it shows one for {whom}, valid to {first.not_valid_after_utc:%Y-%m-%d}"


def _pair(certificate: Path, key: Path, purpose: x509.ObjectIdentifier) -> tuple[bytes, bytes]:
    """Key and certificate (PEM) as gRPC wants them; AuthError where they are damaged, run out, not of one pair or not
    for this `purpose`.

    gRPC itself would only print lines of its own and refuse every connection.
    """
    chain, secret = read(certificate), read(key)
    first = certificates(chain, certificate)[0]
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
    data = read(path)
    for certificate in certificates(data, path):
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


def certificates(data: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise AuthError(f"{path} holds no certificate (PEM)") from error


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AuthError(f"{path} cannot be read: {error.strerror}") from error
