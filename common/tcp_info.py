"""Kernel bytes of one TCP connection of this process, from getsockopt(TCP_INFO); Linux only, no root needed.

gRPC doesn't show its sockets, so psutil names the descriptor by its address and it is duplicated for as long as
the session lasts: a number alone could be closed and reused by another connection meanwhile.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from dataclasses import dataclass
from urllib.parse import unquote

import psutil

# struct tcp_info of linux/tcp.h: 64-bit counters at these offsets.
_BYTES_RECEIVED, _BYTES_SENT, _BYTES_RETRANS = 128, 200, 208
_SIZE = 216


@dataclass(frozen=True)
class KernelBytes:
    sent: int  # bytes handed to IP, retransmissions included, without TCP/IP headers
    received: int  # bytes taken from IP in order
    retransmitted: int  # part of sent


class Connection:
    """The duplicated socket of one connection; `read()` until `close()`."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=os.dup(descriptor))

    def read(self) -> KernelBytes:
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
        if len(info) < _SIZE:  # a kernel before 4.19 fills in less
            return KernelBytes(0, 0, 0)
        sent, received, again = (
            struct.unpack_from("<Q", info, at)[0] for at in (_BYTES_SENT, _BYTES_RECEIVED, _BYTES_RETRANS)
        )
        return KernelBytes(sent, received, again)

    def close(self) -> None:
        self._socket.close()


def find(remote_port: int, remote_host: str | None = None) -> Connection | None:
    """The newest established connection of this process to that port; None where there is none to be seen.

    `remote_host` is an address, not a name; None takes any.
    """
    if not sys.platform.startswith("linux"):
        return None
    found = [
        connection.fd
        for connection in psutil.Process().net_connections(kind="tcp")
        if connection.raddr
        and connection.raddr.port == remote_port
        and (remote_host is None or _plain(connection.raddr.ip) == _plain(remote_host))
        and connection.status == psutil.CONN_ESTABLISHED
        and connection.fd >= 0
    ]
    return Connection(max(found)) if found else None


def find_peer(peer: str) -> Connection | None:
    """The connection behind gRPC's name of a peer, such as "ipv4:10.0.0.2:51234" or "ipv6:%5B::1%5D:51234"."""
    family, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    if family not in ("ipv4", "ipv6") or not port.isdigit():
        return None
    return find(int(port), host.strip("[]"))


def find_server(target: str) -> Connection | None:
    """The connection of this device to the server HOST:PORT.

    By port alone: gRPC resolves names by itself and may have taken another address than the system's resolver gives
    (`localhost` became ::1 where the system says 127.0.0.1).
    """
    return find(int(target.rpartition(":")[2]))


def _plain(host: str) -> str:
    """An IPv4 address seen through an IPv6 socket, written as IPv4."""
    return host.removeprefix("::ffff:").partition("%")[0]
