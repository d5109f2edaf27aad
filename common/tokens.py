"""Bearer tokens: read from files or the environment, compared in constant time. Both sides read theirs here.

A file has a line `name token` for each device, or a single bare token, which has no name; blank lines and
lines that start with # are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from common.errors import AuthError
from common.reloaded import Reloaded

VARIABLE = "DEPRUNE_TOKEN"
BARE = "without a name"  # the name of one that has none; no line can have it
# 20 characters of a random base64 token are 120 bits: no one guesses them.
MIN_CHARACTERS = 20
_HOW = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"


class NoTokenError(AuthError):
    """A token file without a token."""


def parse(text: str, source: str) -> dict[str, str]:
    """Tokens by name; AuthError where `text` from `source` isn't what a token file holds."""
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise NoTokenError(f"{source} holds no token; make one with {_HOW}")
    if len(lines) == 1 and len(lines[0]) == 1:
        lines = [[BARE, lines[0][0]]]
    tokens: dict[str, str] = {}
    for number, words in enumerate(lines, 1):
        # Never the words themselves: an error ends up in logs.
        if len(words) != 2:
            raise AuthError(f"token {number} of {source} is not on a line of its own as `name token`")
        name, token = words
        if name in tokens or token in tokens.values():
            raise AuthError(f"{source} has the name or the token of {name} twice; each device has its own")
        if len(token) < MIN_CHARACTERS or not (token.isascii() and token.isprintable()):
            whose = "" if name == BARE else f" of {name}"
            raise AuthError(
                f"the token{whose} in {source} has {len(token)} characters; {MIN_CHARACTERS} or more of ASCII are "
                f"needed, at random: {_HOW}"
            )
        tokens[name] = token
    return tokens


def read(path: Path) -> dict[str, str]:
    try:
        return parse(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        raise AuthError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AuthError(f"{path} is not text") from error


def own(path: Path | None) -> str:
    """The one token of a device, of a file or else of the environment; "" without either."""
    tokens = read(path) if path else parse(os.environ[VARIABLE], VARIABLE) if os.environ.get(VARIABLE) else {}
    if len(tokens) > 1:
        raise AuthError(f"{path or VARIABLE} holds {len(tokens)} tokens; a device has one")
    return next(iter(tokens.values()), "")


def exposed(*secrets: Path | None) -> Iterator[str]:
    """A warning for each of these files that others on this machine can read; None is none."""
    for path in filter(None, secrets):
        with contextlib.suppress(OSError):
            if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
                yield f"{path} is secret, but others can read it (mode {mode:o}): chmod 600 {path}"


class Known:
    """The tokens that a server knows, as digests: of one length, so that comparing them tells nothing of it."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        self._digests = {name: _digest(token) for name, token in tokens.items()}

    def name_of(self, token: str) -> str:
        """Whose token it is, or "". Compares with every one, whichever fits: the time taken is always the same."""
        given, found = _digest(token), ""
        for name, digest in self._digests.items():
            if hmac.compare_digest(given, digest):
                found = name
        return found


def known(path: Path | None, tell: Callable[[str], None]) -> Callable[[], Known] | None:
    """The tokens of a server, of a file (read anew when it changes) or else of the environment; None without either."""
    if path:
        file = path
        read(file)  # a server starts with one at least

        def load() -> Known:
            try:
                return Known(read(file))
            except NoTokenError:  # whoever takes out the last line wants nobody let in
                tell(f"{file} holds no token: no device gets in")
                return Known({})

        return Reloaded([path], load, tell)
    if not os.environ.get(VARIABLE):
        return None
    fixed = Known(parse(os.environ[VARIABLE], VARIABLE))
    return lambda: fixed


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
