"""The sides never import each other, and common imports neither."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import recipe_page

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "common": {"device_client", "edge_server"},
    "device_client": {"edge_server"},
    "edge_server": {"device_client"},
}


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_side_imports_the_other(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert len(modules) > 4
    for module in modules:
        assert not imported(module) & FORBIDDEN[package], module


def test_only_the_edges_know_grpc() -> None:
    calls = {"health", "identity", "link", "connection", "interceptor", "servicer", "server"}
    allowed = calls | {"channel", "tls", "rpc_errors"}
    for package in FORBIDDEN:
        for module in sorted((ROOT / package).rglob("*.py")):
            if "rpc" not in module.parts and "grpc" in imported(module):
                assert module.stem in allowed, module


def test_the_page_of_keys_is_that_of_the_code() -> None:
    assert recipe_page.page() == (ROOT / "docs" / "recipe.md").read_text(), "python -m benchmarks.recipe_page"
    classes = [cls for cls, _ in recipe_page.PARTS.values()]
    told = [key for cls in classes for key, _, meaning in recipe_page.keys(cls) if meaning]
    assert len(told) == sum(len(dataclasses.fields(cls)) for cls in classes) - 7  # the tables of the file


def test_the_fuzzer_finds_what_it_imports() -> None:
    """It is run by itself, now and then, and wants atheris."""
    for module in (ROOT / "fuzz").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("common"):
                found = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(found, alias.name) or importlib.import_module(f"{node.module}.{alias.name}"), alias


@pytest.mark.parametrize("package", ["device_client", "edge_server"])
def test_commands_answer_before_torch_is_loaded(package: str) -> None:
    """It takes seconds, on a Pi many: help, wrong options and wrong recipes do not wait for it."""
    code = f"import {package}.cli, sys; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("package", ["device_client", "edge_server"])
def test_grpc_finds_its_settings_when_it_is_imported(package: str) -> None:
    """It reads them then, and never again."""
    code = f"""if True:
        import os, sys

        class Watching:
            def find_spec(self, name, *_):
                if name == "grpc":
                    found = [os.environ.get(setting) for setting in ("GRPC_VERBOSITY", "GRPC_DNS_RESOLVER")]
                    sys.exit(found != ["ERROR", "native"])

        sys.meta_path.insert(0, Watching())
        import {package}.__main__, {package}.cli
        sys.exit("it was not imported")
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("ignored", "code"), [(False, -signal.SIGINT), (True, 7)])
def test_ctrl_c_while_libraries_load_ends_without_a_traceback(ignored: bool, code: int, tmp_path: Path) -> None:
    """And does nothing where it is ignored, as in the background of a shell."""
    (tmp_path / "slow.py").write_text("import sys, time\nprint('loads', flush=True)\ntime.sleep(1)\nsys.exit(7)")
    start = "import signal, sys\n" + "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" * ignored
    start += f"sys.path.append({str(tmp_path)!r})\nfrom common.cli import run\nrun('slow')"
    with subprocess.Popen([sys.executable, "-c", start], cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout and process.stdout.readline() == "loads\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "") and process.returncode == code


def test_training_loads_nothing_heavy_that_it_does_not_need() -> None:
    """What torch would load for compiling and for comparing shapes is seconds and 110 MB at each start; the loops of
    codec `context` take long to compile."""
    code = """if True:
        import sys
        from benchmarks import inprocess
        from benchmarks.recipes import recipe_text
        from device_client.data import load

        text = recipe_text(
            "deprune", bottleneck='kind = "linear"', codec='activation = "step:20"\\ngradient = "step:5"',
            schedule="phases = [[2, 0.05], [4, 0.05]]",
        )
        inprocess.train(text, load("digits", (1, 16, 16), 3, 0.1))
        heavy = {"torch._dynamo", "sympy", "scipy.sparse", "common.codecs.mixing", "matplotlib"}
        sys.exit(" ".join(heavy & set(sys.modules)) or None)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=90, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [".gitignore", ".dockerignore"])
def test_what_a_user_makes_in_a_checkout_stays_out(name: str) -> None:
    """Keys, tokens and pictures where README.md and docs/security.md have them made: neither committed nor sent on."""
    left_out = {line.rstrip("/") for line in (ROOT / name).read_text().splitlines()}
    assert {"runs", "keys", "token", "tokens", "cifar", "pictures"} <= left_out
