"""Kernel bytes of a session's TCP connections, from getsockopt(TCP_INFO); Linux only, no root needed.

gRPC doesn't show its sockets, so psutil names the descriptor by its address and it is duplicated for as long as
the session lasts: a number alone could be closed and reused by another connection meanwhile.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from dataclasses import dataclass
from urllib.parse import unquote

import psutil

# struct tcp_info of linux/tcp.h: the state is its first byte, 64-bit counters stand at these offsets, and one of 32.
_BYTES_ACKED, _BYTES_RECEIVED, _BUSY_TIME, _BYTES_SENT, _BYTES_RETRANS = 120, 128, 168, 200, 208
_SEGMENTS_IN, _MIN_RTT = 140, 148
_SIZE = 216
_ESTABLISHED = 1


@dataclass(frozen=True)
class KernelBytes:
    sent: int = 0  # bytes handed to IP, retransmissions included, without TCP/IP headers
    received: int = 0  # bytes taken from IP in order
    retransmitted: int = 0  # part of sent

    def __add__(self, other: KernelBytes) -> KernelBytes:
        return KernelBytes(
            self.sent + other.sent, self.received + other.received, self.retransmitted + other.retransmitted
        )


@dataclass(frozen=True)
class Moved:
    """How far a connection has come."""

    confirmed: int  # bytes of ours that the other end has
    received: int
    segments: int = 0  # that came, those without any bytes too


@dataclass(frozen=True)
class Flow:
    """What a connection has sent so far, and how long that took it."""

    acknowledged: int  # bytes that the other end has confirmed
    busy_s: float  # seconds in which something was under way
    delay_s: float  # the shortest round trip seen

    def rate_since(self, before: Flow, sends: int) -> float | None:
        """Bytes a second that the link took in `sends` bursts since `before`, the delay of each taken off.

        The kernel's own delivery rate keeps the fastest moment of a sender that pauses, as ours does every step.
        """
        count, busy = self.acknowledged - before.acknowledged, self.busy_s - before.busy_s - sends * self.delay_s
        return count / max(busy, 1e-6) if count > 0 else None


class TcpSocket:
    """The duplicated socket of one connection; its counters can be read until `close()`, also when it has ended."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=os.dup(descriptor))
        self.ends = self._socket.getsockname(), self._socket.getpeername()

    def _info(self) -> bytes:
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
        return info if len(info) == _SIZE else bytes(_SIZE)  # a kernel before 4.19 fills in less

    def read(self) -> KernelBytes:
        info = self._info()
        sent, received, again = (
            struct.unpack_from("<Q", info, at)[0] for at in (_BYTES_SENT, _BYTES_RECEIVED, _BYTES_RETRANS)
        )
        return KernelBytes(sent, received, again)

    def moved(self) -> Moved | None:
        """None where the kernel doesn't tell."""
        info = self._info()
        if not info[0]:
            return None
        confirmed, received = (struct.unpack_from("<Q", info, at)[0] for at in (_BYTES_ACKED, _BYTES_RECEIVED))
        return Moved(confirmed, received, struct.unpack_from("<I", info, _SEGMENTS_IN)[0])

    @property
    def alive(self) -> bool:
        return self._info()[0] == _ESTABLISHED

    def flow(self) -> Flow:
        info = self._info()
        acknowledged, busy = (struct.unpack_from("<Q", info, at)[0] for at in (_BYTES_ACKED, _BUSY_TIME))
        return Flow(acknowledged, busy / 1e6, struct.unpack_from("<I", info, _MIN_RTT)[0] / 1e6)

    def close(self) -> None:
        self._socket.close()


class Kernel:
    """The books of one session over all connections that it has had: a reconnect adds up.

    Safe to use from several threads: a new stream lets go of sockets that an older one may be reading.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._past = KernelBytes()
        self._known = False
        self._connections: list[TcpSocket] = []

    def carry(self, past: KernelBytes | None) -> None:
        """Count what an earlier process of the same run had, if it could."""
        if past:
            self._past += past
            self._known = True

    def add(self, connection: TcpSocket | None) -> None:
        """Count `connection` too, unless it is counted already; those that have ended are settled and let go."""
        if connection is None:
            return
        with self._lock:
            if any(connection.ends == other.ends for other in self._connections):
                connection.close()
                return
            self._settle([other for other in self._connections if not other.alive])
            self._known = True
            self._connections.append(connection)

    def read(self) -> KernelBytes | None:
        """None where the kernel doesn't tell."""
        with self._lock:
            if not self._known:
                return None
            return sum((connection.read() for connection in self._connections), self._past)

    def flow(self) -> Flow | None:
        """What the newest connection has sent; None where the kernel doesn't tell."""
        with self._lock:
            return self._connections[-1].flow() if self._connections else None

    def close(self) -> None:
        """Settle everything; the sum can still be read."""
        with self._lock:
            self._settle(list(self._connections))

    def _settle(self, ended: list[TcpSocket]) -> None:
        for connection in ended:
            self._past += connection.read()
            connection.close()
            self._connections.remove(connection)


def find(remote_port: int, remote_host: str | None = None) -> TcpSocket | None:
    """The newest established connection of this process to that port; None where there is none to be seen.

    `remote_host` is an address, not a name; None takes any.
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = [
            connection.fd
            for connection in psutil.Process().net_connections(kind="tcp")
            if connection.raddr
            and connection.raddr.port == remote_port
            and (remote_host is None or _plain(connection.raddr.ip) == _plain(remote_host))
            and connection.status == psutil.CONN_ESTABLISHED
            and connection.fd >= 0
        ]
        connection = TcpSocket(max(found)) if found else None
    except (OSError, psutil.Error):  # it ended in this very moment, no descriptor is left, or /proc cannot be read
        return None
    if connection and not connection.alive:  # or a kernel that tells less: its bytes are not known, not none
        connection.close()
        return None
    return connection


def find_peer(peer: str) -> TcpSocket | None:
    """The connection behind gRPC's name of a peer, such as "ipv4:10.0.0.2:51234" or "ipv6:%5B::1%5D:51234"."""
    family, _, address = unquote(peer).partition(":")
    host, _, port = address.rpartition(":")
    if family not in ("ipv4", "ipv6") or not port.isdigit():
        return None
    return find(int(port), host.strip("[]"))


def find_server(target: str) -> TcpSocket | None:
    """The connection of this device to the server HOST:PORT.

    By port alone: gRPC resolves names by itself and may have taken another address than the system's resolver gives
    (`localhost` became ::1 where the system says 127.0.0.1).
    """
    return find(int(target.rpartition(":")[2]))


def _plain(host: str) -> str:
    """An IPv4 address seen through an IPv6 socket, written as IPv4."""
    return host.removeprefix("::ffff:").partition("%")[0]
