"""The commands as what starts them sees them: signals, exit codes, what is closed or gone, permissions, addresses."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest

from benchmarks import pair
from common.errors import DepruneError, RecipeError, RunFolderError
from common.files import write_atomically
from common.run import RunFolder
from edge_server import address, bundled
from tests.conftest import Run

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_device_that_still_waits_for_its_server_ends_in_order(number: signal.Signals, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = pair.command("device-client", "train", "127.0.0.1:9", "--data", "digits", "--run", run, "--wait", "inf")
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=pair.environment()) as device:
        assert device.stdout
        while "waiting, never gives up" not in device.stdout.readline():
            pass
        device.send_signal(number)
        assert device.wait(timeout=30) == 128 + number
    assert not run.exists(), "the folder that it had made is taken away"


def test_output_that_a_program_reads_is_not_told_of_a_stop(plain_run: Run) -> None:
    line = pair.command(
        "device-client", "evaluate", "127.0.0.1:9", "--data", "digits", "--run", plain_run.path / "device", "--json",
        "--wait", "inf",
    )  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, text=True, env=pair.environment(), **pipes) as device:
        assert device.stderr
        while "waiting" not in device.stderr.readline():
            pass
        device.send_signal(signal.SIGINT)
        out, told = device.communicate(timeout=30)
    assert (device.returncode, out) == (130, "") and "Interrupted." in told


@pytest.mark.skipif(os.geteuid() != 0, reason="a process namespace takes root")
def test_the_first_process_of_a_container_hears_a_signal_while_it_waits(tmp_path: Path) -> None:
    """Whom the kernel ends by no signal that it does not handle."""
    line = pair.command("device-client", "train", "127.0.0.1:9", "--data", "digits", "--run", tmp_path / "d")
    inside = ["unshare", "--pid", "--fork", "--kill-child", *line, "--wait", "inf"]
    with subprocess.Popen(inside, stdout=subprocess.PIPE, text=True, env=pair.environment()) as outside:
        assert outside.stdout
        if not (first := outside.stdout.readline()):
            pytest.skip("no process namespace can be made here")
        while "waiting, never gives up" not in first:
            first = outside.stdout.readline()
        children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        assert outside.wait(timeout=30) == 128 + signal.SIGTERM


def test_what_may_pass_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    """So that whoever starts it again by itself knows when that is worth it."""
    lost = pair.device("evaluate", "127.0.0.1:9", "--data", "digits", capture_output=True)
    wrong = pair.device("evaluate", "127.0.0.1:9", "--data", f"folder:{tmp_path / 'none'}", capture_output=True)
    assert (lost.returncode, wrong.returncode) == (75, 1), (lost.stderr, wrong.stderr)


@pytest.mark.parametrize(
    "line",
    [
        ("evaluate", "127.0.0.1:9", "--data", "digits", "--run", "{}"),
        ("evaluate", "127.0.0.1:9", "--data", "folder:{}"),
        ("train", "127.0.0.1:9", "--data", "digits", "--run", "{}/run"),
        ("serve", "--run", "{}", "--listen", "127.0.0.1:0"),
        ("serve", "digits", "--run", "run", "--listen", "127.0.0.1:0", "--tls-cert", "{}"),
        ("certs", "{}", "localhost"),
    ],
)
def test_a_path_that_may_not_be_looked_at_is_told_in_words(line: tuple[str, ...], tmp_path: Path) -> None:
    """Here one with a name that is too long, which is refused to root as well."""
    command = "edge-server" if line[0] in ("serve", "certs") else "device-client"
    arguments = [part.format(tmp_path / ("x" * 300)) for part in line]
    done = subprocess.run(
        pair.command(command, *arguments), capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env=pair.environment(),
    )  # fmt: skip
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    assert "File name too long" in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_output_is_no_failure(closed: str) -> None:
    line = shlex.join(pair.command("edge-server", "recipes"))
    done = subprocess.run(["bash", "-c", f"{line} {closed}"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    line = shlex.join(pair.command("edge-server", "recipes"))
    done = subprocess.run(
        ["bash", "-c", f"mkdir gone && cd gone && rmdir ../gone && {line}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "Error: the folder that this was started in"
    )


@pytest.mark.parametrize("mask, expected, secret", [(0o077, 0o600, 0o600), (0o022, 0o644, 0o600), (0, 0o666, 0o600)])
def test_files_have_the_permissions_that_their_user_wants(
    mask: int, expected: int, secret: int, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "weights", b"w")
        write_atomically(tmp_path / "key", b"k", 0o600)
    finally:
        os.umask(before)
    found = [(tmp_path / name).stat().st_mode & 0o777 for name in ("weights", "key")]
    assert found == [expected, secret]


def test_a_run_folder_on_a_disk_that_is_not_mounted(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    with (
        pytest.raises(RunFolderError, match="is a link to .*disk, which is not there"),
        RunFolder(tmp_path / "run").claimed(),
    ):
        pass
    (tmp_path / "disk").mkdir()
    with RunFolder(tmp_path / "run").claimed():
        pass


def test_all_addresses_of_a_name_must_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC is content with one; devices that reach another would reach another server. One that is no address of this
    machine, as ::1 where IPv6 is switched off, is left to it."""
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.listen()
        port = other.getsockname()[1]

        def places(*hosts: str) -> None:
            found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in hosts]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

        places("127.0.0.1", "127.0.0.2")
        with pytest.raises(DepruneError, match="Address already in use"):
            address.require_free(f"localhost:{port}", outside=False)
        places("192.0.2.1", "127.0.0.1")
        address.require_free(f"localhost:{port}", outside=False)
        places("192.0.2.1")
        with pytest.raises(DepruneError, match="Cannot assign requested address"):
            address.require_free(f"localhost:{port}", outside=False)


def test_recipes_come_along_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundled.names() == sorted(path.stem for path in (ROOT / "recipes").iterdir())
    assert bundled.path_of(Path("fixed-digits")).samefile(ROOT / "recipes" / "fixed-digits.toml")
    monkeypatch.chdir(tmp_path)
    Path("fixed-digits").write_text("")
    for own in (Path("fixed-digits"), Path("other.toml"), tmp_path / "plain-digits"):
        assert bundled.path_of(own) == own
    with pytest.raises(RecipeError, match="no file none, and no recipe of that name comes along: deprune-cifar10,"):
        bundled.path_of(Path("none"))


def test_the_generated_code_finds_its_grpc() -> None:
    """It refuses to run with an older one than that which made it, so this is the least that may be installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    code = (ROOT / "common" / "rpc" / "split_pb2_grpc.py").read_text()
    wanted = re.search(r"GRPC_GENERATED_VERSION = '([\d.]+)'", code)
    assert wanted
    assert f"grpcio-tools=={wanted[1]}" in project["build-system"]["requires"]
    assert f"grpcio>={wanted[1]}" in project["project"]["dependencies"]
    assert f"grpcio=={wanted[1]}\n" in (ROOT / "constraints.txt").read_text()
