"""Who calls: the name in a client certificate, or of a token. Asked for every RPC."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import grpc

from common.errors import AuthError
from common.tokens import BARE, Known


def name_of(identity: str) -> str:
    """The name in it, however that was proved: it stays where a device that had a token comes with a certificate."""
    return identity.partition(" ")[2]


class Guard:
    """What a server asks of its callers: a certificate, a token, both or nothing.

    `certificates`: TLS has let in only callers with a certificate that the operator's authority signed.
    `tokens`: gives those that are known at the moment.
    """

    def __init__(self, certificates: bool = False, tokens: Callable[[], Known] | None = None) -> None:
        self._certificates, self._tokens = certificates, tokens

    def identity(self, context: grpc.ServicerContext) -> str:
        """How the caller proves who it is, and its name, the same from one connection to the next; "" where nothing is
        asked for.

        Sessions and runs belong to it. AuthError for a caller that does not prove who it is.
        """
        token = self._token(context, self._tokens()) if self._tokens else ""
        if not self._certificates:
            return f"token {token}" if token else ""
        name = self._certificate(context)
        if token not in ("", BARE, name):
            raise AuthError("the token is that of another device than the certificate; each device has its own")
        return f"certificate {name}"

    def caller(self, context: grpc.ServicerContext) -> str:
        """Whose share of the server a call takes: the identity's, or its address's where there is none to be had."""
        try:
            name = self.identity(context)
        except AuthError:
            name = ""
        return name or f"address {context.peer().rpartition(':')[0]}"

    @staticmethod
    def _certificate(context: grpc.ServicerContext) -> str:
        # The name and not the key: a renewed certificate of the same device is the same identity.
        names: Iterable[bytes] = context.auth_context().get("x509_common_name", ())  # type: ignore[assignment]
        try:
            (name,) = (value.decode() for value in names)
        except ValueError as error:
            raise AuthError("the device's certificate has no common name that says who it is") from error
        return name

    @staticmethod
    def _token(context: grpc.ServicerContext, known: Known) -> str:
        given = [value for key, value in context.invocation_metadata() if key == "authorization"]
        if not given:
            raise AuthError("this server wants a token: give --token-file, or set DEPRUNE_TOKEN")
        scheme, _, token = str(given[0]).partition(" ")
        name = known.name_of(token) if len(given) == 1 and scheme.lower() == "bearer" else ""
        if not name:
            raise AuthError("the token is not one that this server knows; check --token-file, or DEPRUNE_TOKEN")
        return name
