"""Generates common/rpc/ from protos/split.proto whenever the project is built or installed, editable or not.

A hatchling hook and not an overridden setuptools command: in editable installs the latter fails silently.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GenerateRpc(BuildHookInterface):
    """Runs protoc; a failure ends the build with protoc's own message."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        target = root / "common" / "rpc"
        target.mkdir(exist_ok=True)
        # `common/rpc=protos` maps the folder, so the generated imports read `from common.rpc import split_pb2`.
        command = [sys.executable, "-m", "grpc_tools.protoc", "-Icommon/rpc=protos", "--python_out=.", "--pyi_out=."]
        subprocess.run([*command, "--grpc_python_out=.", "protos/split.proto"], cwd=root, check=True)
        (target / "__init__.py").write_text('"""Generated from protos/split.proto; never edited."""\n')
