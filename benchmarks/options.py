"""What several benchmarks are given, checked before they begin: argparse tells what is wrong in one sentence."""

from __future__ import annotations

import argparse
import os

from common.errors import DepruneError
from device_client.sources import check_source


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=_source, help="folder:PATH with train/CLASS and test/CLASS")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=_device, default="cpu", help="where both halves compute: cpu, cuda, cuda:NUMBER or auto"
    )


def _source(text: str) -> str:
    try:
        check_source(text)
    except DepruneError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _device(name: str) -> str:
    from common.processor import choose  # which loads torch

    try:
        choose(name)
    except DepruneError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name
