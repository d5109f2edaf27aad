"""`make bench-counters`: what the byte counters say, beside what the interface between the two processes counted.

Trains across a veth pair between two network namespaces (root), once in the clear and once with TLS, and prints what
each depth of counting leaves out: protobuf, HTTP/2 and TLS, TCP/IP headers. Writes benchmarks/results/counters.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import netns, pair
from benchmarks.machine import machine
from edge_server import certs

RESULT = Path("benchmarks/results/counters.json")
RECIPE = """
name = "counters"
method = "fixed"
[model]
name = "tiny"
input = [1, {side}, {side}]
classes = 10
cut = "stage1_relu2"
[data]
batch = 32
[codec]
activation = "{codec}"
gradient = "{codec}"
[schedule]
phases = [[0, {epochs}]]
[optimiser]
warmup = 20
"""


def measure(
    folder: Path,
    codec: str,
    epochs: float,
    tls: bool = False,
    rate: str = "",
    limit: str = "200kb",
    side: int = 16,
) -> dict[str, dict[str, int]]:
    """Train across a link of its own: by way ("up", "down") the counts of each depth and of the interfaces."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE.format(codec=codec, epochs=epochs, side=side))
    with netns.link() as (server, device):
        if rate:
            for end in (server, device):
                end.shape(rate, limit)
        trust: tuple[object, ...] = ()
        serve: tuple[object, ...] = (folder / "recipe.toml", "--run", folder / "server", "--once", "--threads", 1)
        if tls:
            keys = folder / "keys"
            certs.make(keys, [server.address], [], renew=False)
            serve = (*serve, "--tls-cert", keys / "server.pem", "--tls-key", keys / "server.key")
            trust = ("--tls-ca", keys / "ca.pem")
        else:
            serve = (*serve, "--insecure")
        options: dict[str, Any] = {"log": folder / "log", "listen": f"{server.address}:0", "prefix": server.prefix}
        with pair.server(*serve, **options) as (process, address):
            run = ("--data", "digits", "--run", folder / "device", "--threads", 1)
            done = pair.device("train", address, *run, *trust, prefix=device.prefix, capture_output=True)
            if done.returncode:
                raise RuntimeError(done.stdout + done.stderr + (folder / "log").read_text())
            process.wait(timeout=60)
        (folder / "output").write_text(done.stdout)
        seen = {"up": device.counters(), "down": server.counters()}
    result = {}
    for way, side in (("up", "device"), ("down", "server")):
        # Each way is counted by the side that sends it: it alone knows what it had to send again.
        summary = json.loads((folder / side / "summary.json").read_text())
        counts = {name: summary["bytes"][way][name] for name in ("payload", "message", "kernel")}
        result[way] = counts | {
            "retransmitted": summary["retransmitted"],
            "packets": seen[way]["tx_packets"], "interface": seen[way]["tx_bytes"], "steps": summary["steps"],
        }  # fmt: skip
    return result


def show(console: Console, title: str, ways: dict[str, dict[str, int]]) -> None:
    """Each depth, what it adds to the one before, and what the interface counted and nothing explains."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("")
    for way in ways:
        table.add_column(f"{way}, bytes", justify="right")
        table.add_column("of payload", justify="right")
    for name, value in (
        ("payload", lambda c: c["payload"]),
        ("+ protobuf", lambda c: c["message"] - c["payload"]),
        ("+ HTTP/2 and TLS", lambda c: c["kernel"] - c["message"]),
        ("  of it retransmitted by TCP", lambda c: c["retransmitted"]),
        ("= kernel", lambda c: c["kernel"]),
        ("+ Ethernet, IP, TCP", lambda c: c["packets"] * netns.HEADERS),
        ("interface", lambda c: c["interface"]),
        ("not explained", lambda c: unexplained(c)),
    ):
        cells = []
        for counts in ways.values():
            cells += [f"{value(counts):,}", f"{value(counts) / counts['payload']:.2%}"]
        table.add_row(name, *cells)
    console.print(table)


def unexplained(counts: dict[str, int]) -> int:
    """Bytes of the interface that are neither the kernel's nor headers: handshakes, ARP, the last words."""
    return counts["interface"] - counts["kernel"] - counts["packets"] * netns.HEADERS


def main() -> None:
    console = Console()
    if reason := netns.unavailable():
        console.print(f"bench-counters was not run: {reason}.")
        sys.exit(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for codec, tls in (("step:15", False), ("step:15", True), ("fp32", False), ("fp32", True)):
            ways = measure(Path(name) / f"{codec}-{tls}", codec, 7, tls)
            show(console, f"{codec}, {'TLS' if tls else 'in the clear'}, {ways['up']['steps']} steps", ways)
            rows.append({"codec": codec, "tls": tls} | ways)
    RESULT.write_text(
        json.dumps({"machine": machine(), "date": date.today().isoformat(), "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
