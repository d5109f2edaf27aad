"""The exceptions people see.

Each message is one sentence or two that say what was wrong, where, and what to do. Both command lines print
it without a traceback; how they cross the wire is rpc_errors.py's matter.

    DepruneError
    ├── RecipeError        a recipe that cannot be used
    ├── ModelError         a model that cannot be found, built or filled with weights
    │   └── CutError       a cut that does not exist or that more than one tensor crosses
    ├── DataError          pictures or labels that cannot be read or do not fit the recipe
    ├── RunFolderError     a run folder that cannot be used or written
    ├── FrameError         a frame of the wrong step, phase, shape, dtype or codec
    │   ├── CodecError     bytes that do not decode to the tensor that was announced
    │   └── TooLargeError  a tensor or message over the negotiated limit
    ├── VersionError       the two sides speak different versions of the protocol
    ├── MismatchError      halves, recipes or classes that do not belong together
    ├── AuthError          a token or certificate that is missing, wrong or cannot be used
    │   ├── ClockError     a certificate that is not valid yet, by a clock that is behind
    │   └── UntrustedError a server whose certificate is not what --tls-ca and its name want
    ├── ForbiddenError     a run that belongs to another identity
    ├── BusyError          the server has no room for this session
    ├── SessionError       the server does not know this session (any more)
    ├── StoreError         the server has no room for what it would keep
    ├── DivergedError      the loss or a tensor is no longer finite
    ├── StoppedError       one side was stopped by its user
    ├── FaultError         a fault of the server's own, whose details are for its operator
    ├── LinkError          the link broke, or what answers is no server of ours
    │   └── AbsentError    no server answers
    └── RolledBackError    the server went on from an earlier step; the device must follow
"""

from __future__ import annotations

import unicodedata

_MAY_PASS = 75  # EX_TEMPFAIL of sysexits.h: the same command may do later


# What to do where one side does not know what the other says.
SAME_RELEASE = "install the same release of deprune on both sides"


class DepruneError(Exception):
    """Base of every error meant for a person; `str()` is what they read."""

    exit_code = 1  # what a command that ends with it exits with


class RecipeError(DepruneError):
    pass


class ModelError(DepruneError):
    pass


class CutError(ModelError):
    pass


class DataError(DepruneError):
    pass


class RunFolderError(DepruneError):
    pass


class FrameError(DepruneError):
    pass


class CodecError(FrameError):
    pass


class TooLargeError(FrameError):
    pass


class VersionError(DepruneError):
    pass


class MismatchError(DepruneError):
    pass


class AuthError(DepruneError):
    pass


class ClockError(AuthError):
    exit_code = _MAY_PASS


class UntrustedError(AuthError):
    pass


class ForbiddenError(DepruneError):
    pass


class BusyError(DepruneError):
    exit_code = _MAY_PASS

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: when it is worth trying again; None where the server cannot know."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SessionError(DepruneError):
    pass


class StoreError(DepruneError):
    pass


class DivergedError(DepruneError):
    pass


class StoppedError(DepruneError):
    exit_code = _MAY_PASS


class FaultError(DepruneError):
    exit_code = _MAY_PASS


class LinkError(DepruneError):
    exit_code = _MAY_PASS


class AbsentError(LinkError):
    pass


class RolledBackError(DepruneError):
    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def printable(text: str, most: int | None = None) -> str:
    """What came from elsewhere, fit for a terminal and a log: without control characters, cut to `most` characters."""
    return "".join(character if _harmless(character) else "?" for character in text[:most])


def _harmless(character: str) -> bool:
    """Spaces of every width are, and the invisible characters that join or part letters in some scripts."""
    return character.isprintable() or character in "\u200c\u200d" or unicodedata.category(character) == "Zs"
