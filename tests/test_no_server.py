"""Where no server of ours answers, the device says what it met."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import grpc

from benchmarks import pair
from common.rpc_errors import from_rpc


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


def test_a_port_that_says_nothing_is_no_missing_server() -> None:
    """After 20 s, which gRPC waits for a first word."""
    words = "failed to connect to all addresses: connection attempt timed out before receiving SETTINGS frame"
    error = Mock(code=lambda: grpc.StatusCode.UNAVAILABLE, details=lambda: words, trailing_metadata=lambda: ())
    assert str(from_rpc(error, "pi:50051")).startswith("something at pi:50051 takes connections and says nothing;")
