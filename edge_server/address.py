"""Where a server may listen; asked before anything is loaded, and by the server itself."""

from __future__ import annotations

import errno
import socket
from typing import Any

from common.channel import is_loopback, parse_address
from common.errors import DepruneError


def require_free(address: str, outside: bool) -> None:
    """DepruneError where nothing can listen on HOST:PORT, of which gRPC would print lines of its own before it says so;
    or only on loopback may, unless it may `outside`."""
    host, port = parse_address(address)
    if not (outside or is_loopback(host)):
        raise DepruneError(
            f"{address} can be reached from outside and nothing would be encrypted: give --tls-cert and --tls-key, "
            f"or --insecure where the network itself is trusted"
        )
    failed: list[OSError] = []
    places: list[Any] = []
    try:
        places = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        failed.append(error)
    for family, kind, protocol, _, place in places:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                probe.listen(1)
        except OSError as error:
            failed.append(error)
    # gRPC is content with one of a name's addresses: others may be none of this machine's, but not another server's.
    taken = [error for error in failed if error.errno == errno.EADDRINUSE]
    if taken or len(failed) >= max(1, len(places)):
        cause = (taken or failed)[0]
        reason = cause.strerror or str(cause)
        raise DepruneError(f"cannot listen on {address}: {reason}; choose another --listen HOST:PORT") from cause
