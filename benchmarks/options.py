"""What several benchmarks are given, checked before they begin: argparse tells what is wrong in one sentence."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from common.errors import DepruneError
from common.processor import choose
from device_client.sources import check_source


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=_passing(check_source), help="folder:PATH with train/CLASS and test/CLASS")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=_passing(choose), default="cpu",
        help="where both halves compute: cpu, cuda, cuda:NUMBER or auto",
    )  # fmt: skip


def _passing(check: Callable[[str], object]) -> Callable[[str], str]:
    """An argparse type: text that `check` has nothing against."""

    def checked(text: str) -> str:
        try:
            check(text)
        except DepruneError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return text

    return checked
