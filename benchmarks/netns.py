"""Two network namespaces joined by a veth pair: a link of its own whose interfaces count, and which tc can shape.

Needs Linux, root and `ip`; `unavailable()` says in words what is missing. Used by benchmarks.counters and by tests.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

# Ethernet, IPv4, and TCP with timestamps: what each packet on the interface has beyond what TCP counts.
HEADERS = 14 + 20 + 32


@dataclass(frozen=True)
class End:
    """One end of the link: a namespace, its interface there, its address."""

    namespace: str
    interface: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to write before a command line that is to run here."""
        return ("ip", "netns", "exec", self.namespace)

    def counters(self) -> dict[str, int]:
        """The interface's own: bytes and packets, sent (tx) and received (rx)."""
        names = [f"{way}_{what}" for way in ("tx", "rx") for what in ("bytes", "packets")]
        paths = [f"/sys/class/net/{self.interface}/statistics/{name}" for name in names]
        return dict(zip(names, map(int, _run(*self.prefix, "cat", *paths).split()), strict=True))

    def far_from(self, other: End) -> None:
        """Before a low rate: packets no longer than a wire's, for a veth's own would take seconds each; and no ARP for
        `other`, whose answer would wait behind all that is queued, as it never does on the way to a router.
        """
        there = _run(*other.prefix, "cat", f"/sys/class/net/{other.interface}/address").strip()
        _run(*self.prefix, "ip", "link", "set", "dev", self.interface, "gso_max_segs", "1", "gso_max_size", "1500")
        _run(*self.prefix, "ip", "neighbour", "replace", other.address, "lladdr", there, "dev", self.interface,
             "nud", "permanent")  # fmt: skip

    def shape(self, rate: str, limit: str = "200kb") -> None:
        """Let no more than `rate` (tc's units, "10mbit") out; `limit` is the queue before packets are dropped."""
        _run(*self.prefix, "tc", "qdisc", "replace", "dev", self.interface, "root", "tbf", "rate", rate, "burst",
             "16kb", "limit", limit)  # fmt: skip


@functools.cache
def unavailable() -> str:
    """Why no link can be made here; empty where one can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "the program `ip` (iproute2) is not installed"
    try:
        with link():
            return ""
    except subprocess.CalledProcessError as error:
        return f"this kernel or container allows no network namespaces: {error.stderr.strip()}"


@contextlib.contextmanager
def link() -> Iterator[tuple[End, End]]:
    """The server's end and the device's end; both are gone afterwards."""
    mark = f"{os.getpid() % 100_000}"
    server = End(f"deprune-s{mark}", f"ds{mark}", "10.77.0.1")
    device = End(f"deprune-d{mark}", f"dd{mark}", "10.77.0.2")
    try:
        for end in (server, device):
            _run("ip", "netns", "add", end.namespace)
            # No IPv6 here, so that neighbour discovery doesn't count.
            _run(*end.prefix, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6 || true")
        _run("ip", "link", "add", server.interface, "netns", server.namespace, "type", "veth", "peer", "name",
             device.interface, "netns", device.namespace)  # fmt: skip
        for end in (server, device):
            _run(*end.prefix, "ip", "address", "add", f"{end.address}/24", "dev", end.interface)
            _run(*end.prefix, "ip", "link", "set", end.interface, "up")
            _run(*end.prefix, "ip", "link", "set", "lo", "up")
        yield server, device
    finally:
        for end in (server, device):
            subprocess.run(["ip", "netns", "delete", end.namespace], capture_output=True)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
