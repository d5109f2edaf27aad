"""`edge-server certs`: what it makes, keeps, renews and refuses."""

from __future__ import annotations

import contextlib
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.channel import parse_address, proxy
from common.errors import AbsentError, AuthError, ClockError, LinkError, UntrustedError
from common.tls import Access
from device_client.remote_tail import RemoteTail
from edge_server import certs
from edge_server import cli as server_cli
from edge_server.cli import cli
from tests.conftest import failed


def test_certs_keeps_what_is_there(tmp_path: Path) -> None:
    hosts = ["cloud.example.org", "192.0.2.7", "::1"]
    assert certs.make(tmp_path, [*hosts[:2], "[::1]"], (), renew=False) == ["ca", "server", "device"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name for path in tmp_path.iterdir() if path.stat().st_mode & 0o077 == 0} == {
        "ca.key", "server.key", "device.key"
    }  # fmt: skip
    for again in ((hosts, ()), ((), ("device",))):
        with pytest.raises(AuthError, match="pass --renew"):
            certs.make(tmp_path, *again, renew=False)
    assert certs.make(tmp_path, (), ("hut",), renew=False) == ["hut"]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    certs.make(tmp_path, (), (), renew=True)
    changed = {name for name, data in before.items() if (tmp_path / name).read_bytes() != data}
    assert changed == {"server.pem", "server.key", "device.pem", "device.key"}
    names = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes()).extensions
    san = names.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in san] == hosts


@pytest.mark.parametrize(
    ("host", "listen", "reached"),
    [
        ("cloud.example.org", "0.0.0.0:50051", "cloud.example.org:50051"),
        ("127.0.0.1", "127.0.0.1:50051", "127.0.0.1:50051"),
        ("2001:db8::1", "[::]:50051", "[2001:db8::1]:50051"),
        ("::1", "[::1]:50051", "[::1]:50051"),
    ],
)
def test_the_commands_that_certs_prints_can_be_used(host: str, listen: str, reached: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["certs", str(tmp_path / "keys"), host, "--device", "a", "--device", "a"])
    told = " ".join(done.output.split())
    assert f"--listen {listen} " in told and told.count(f"device-client train {reached} ") == 1
    assert [parse_address(address)[1] for address in (listen, reached)] == [50051, 50051]


def test_a_certificate_says_what_it_is_for_and_how_long(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    certs.make(keys, ["localhost"], ("pi",), renew=False)
    assert keys.stat().st_mode & 0o077 == 0, "nobody else's business"
    ca, server, pi = (
        x509.load_pem_x509_certificate((keys / f"{name}.pem").read_bytes()) for name in ("ca", "server", "pi")
    )
    now = datetime.now(UTC)
    for one, days in ((ca, 3650), (server, 365), (pi, 365)):
        one.verify_directly_issued_by(ca)
        assert timedelta(days=days - 1) < one.not_valid_after_utc - now < timedelta(days=days + 1)
        assert one.not_valid_before_utc < now - timedelta(hours=23), "clocks of small boards are behind"
        constraints = one.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = one.extensions.get_extension_for_class(x509.KeyUsage).value
        assert constraints.ca == usage.key_cert_sign == (one is ca) and constraints.path_length == (
            0 if one is ca else None
        )
    for one, purpose in ((server, ExtendedKeyUsageOID.SERVER_AUTH), (pi, ExtendedKeyUsageOID.CLIENT_AUTH)):
        assert list(one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]


def test_the_key_of_another_authority_signs_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "other"):
        certs.make(folder, ["localhost"], ("pi",), renew=False)
    (tmp_path / "one" / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(AuthError, match="ca.key is not the key of .*ca.pem"):
        certs.make(tmp_path / "one", (), ("hut",), renew=False)
    assert not (tmp_path / "one" / "hut.pem").exists()


def test_renewing_leaves_alone_what_the_authority_has_not_signed(tmp_path: Path) -> None:
    """Such as two authorities in one file, which is how one is exchanged for another."""
    other = tmp_path / "other"
    for folder in (tmp_path, other):
        certs.make(folder, ["localhost"], ("pi",), renew=False)
    both = (tmp_path / "ca.pem").read_bytes() + (other / "ca.pem").read_bytes()
    (tmp_path / "both.pem").write_bytes(both)
    for kind in ("pem", "key"):
        (tmp_path / f"stranger.{kind}").write_bytes((other / f"pi.{kind}").read_bytes())
        (tmp_path / f"note.{kind}").write_text("no certificate at all")
    assert certs.make(tmp_path, (), (), renew=True) == ["pi", "server"]
    assert (tmp_path / "both.pem").read_bytes() == both
    assert (tmp_path / "stranger.pem").read_bytes() == (other / "pi.pem").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "has no authority yet"),
        (("--renew",), "has no authority yet"),
        (("cloud:50051",), "give it without a port"),
        (("192.0.2.256",), "neither the name nor the address"),
        (("cloud", "--device", "server"), "cannot name a device"),
        (("cloud", "--device", "CA"), "cannot name a device"),  # one file with ca.pem, on a Mac
        (("cloud", "--device", "../x"), "cannot name a device"),
    ],
)
def test_certs_refuses_in_words(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    assert words in failed(server_cli.cli, "certs", tmp_path / "new", *arguments)
    assert not list(tmp_path.rglob("*.pem"))


def test_a_clock_that_is_behind_is_named_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small board has no clock of its own: until the network has set it, no certificate is valid yet."""
    monkeypatch.setattr(certs, "_CLOCKS_BEHIND", timedelta(days=-2))
    certs.make(tmp_path / "keys", ["localhost"], (), renew=False)
    access = Access(tls_ca=tmp_path / "keys" / "ca.pem")
    assert "this device's clock says" in access.clock and access.clock.endswith("set it")
    said: list[str] = []
    remote = RemoteTail("localhost:1", access)
    remote.say = said.append
    monkeypatch.setattr(remote, "_handshake", Mock(side_effect=remote._told(AuthError("not trusted"))))
    with pytest.raises(ClockError, match="this device's clock says"):
        remote.open(trains=True)
    with pytest.raises((ClockError, LinkError)):
        remote.open(trains=True, wait_s=0.5)
    assert "waiting, gives up in 0:00" in said[0] or "waiting, gives up in 0:01" in said[0]
    monkeypatch.setattr(certs, "_CLOCKS_BEHIND", timedelta(days=1))
    certs.make(tmp_path / "sound", ["localhost"], (), renew=False)
    assert Access(tls_ca=tmp_path / "sound" / "ca.pem").clock == ""
    remote.close()


def test_an_odd_certificate_is_still_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setattr(ssl, "get_server_certificate", lambda *_, **__: "-----")
    monkeypatch.setattr(x509, "load_pem_x509_certificate", Mock(side_effect=x509.InvalidVersion("7", 7)))
    refused, asked = UntrustedError("it is not trusted"), Mock(return_value="-----")
    with contextlib.closing(RemoteTail("edge.example.org:1")) as remote:
        assert remote._told(refused) is refused
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        monkeypatch.setattr(ssl, "get_server_certificate", asked)
        assert remote._told(refused) is refused and not asked.called, "whose it shows is not known from here"


def test_a_proxy_is_named_and_not_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("grpc_proxy", raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    found = [proxy(address) for address in ("127.0.0.1:1", "localhost:1", "[::1]:1", "edge.example.org:1")]
    assert found == ["", "", "", "https_proxy"]
    remote = RemoteTail("edge.example.org:1")
    told = remote._told(AbsentError("no server answers"))
    assert isinstance(told, AbsentError) and "https_proxy has it called through a proxy" in str(told)
    remote.close()
