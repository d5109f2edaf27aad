"""A private authority and the certificates that it signs, for `edge-server certs`: ECDSA on P-256, PEM files.

The server's certificate carries its hosts and can only be a server's, a device's carries its name and can only be a
device's: none can pass for another.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common import tls
from common.errors import AuthError
from common.files import write_atomically

AUTHORITY_DAYS = 3650
LEAF_DAYS = 365
# Of devices without a battery for their clock: it stands at the last shutdown until the network has set it.
_CLOCKS_BEHIND = timedelta(days=1)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HOST = re.compile(
    r"(?=.{1,253}$)([A-Za-z0-9_]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
_RESERVED = ("ca", "server")


@dataclass(frozen=True)
class Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def make(folder: Path, hosts: Sequence[str], devices: Sequence[str], renew: bool) -> list[str]:
    """Make what is wanted in `folder`; the names of the certificates made, "ca" among them where it is new.

    Nothing that lies there is replaced without `renew`, and the authority never is. With neither hosts nor devices
    `renew` makes every certificate in the folder anew, for the hosts and names that it had.
    """
    names = [_host(host) for host in hosts]
    for device in devices:
        if not _NAME.fullmatch(device) or device.lower() in _RESERVED:
            raise AuthError(
                f"{device!r} cannot name a device: letters, digits, '.', '_' and '-' do, but not 'server' or 'ca'"
            )
    here = (folder / "ca.pem").exists() or (folder / "ca.key").exists()
    if not here and (renew or not hosts):
        raise AuthError(f"{folder} has no authority yet (ca.pem, ca.key); name the HOSTs that devices will connect to")
    wanted = [*(["server"] if names else []), *(devices or ([] if here else ["device"]))]
    if renew and not wanted:
        wanted = _signed(folder)
        names = _hosts_of(folder / "server.pem") if "server" in wanted else []
    if not wanted:
        raise AuthError("there is nothing to make: name HOSTs, a --device NAME, or pass --renew")
    present = [f"{name}{kind}" for name in wanted for kind in (".pem", ".key") if (folder / f"{name}{kind}").exists()]
    if present and not renew:
        raise AuthError(
            f"{folder} already has {', '.join(present)}; leave out HOST or --device for what is there, or pass "
            f"--renew to replace it under the same authority"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise AuthError(f"{folder} cannot be made: {error.strerror}") from error
    authority = _authority(folder) if here else _new_authority(folder)
    for name in wanted:
        _issue(folder, name, authority, names if name == "server" else ())
    return wanted if here else ["ca", *wanted]


def _signed(folder: Path) -> list[str]:
    """The names whose certificates the authority in `folder` has signed; what else lies there is not its own."""
    issuer, found = _load(folder / "ca.pem").subject, []
    for path in sorted(folder.glob("*.pem")):
        if path.stem != "ca" and path.with_suffix(".key").exists():
            held = path.read_bytes()
            if b"BEGIN CERTIFICATE-" not in held:
                continue
            try:
                certificates = x509.load_pem_x509_certificates(held)
            except ValueError as error:
                raise AuthError(
                    f"{path} is damaged: take it away, or name what is to be renewed, --device {path.stem} or HOSTs"
                ) from error
            if [(one.issuer, one.subject) for one in certificates] == [(issuer, _name(path.stem))]:
                found.append(path.stem)
    return found


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text.strip("[]")))
    except ValueError:
        # One that ends in a number is an address with a mistake in it.
        if not _HOST.fullmatch(text) or text.rpartition(".")[2].isdigit():
            raise AuthError(f"{text!r} is neither the name nor the address of a host; give it without a port") from None
        return x509.DNSName(text.lower())


def _hosts_of(path: Path) -> list[x509.GeneralName]:
    """The hosts that a certificate was made for."""
    try:
        return list(_load(path).extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound as error:
        raise AuthError(f"{path} names no hosts; name them after the folder") from error


def _load(path: Path) -> x509.Certificate:
    return tls.certificates(tls.read(path), path)[0]


def _authority(folder: Path) -> Authority:
    certificate, path = _load(folder / "ca.pem"), folder / "ca.key"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise AuthError(f"{path} cannot be read: {error.strerror}; without it nothing can be signed") from error
    except (ValueError, TypeError) as error:
        raise AuthError(f"{path} holds no private key (PEM) without a passphrase") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise AuthError(f"{path} is not the key of {folder / 'ca.pem'}")
    return Authority(key, certificate)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_BEHIND).not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )  # fmt: skip


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _new_authority(folder: Path) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    # A number in its name tells two authorities apart where a person looks at them.
    name = _name(f"deprune authority {secrets.token_hex(4)}")
    builder = _builder(name, name, key, AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    certificate = builder.add_extension(_usage(authority=True), critical=True).sign(key, hashes.SHA256())
    _write(folder, "ca", key, certificate)
    return Authority(key, certificate)


def _issue(folder: Path, name: str, authority: Authority, hosts: Sequence[x509.GeneralName]) -> None:
    """A new key and its certificate: a server's with `hosts`, else a device's."""
    key = ec.generate_private_key(ec.SECP256R1())
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = _builder(_name(name), authority.certificate.subject, key, LEAF_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(authority=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    builder = builder.add_extension(above, critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    _write(folder, name, key, builder.sign(authority.key, hashes.SHA256()))


def _write(folder: Path, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    write_atomically(folder / f"{name}.key", key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain), 0o600)
    write_atomically(folder / f"{name}.pem", certificate.public_bytes(pem))
