"""`make demo`: the main job on the embedded digits, both processes, deprune; ends with the device's table.

`make demo CODEC=context` (or `step`) codes with another codec than the recipe's `auto`, at the same SNR.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import pair

RECIPE = Path("recipes/deprune-digits.toml")
RUN = Path("runs/demo")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codec", nargs="?", default="auto", choices=("auto", "step", "context"))
    codec = parser.parse_args().codec
    RUN.mkdir(parents=True, exist_ok=True)
    recipe, log = RECIPE, RUN / "server.log"
    if codec != "auto":
        recipe = RUN / f"{codec}.toml"
        recipe.write_text(RECIPE.read_text().replace('"auto:', f'"{codec}:'))
    print(f"edge-server and device-client train {recipe}; the server's output is in {log}.", flush=True)
    arguments = (recipe, "--run", RUN / "server", "--overwrite", "--once")
    with pair.server(*arguments, log=log) as (process, address):
        done = pair.device("train", address, "--data", "digits", "--run", RUN / "device", "--overwrite")
        if done.returncode == 0:
            process.wait(timeout=30)
        else:
            print(log.read_text(), file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
