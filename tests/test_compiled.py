"""What numba keeps of compiled loops: nothing of it that is old or damaged is run, or stops anything."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import pytest

from common import codecs
from common.codecs.step import Step

SOURCE = """
from common.codecs.compiled import kept

@kept("i8(i8)")
def add(x):
    return x + {number}
"""


def loaded(path: Path, number: int) -> Any:
    path.write_text(SOURCE.format(number=number))
    spec = importlib.util.spec_from_file_location("loops_of_a_test", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.add


def test_compiled_once(tmp_path: Path) -> None:
    path = tmp_path / "loops.py"
    assert loaded(path, 1)(1) == 2
    assert not loaded(path, 1).stats.cache_misses and loaded(path, 1)(1) == 2


@pytest.mark.parametrize("what", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("left", [0, 40])
def test_damaged_files_are_compiled_anew(what: str, left: int, tmp_path: Path) -> None:
    """As a power cut leaves them: numba writes them without telling the disk to."""
    path = tmp_path / "loops.py"
    loaded(path, 1)
    for file in tmp_path.glob(f"__pycache__/{what}"):
        file.write_bytes(file.read_bytes()[:left])
    assert loaded(path, 1)(1) == 2


def test_code_of_an_older_source_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba says that it has the new code before it has written it: here the disk is full in between."""
    from numba.core import caching

    path = tmp_path / "loops.py"
    assert loaded(path, 1)(1) == 2
    with monkeypatch.context() as patch:
        patch.setattr(caching.IndexDataCacheFile, "_save_data", _full)
        assert loaded(path, 1000)(1) == 1001
    assert loaded(path, 1000)(1) == 1001


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_long_wait_for_codecs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(codecs, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(Step, "load", lambda _: time.sleep(0.5))
    codecs.load("fp16", say=said.append)
    assert not said
    codecs.load("step:20", say=said.append)
    assert len(said) == 1 and "compiled" in said[0]
