"""Who gets in and what they may touch: TLS, client certificates and tokens over real sockets; rotation."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from benchmarks import pair
from benchmarks.recipes import CLASSES, recipe_text
from common import tls as tls_files
from common import tokens, wire
from common.channel import connect
from common.errors import AuthError, DepruneError, ForbiddenError, LinkError, SessionError
from common.phase_message import phase_of_message
from common.rpc import split_pb2 as pb
from common.rpc import split_pb2_grpc
from common.rpc_errors import from_rpc
from common.tls import Access, ServerTls, server_credentials
from common.wire import Place
from device_client import cli as device_cli
from device_client.remote_tail import RemoteTail
from edge_server import certs
from edge_server import cli as server_cli
from edge_server.live import LiveRun
from tests.conftest import failed

TOKENS = {"alice": "alice-" + "a" * 26, "bob": "bob-" + "b" * 28}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server for 127.0.0.1 and the devices pi and hut, made by the command itself."""
    folder = tmp_path_factory.mktemp("ours")
    line = pair.command("edge-server", "certs", folder, "127.0.0.1", "--device", "pi", "--device", "hut")
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=pair.environment())
    assert done.returncode == 0, done.stderr
    for words in ("--tls-cert server.pem --tls-key server.key --tls-client-ca ca.pem", "train 127.0.0.1:50051",
                  "--tls-ca ca.pem --tls-cert pi.pem --tls-key pi.key", "Keep ca.key away"):  # fmt: skip
        assert words in done.stdout
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates of another authority, for the same host and names."""
    folder = tmp_path_factory.mktemp("theirs")
    certs.make(folder, ["127.0.0.1"], ["pi"], renew=False)
    return folder


def tls(folder: Path, *more: object) -> tuple[object, ...]:
    return ("--tls-cert", folder / "server.pem", "--tls-key", folder / "server.key", *more)


def as_device(folder: Path, name: str, **changes: Path | None) -> Access:
    own: dict[str, Any] = {
        "tls_ca": folder / "ca.pem", "tls_cert": folder / f"{name}.pem", "tls_key": folder / f"{name}.key"
    }  # fmt: skip
    return Access(**own | changes)


def token_file(path: Path, **known: str) -> Path:
    path.write_text("".join(f"{name} {token}\n" for name, token in known.items()))
    path.chmod(0o600)
    return path


def serving(path: Path, *arguments: object) -> Any:
    (path / "recipe.toml").write_text(recipe_text(schedule="phases = [[0, 0.1]]"))
    return pair.server(path / "recipe.toml", "--run", path / "server", "--threads", 1, *arguments, log=path / "log")


@pytest.fixture(scope="module")
def mutual(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server that waits to train and wants a certificate of ours: its address, and its folder with copies of them."""
    path = tmp_path_factory.mktemp("mutual")
    for name in ("server.pem", "server.key", "ca.pem"):
        shutil.copy(ours / name, path)
    with serving(path, *tls(path, "--tls-client-ca", path / "ca.pem")) as (process, address):
        yield address, path
        assert process.poll() is None, (path / "log").read_text()


def refusal(address: str, access: Access) -> DepruneError:
    """What a device is told that may not even open a session."""
    with pytest.raises(DepruneError) as refused:
        remote = RemoteTail(address, access)
        try:
            remote.open(trains=True)
        finally:
            remote.close()
    return refused.value


def test_both_processes_with_certificates_and_a_token(ours: Path, tmp_path: Path) -> None:
    """One device trains and publishes; another, known too, evaluates, with a token of its own name alone."""
    given = {"pi": TOKENS["alice"], "hut": TOKENS["bob"]}
    known = token_file(tmp_path / "tokens", **given)
    guarded = (*tls(ours, "--tls-client-ca", ours / "ca.pem"), "--token-file", known)

    def options(name: str, token: str) -> tuple[object, ...]:
        own = token_file(tmp_path / name, **{token: given[token]})
        keys = ("--tls-ca", ours / "ca.pem", "--tls-cert", ours / f"{name}.pem", "--tls-key", ours / f"{name}.key")
        return ("--data", "digits", "--threads", 1, *keys, "--token-file", own)

    with serving(tmp_path, *guarded) as (_, address):
        run = ("--run", tmp_path / "device", "--publish-head", "--limit", 400)
        done = pair.device("train", address, *run, *options("pi", "pi"), capture_output=True)
        log = (tmp_path / "log").read_text()
        assert done.returncode == 0, done.stdout + done.stderr + log
        assert "Warning" not in done.stdout + log and "Not encrypted" not in done.stdout + log
        assert "certificate pi trains test-plain" in log
        borrowed = pair.device("evaluate", address, *options("hut", "pi"), capture_output=True)
        assert borrowed.returncode == 1 and "that of another device than the certificate" in borrowed.stderr
        used = pair.device("evaluate", address, *options("hut", "hut"), capture_output=True)
        assert used.returncode == 0 and "pictures classified correctly" in used.stdout, used.stdout + used.stderr
        assert "The run is served from now on" in (tmp_path / "log").read_text()


def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a side come with a certificate that is not for it, which ours refuse to: the other one must see it."""
    monkeypatch.setattr(tls_files, "_pair", lambda certificate, key, _: (key.read_bytes(), certificate.read_bytes()))


def test_a_certificate_is_for_one_side(mutual: tuple[str, Path], ours: Path, tmp_path: Path) -> None:
    """With another's, every connection would be refused, and the server's log would say nothing."""
    address, _ = mutual
    with pytest.raises(AuthError, match=r"server.pem is not for a device; it may be a server's"):
        RemoteTail(address, as_device(ours, "server"))
    for files, wrong in (
        (("--tls-cert", ours / "pi.pem", "--tls-key", ours / "pi.key"), "pi.pem is not for a server"),
        (("--tls-cert", ours / "server.pem", "--tls-key", ours / "server.key", "--tls-client-ca", ours / "pi.pem"),
         "pi.pem is no authority's certificate"),
    ):  # fmt: skip
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(recipe_text())
        assert wrong in failed(
            server_cli.cli, "serve", recipe, "--run", tmp_path / "run", "--listen", "[::1]:0", *files
        )


def test_only_certificates_of_the_one_authority_get_in(
    mutual: tuple[str, Path], ours: Path, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _ = mutual
    unchecked(monkeypatch)
    untrusted = refusal(address, as_device(ours, "pi", tls_ca=theirs / "ca.pem"))
    assert isinstance(untrusted, AuthError) and "must be of the authority in --tls-ca" in str(untrusted)
    assert "it shows one for 127.0.0.1, valid to 20" in str(untrusted)
    whose = "which must be of the authority that it trusts"
    for access, doubt in (
        (as_device(ours, "pi", tls_cert=None, tls_key=None),
         "it may want a certificate: pass --tls-cert and --tls-key"),
        (as_device(ours, "pi", tls_cert=theirs / "pi.pem", tls_key=theirs / "pi.key"),
         f"it may not accept {theirs / 'pi.pem'}, {whose}"),
        # A server's certificate is no device's.
        (as_device(ours, "server"), f"it may not accept {ours / 'server.pem'}, {whose}"),
        (Access(), "if it speaks TLS, pass --tls-ca"),
    ):  # fmt: skip
        error = refusal(address, access)
        assert isinstance(error, LinkError), error
        assert str(error).endswith(f"{doubt}; else it may be stopping"), error


def test_a_device_takes_no_other_device_for_its_server(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unchecked(monkeypatch)
    server = grpc.server(ThreadPoolExecutor(1))
    disguised = ServerTls(ours / "pi.pem", ours / "pi.key")
    address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', server_credentials(disguised, print))}"
    server.start()
    assert isinstance(refusal(address, as_device(ours, "hut")), AuthError)
    server.stop(0).wait()


def told(call: Callable[[], Any], address: str) -> DepruneError:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return from_rpc(refused.value, address)


def test_a_session_is_its_openers_alone(mutual: tuple[str, Path], ours: Path) -> None:
    """hut knows pi's session by name, and neither reads its head, trains on it nor evaluates; nor is it told why."""
    address, _ = mutual
    pi = RemoteTail(address, as_device(ours, "pi"))
    session = pi.open(trains=True).session
    with connect(address, as_device(ours, "hut")) as channel:
        stub = split_pb2_grpc.SplitStub(channel)
        begin = pb.Begin(session=session, samples=1438, classes=CLASSES)
        begin = wire.seal(Place(pb.CONTROL, 0, 0).frame(begin=begin))
        unknown = told(lambda: list(stub.Head(pb.HeadRequest(session="0" * 32))), address)
        for call in (
            lambda: list(stub.Head(pb.HeadRequest(session=session))),
            lambda: next(stub.Train(iter([begin]))),
            lambda: next(stub.Evaluate(iter([begin]))),
        ):
            error = told(call, address)
            assert isinstance(error, SessionError) and str(error) == str(unknown)
        assert pi.head_weights(), "pi itself still may"

        pi.begin(1438, CLASSES)
        request = wire.seal(pb.OpenRequest(protocol_version=wire.PROTOCOL_VERSION, purpose=pb.TRAIN))
        error = told(lambda: stub.Open(request), address)
        assert isinstance(error, ForbiddenError) and "begun by another device" in str(error)
    pi.close()
    time.sleep(0.3)  # the server notices that this device is gone


def test_a_run_of_nobodys_is_its_first_devices_that_says_who_it_is() -> None:
    """A server that got its certificates later; the other way round it must get them back."""
    run = LiveRun.__new__(LiveRun)
    pi, hut = "certificate pi", "certificate hut"
    for owner, identity in ((None, pi), ("", pi), ("", ""), (pi, pi), ("token pi", pi), (pi, "token pi")):
        run.owner = owner
        run.check_owner(identity)
    for identity, words in (("", "start the server with --tls-client-ca"), (hut, "begun by another device")):
        with pytest.raises(ForbiddenError, match=words):
            run.check_owner(identity)


def presented(address: str, folder: Path) -> bytes:
    """The certificate (DER) that a new connection gets."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.load_cert_chain(folder / "pi.pem", folder / "pi.key")
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port))) as plain, context.wrap_socket(plain, server_hostname=host) as end:
        certificate = end.getpeercert(binary_form=True)
    assert certificate
    return certificate


def der(path: Path) -> bytes:
    return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)


def test_certificates_rotate_while_a_device_trains(mutual: tuple[str, Path], ours: Path, tmp_path: Path) -> None:
    address, folder = mutual
    device = RemoteTail(address, as_device(ours, "pi"))
    device.open(trains=True)
    phase = phase_of_message(device.begin(1438, CLASSES)[0].phase)
    first = der(ours / "server.pem")
    assert presented(address, ours) == first

    (folder / "server.pem").write_bytes((ours / "server.pem").read_bytes()[:200])
    for _ in range(2):
        assert presented(address, ours) == first
    assert (folder / "log").read_text().count("stays in force") == 1, "told once"

    renewed = tmp_path / "renewed"
    shutil.copytree(ours, renewed)
    assert sorted(certs.make(renewed, (), (), renew=True)) == ["hut", "pi", "server"]
    shutil.copy(renewed / "server.key", folder)
    assert presented(address, ours) == first, "a key without its certificate changes nothing"
    shutil.copy(renewed / "server.pem", folder)
    assert presented(address, ours) == der(renewed / "server.pem") != first
    assert "in force from now on" in (folder / "log").read_text()

    # The stream that was open all the while goes on, and the device's own new certificate is the same identity.
    sent = np.ones((32, 32, 8, 8), np.float32)
    gradient, _, _ = device.learn(0, phase, sent, np.zeros(32, np.int64))
    assert gradient is not None and gradient.shape == sent.shape and not device.faults.reconnects
    with connect(address, as_device(renewed, "pi")) as channel:
        request = pb.HeadRequest(session=device.opened.session)
        assert next(split_pb2_grpc.SplitStub(channel).Head(request)).part.data
    device.close()


def test_tokens(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, wrong and right ones; whose session it is; taken back while the server runs."""
    known = token_file(tmp_path / "tokens", **TOKENS)
    own = {
        name: Access(ours / "ca.pem", token_file=token_file(tmp_path / name, **{name: TOKENS[name]})) for name in TOKENS
    }
    with serving(tmp_path, *tls(ours), "--token-file", known) as (_, address):
        missing = refusal(address, Access(ours / "ca.pem"))
        assert isinstance(missing, AuthError) and "wants a token: give --token-file" in str(missing)
        wrong = token_file(tmp_path / "wrong", alice=TOKENS["alice"][:-1] + "b")
        error = refusal(address, Access(ours / "ca.pem", token_file=wrong))
        assert isinstance(error, AuthError) and "not one that this server knows" in str(error)

        monkeypatch.setenv(tokens.VARIABLE, TOKENS["alice"])
        alice = RemoteTail(address, Access(ours / "ca.pem"))
        session = alice.open(trains=True).session
        monkeypatch.delenv(tokens.VARIABLE)
        with connect(address, own["bob"]) as channel:
            stub = split_pb2_grpc.SplitStub(channel)
            error = told(lambda: list(stub.Head(pb.HeadRequest(session=session))), address)
            assert isinstance(error, SessionError) and "not known here" in str(error)
            assert alice.head_weights()

            known.write_text("alice short\n")
            request = wire.seal(pb.OpenRequest(protocol_version=wire.PROTOCOL_VERSION, purpose=pb.TRAIN))
            assert stub.Open(request).session
            assert "stays in force" in (tmp_path / "log").read_text()
            token_file(known, alice=TOKENS["alice"])
            error = told(lambda: list(stub.Head(pb.HeadRequest(session=session))), address)
            assert isinstance(error, AuthError), "bob's token was taken back"
            with connect(address, own["alice"]) as other:
                assert split_pb2_grpc.SplitStub(other).Open(request).session
                known.write_text("# none for the moment\n")
                error = told(lambda: split_pb2_grpc.SplitStub(other).Open(request), address)
                assert isinstance(error, AuthError), "the last one too"
            assert "tokens holds no token: no device gets in" in (tmp_path / "log").read_text()
        alice.close()
    for secret in TOKENS.values():
        assert secret not in (tmp_path / "log").read_text()


def test_a_token_is_never_sent_or_taken_in_the_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = token_file(tmp_path / "token", alice=TOKENS["alice"])
    (tmp_path / "recipe.toml").write_text(recipe_text())
    train = (device_cli.cli, "train", "127.0.0.1:9", "--data", "digits", "--run", tmp_path / "run")
    serve = (server_cli.cli, "serve", tmp_path / "recipe.toml", "--run", tmp_path / "run", "--listen", "127.0.0.1:0")
    assert "a token is only sent over TLS" in failed(*train, "--token-file", own)
    assert "only taken over TLS" in failed(*serve, "--token-file", own)
    monkeypatch.setenv(tokens.VARIABLE, TOKENS["alice"])
    assert "a token is only sent over TLS" in failed(*train)
    assert "only taken over TLS" in failed(*serve)


def test_certificate_files_that_cannot_be_used(
    ours: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before a connection is tried, by either side's command."""

    def why(**changes: Path | None) -> str:
        with pytest.raises(AuthError) as refused:
            as_device(ours, "pi", **changes).credentials()
        return str(refused.value)

    locked = tmp_path / "locked.key"
    key = serialization.load_pem_private_key((ours / "pi.key").read_bytes(), None)
    how = serialization.BestAvailableEncryption(b"word")
    locked.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how))
    assert "is not the key of" in why(tls_key=theirs / "pi.key")
    assert "is encrypted" in why(tls_key=locked)
    assert "holds no private key" in why(tls_key=ours / "pi.pem")
    assert "holds no certificate" in why(tls_cert=ours / "pi.key")
    assert "holds no certificate" in why(tls_ca=ours / "pi.key")
    assert "cannot be read" in why(tls_ca=ours / "nowhere.pem")
    assert "go together" in why(tls_key=None)
    assert "needs --tls-ca" in why(tls_ca=None)
    monkeypatch.setattr(certs, "LEAF_DAYS", -0.5)
    certs.make(tmp_path / "old", ["127.0.0.1"], ["pi"], renew=False)
    assert "ran out on" in why(tls_cert=tmp_path / "old" / "pi.pem", tls_key=tmp_path / "old" / "pi.key")
    (tmp_path / "recipe.toml").write_text(recipe_text())
    serve = (server_cli.cli, "serve", tmp_path / "recipe.toml", "--run", tmp_path / "run", "--listen", "127.0.0.1:0")
    assert "ran out on" in failed(*serve, *tls(tmp_path / "old"))


@pytest.mark.parametrize("side", ["device", "server"])
def test_either_side_wants_a_certificate_and_its_key_together(side: str, ours: Path, tmp_path: Path) -> None:
    command, start = server_cli.cli, ("serve",)
    if side == "device":
        command, start = device_cli.cli, ("train", "127.0.0.1:9", "--data", "digits")
    line = [*start, "--run", tmp_path / "run", "--tls-cert", ours / "pi.pem"]
    result = CliRunner().invoke(command, [str(word) for word in line])
    assert result.exit_code == 2 and "Usage: " in result.output, result.output
    assert "--tls-cert and --tls-key go together" in result.output
