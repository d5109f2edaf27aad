"""`make demo`: the main job on the embedded digits, both processes, deprune; ends with the device's table."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import pair

RUN = Path("runs/demo")


def main() -> int:
    RUN.mkdir(parents=True, exist_ok=True)
    log = RUN / "server.log"
    print(
        f"edge-server and device-client train recipes/deprune-digits.toml; the server's output is in {log}.", flush=True
    )
    arguments = ("recipes/deprune-digits.toml", "--run", RUN / "server", "--overwrite", "--once")
    with pair.server(*arguments, log=log) as (process, address):
        done = pair.device("train", address, "--data", "digits", "--run", RUN / "device", "--overwrite")
        if done.returncode == 0:
            process.wait(timeout=30)
        else:
            print(log.read_text(), file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
