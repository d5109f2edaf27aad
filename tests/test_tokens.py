"""Tokens and names of callers, without a server: which files are refused, what is compared, who is who."""

from __future__ import annotations

import hmac
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from common import tokens
from common.errors import AuthError
from device_client import cli as device_cli
from edge_server.identity import Guard
from tests.test_identity import TOKENS, token_file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no token"),
        ("# nothing\n\n", "holds no token"),
        ("alice short", "has 5 characters; 20 or more"),
        ("short", "has 5 characters"),
        (f"alice {'é' * 30}", "20 or more of ASCII"),
        (f"{'a' * 30}\n{'b' * 30}", "token 1 of FILE is not on a line of its own"),
        (f"alice {'a' * 30} more", "is not on a line"),
        (f"alice {'a' * 30}\nalice {'b' * 30}", "twice"),
        (f"alice {'a' * 30}\nbob {'a' * 30}", "twice"),
    ],
)
def test_token_files_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(AuthError, match=words) as refused:
        tokens.parse(text, "FILE")
    assert "a" * 30 not in str(refused.value), "no secret in a message"


def test_tokens_are_compared_with_every_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (compared.append((a, b)), compare(a, b))[1])
    known = tokens.Known(TOKENS | {"carol": "c" * 30})
    answers = [known.name_of(token) for token in (*TOKENS.values(), "c" * 30, "", "c" * 29, "\udcff" * 30)]
    assert answers == ["alice", "bob", "carol", "", "", ""]
    assert len(compared) == 3 * len(answers) and {len(side) for pair in compared for side in pair} == {32}


def test_secrets_that_others_can_read(tmp_path: Path) -> None:
    path = token_file(tmp_path / "token", alice=TOKENS["alice"])
    assert list(tokens.exposed(path, None, tmp_path / "missing")) == []
    for mode in (0o640, 0o604):
        path.chmod(mode)
        (warning,) = tokens.exposed(None, path)
        assert f"mode {mode:o}" in warning
    result = CliRunner().invoke(device_cli.cli, ["predict", "127.0.0.1:9", "--token-file", str(path), "x.png"])
    assert "others can read it" in result.output


def test_a_bare_token_goes_with_every_certificate_and_one_that_is_called_token_does_not() -> None:
    def told(text: str, token: str) -> str:
        guard = Guard(True, lambda: tokens.Known(tokens.parse(text, "tokens")))
        context: Any = SimpleNamespace(
            auth_context=lambda: {"x509_common_name": [b"pi"]},
            invocation_metadata=lambda: [("authorization", f"Bearer {token}")],
        )
        return guard.identity(context)

    one, other = "a" * 20, "b" * 20
    assert told(one, one) == "certificate pi" == told(f"token {one}\npi {other}", other)
    with pytest.raises(AuthError, match="of another device"):
        told(f"token {one}\npi {other}", one)


def test_a_caller_shows_one_token() -> None:
    """Which of two would be another program's guess: a proxy may look at the first and a server at the last."""
    one = "a" * 20
    guard = Guard(False, lambda: tokens.Known(tokens.parse(f"pi {one}", "tokens")))

    def told(*shown: str) -> str:
        context: Any = SimpleNamespace(invocation_metadata=lambda: [("authorization", value) for value in shown])
        return guard.identity(context)

    assert told(f"Bearer {one}") == told(f"bearer {one}") == "token pi"  # a proxy may write it either way
    for wrong in ((f"Bearer {one}", f"Bearer {one}"), (f"Basic {one}",), (one,)):
        with pytest.raises(AuthError, match="not one that this server knows"):
            told(*wrong)


def test_an_authenticated_caller_has_a_name() -> None:
    guard = Guard(certificates=True)
    for names in ((), (b"pi", b"hut"), (b"\xff",)):
        context: Any = SimpleNamespace(auth_context=lambda names=names: {"x509_common_name": names} if names else {})
        with pytest.raises(AuthError, match="no common name"):
            guard.identity(context)


def test_who_does_not_prove_a_name_has_the_share_of_an_address() -> None:
    """Whatever connection it comes by, and no other address beside it."""
    known = tokens.Known(tokens.parse(f"pi {'a' * 20}", "tokens"))

    def caller(guard: Guard, peer: str, token: str = "") -> str:
        shown = [("authorization", f"Bearer {token}")] if token else []
        context: Any = SimpleNamespace(peer=lambda: peer, invocation_metadata=lambda: shown)
        return guard.caller(context)

    for guard in (Guard(), Guard(tokens=lambda: known)):
        one, again, other = (caller(guard, f"ipv4:{end}") for end in ("192.0.2.1:5", "192.0.2.1:6", "192.0.2.2:5"))
        assert one == again != other
        assert caller(guard, "ipv6:[2001:db8::1]:5") != caller(guard, "ipv6:[2001:db8::2]:5")
    named = {caller(Guard(tokens=lambda: known), f"ipv4:192.0.2.{end}:5", "a" * 20) for end in (1, 2)}
    assert named == {"token pi"}
