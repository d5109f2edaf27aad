"""Where no server of ours answers, the device says what it met."""

from __future__ import annotations

import io
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import grpc
import pytest
from rich.console import Console

from benchmarks import pair
from benchmarks.recipes import recipe_text
from common.errors import BusyError, MismatchError, RecipeError
from common.progress import warn
from common.recipe import parse
from common.rpc import split_pb2 as pb
from common.rpc_errors import from_rpc
from device_client.handshake import opened_by
from tests.conftest import Run


def test_no_server_and_no_traceback(tmp_path: Path) -> None:
    done = pair.device("train", "127.0.0.1:9", "--data", "digits", "--run", tmp_path / "run", capture_output=True)
    assert done.returncode == 75 and "no server answers at 127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_program_answers(tmp_path: Path) -> None:
    """One that speaks HTTP/1, as web servers and proxies do."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{other.server_port}"
        done = pair.device("train", address, "--data", "digits", "--run", tmp_path / "d", capture_output=True)
        other.shutdown()
    assert done.returncode == 75
    assert f"what answers at {address} is no edge-server" in done.stderr.replace("\n", " ")


def test_a_finished_run_is_finished_whatever_answers(plain_run: Run, tmp_path: Path) -> None:
    """A service that ended with 75 would be started again for ever."""
    shutil.copytree(plain_run.path / "device", tmp_path / "d")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{other.server_port}"
        done = pair.device("train", address, "--data", "digits", "--run", tmp_path / "d", capture_output=True)
        other.shutdown()
    assert done.returncode == 0, done.stderr


def test_what_a_server_says_cannot_steer_a_terminal() -> None:
    metadata = (("deprune-error", "BusyError"), ("retry-pushback-ms", "9" * 5000))
    error = Mock(
        code=lambda: grpc.StatusCode.RESOURCE_EXHAUSTED, details=lambda: "\x1b[2Jno room",
        trailing_metadata=lambda: metadata,
    )  # fmt: skip
    found = from_rpc(error, "pi:50051")
    assert isinstance(found, BusyError) and str(found) == "?[2Jno room" and found.retry_after_s == 60
    with pytest.raises(RecipeError, match="model.name is .*leave control characters out"):
        parse(recipe_text("fixed", model='name = "\\u001b[2Jx:y"\ninput = [1, 8, 8]\nclasses = 2\ncut = "a"'))
    screen = io.StringIO()
    warn(Console(file=screen), "a picture \x1b]0;owned\x07.png")
    assert "\x1b" not in screen.getvalue()


@pytest.mark.parametrize("names", [[], ["a"] * 10, list("abcde")])
def test_a_server_that_does_not_name_the_classes_is_not_believed(names: list[str]) -> None:
    text = recipe_text("fixed")
    reply = pb.OpenReply(recipe=text, digest=parse(text).digest(), classes=names, phase=pb.Phase(width=8))
    with pytest.raises(MismatchError, match=f"named {len(set(names))} classes of a network that has 10"):
        opened_by(reply, False, "pi:50051")


def test_a_port_that_says_nothing_is_no_missing_server() -> None:
    """After 20 s, which gRPC waits for a first word."""
    words = "failed to connect to all addresses: connection attempt timed out before receiving SETTINGS frame"
    error = Mock(code=lambda: grpc.StatusCode.UNAVAILABLE, details=lambda: words, trailing_metadata=lambda: ())
    assert str(from_rpc(error, "pi:50051")).startswith("something at pi:50051 takes connections and says nothing;")
