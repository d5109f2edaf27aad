"""The one table between our errors and gRPC status, and what gRPC's own failures mean to a person.

An error crosses as status details, and its class name as trailing metadata, so that the device raises the same error
the server met. Called by the servicer and by the device's connection.
"""

from __future__ import annotations

import grpc

from common.errors import (
    AbsentError,
    AuthError,
    BusyError,
    CodecError,
    CutError,
    DataError,
    DepruneError,
    DivergedError,
    FaultError,
    ForbiddenError,
    FrameError,
    LinkError,
    MismatchError,
    ModelError,
    RecipeError,
    RunFolderError,
    SessionError,
    StoppedError,
    StoreError,
    TooLargeError,
    UntrustedError,
    VersionError,
    printable,
)

_STATUS: dict[type[DepruneError], grpc.StatusCode] = {
    RecipeError: grpc.StatusCode.FAILED_PRECONDITION,
    ModelError: grpc.StatusCode.FAILED_PRECONDITION,
    CutError: grpc.StatusCode.FAILED_PRECONDITION,
    DataError: grpc.StatusCode.INVALID_ARGUMENT,
    RunFolderError: grpc.StatusCode.INTERNAL,
    FrameError: grpc.StatusCode.INVALID_ARGUMENT,
    CodecError: grpc.StatusCode.DATA_LOSS,
    TooLargeError: grpc.StatusCode.OUT_OF_RANGE,
    VersionError: grpc.StatusCode.FAILED_PRECONDITION,
    MismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    AuthError: grpc.StatusCode.UNAUTHENTICATED,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
    BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SessionError: grpc.StatusCode.NOT_FOUND,
    StoreError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DivergedError: grpc.StatusCode.ABORTED,
    StoppedError: grpc.StatusCode.UNAVAILABLE,
    FaultError: grpc.StatusCode.INTERNAL,
    LinkError: grpc.StatusCode.UNAVAILABLE,
}
_BY_NAME = {cls.__name__: cls for cls in _STATUS}
_METADATA_KEY = "deprune-error"
# Words of a connection that was never made: where one breaks later, gRPC does not say so.
_NEVER_MADE = "failed to connect"
_NO_NAME = ("dns resolution failed", "errors resolving", "domain name not found")  # gRPC's words, by its resolvers
# Beside a BusyError: milliseconds after which to try again. A device waits no longer than the minute.
_RETRY_KEY = "retry-pushback-ms"
_RETRY_MOST_S = 60.0


def abort(context: grpc.ServicerContext, error: DepruneError) -> None:
    """End the RPC with the status, sentence and class name of `error`; raises, as grpc's own abort does."""
    metadata = [(_METADATA_KEY, type(error).__name__)]
    if isinstance(error, BusyError) and error.retry_after_s is not None:
        metadata.append((_RETRY_KEY, str(round(error.retry_after_s * 1000))))
    context.set_trailing_metadata(tuple(metadata))
    # gRPC replaces a status that is too long by one of its own, which says something else.
    context.abort(_STATUS.get(type(error), grpc.StatusCode.UNKNOWN), printable(str(error), 1000))


def _reason(details: str) -> str:
    """The part of gRPC's account of a failure that means something to a person."""
    if _is_no_name(details):
        return "no such host name is known"
    for words in ("Connection refused", "Connection reset", "Network is unreachable", "No route to host", "Timeout",
                  "Tls handshake failed", "Socket closed"):  # fmt: skip
        if words.lower() in details.lower():
            return words
    return details


def _handshake(details: str, server: str, doubt: str) -> DepruneError | None:
    """What it means where a connection ended in its first moments; TLS says little to the other side by design."""
    if "CERTIFICATE_VERIFY_FAILED" in details or "Hostname Verification" in details:
        return UntrustedError(
            f"what answers at {server} is not trusted: its certificate must be of the authority in --tls-ca, for this "
            f"host name and not run out, by this device's clock"
        )
    if "WRONG_VERSION_NUMBER" in details:
        return LinkError(f"the server at {server} does not use TLS; start it with --tls-cert, or leave out --tls-ca")
    if "Failed parsing HTTP/2" in details:
        return LinkError(f"what answers at {server} is no edge-server, but another program; check the port")
    if "SETTINGS frame" in details or "Endpoint closing" in details:
        return LinkError(
            f"something at {server} takes connections and says nothing; check the port and what runs there"
        )
    if _NEVER_MADE in details and "Socket closed" in details:
        what = f"the server at {server} closed the connection before anything was said"
        return LinkError(f"{what}: {doubt}; else it may be stopping" if doubt else f"{what}: it may be stopping")
    return None


def _retry_after(milliseconds: str) -> float | None:
    return min(int(milliseconds[:9]) / 1000, _RETRY_MOST_S) if milliseconds.isdecimal() else None


def was_sent(error: grpc.RpcError) -> bool:
    """Whether anything of the call can have crossed the link: a connection was there for it."""
    details = error.details() or ""
    return _NEVER_MADE not in details and not _is_no_name(details)


def _is_no_name(details: str) -> bool:
    return any(words in details.lower() for words in _NO_NAME)


def from_rpc(error: grpc.RpcError, server: str, doubt: str = "") -> DepruneError:
    """The error that `error` stands for, seen from a device connected to `server` (HOST:PORT).

    `doubt`: what may be amiss with how the device reaches it (Access.doubt), for where the server itself can't say.
    """
    code, details = error.code(), printable(error.details() or "")
    metadata: dict[str, str] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]
    if metadata.get(_METADATA_KEY) == BusyError.__name__:
        return BusyError(details, _retry_after(metadata.get(_RETRY_KEY, "")))
    if metadata.get(_METADATA_KEY) in _BY_NAME:
        return _BY_NAME[metadata[_METADATA_KEY]](details)
    if code == grpc.StatusCode.UNAVAILABLE and (handshake := _handshake(details, server, doubt)):
        return handshake
    if code == grpc.StatusCode.UNAVAILABLE:
        return AbsentError(
            f"no server answers at {server} ({_reason(details)}); check the address and that edge-server runs there"
        )
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return AbsentError(f"the server at {server} did not answer in time; check the link")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return VersionError(f"what answers at {server} is not a deprune edge-server of a matching version ({details})")
    if code == grpc.StatusCode.CANCELLED:
        return StoppedError(
            f"the server at {server} ended this stream: no sign of this device had come for a while, as where it was "
            f"suspended, it was silent for longer than --idle-time, or a newer connection of it took this one's place"
        )
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return TooLargeError(f"a message was over what the server at {server} takes ({details})")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:  # of gRPC's own, before any of our code
        return BusyError(f"the server at {server} has no room for another call ({details})", 5.0)
    return LinkError(f"the server at {server} failed with {code.name}: {details}")
