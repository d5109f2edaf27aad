"""Checkpoints of one half: files from which a run goes on, written whole or not at all. Both sides keep their own.

One file a step, safetensors whose metadata holds the rest as JSON and a SHA-256 over everything, so that a damaged
file is known before anything is taken from it. The two sides write at the same steps (`due`), and each keeps its
newest two and the newest that the other side is known to have as well: that is where both can go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from common import memory
from common.errors import RunFolderError
from common.files import write_atomically

if TYPE_CHECKING:
    import torch

EVERY = 200  # steps between two checkpoints, by default
# Raised with each change of what either side writes into a checkpoint: another release then leaves it alone.
_FORMAT = 7
_KEPT = 2
_NAME = re.compile(r"step-(\d{12})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What one half was like before `step`: its tensors, and whatever else it needs as JSON."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


def due(step: int, every: int, *, turn: bool) -> bool:
    """Whether both sides keep a checkpoint before `step`; `turn`: a phase, a validation or the end comes there."""
    return turn or step % every == 0


@dataclass
class Checkpoints:
    """The checkpoints of the run `run_id` in a folder, which is made when the first is written."""

    folder: Path
    run_id: str
    digest: str  # of the recipe
    shared: set[int] = field(default_factory=set)  # those that the other side has, or may have: none of them is dropped
    written: set[int] = field(default_factory=set)  # steps of those that are here and sound

    def write(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Keep a checkpoint and drop those that are needed no more; RunFolderError, and none lost, without room.

        `tensors` share no memory, as tied weights do: safetensors refuses that.
        """
        import safetensors.torch  # torch takes seconds to load: not for a command that only looks into a folder

        header = json.dumps(
            {"format": _FORMAT, "step": step, "run_id": self.run_id, "digest": self.digest, "state": state}
        )
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        data = safetensors.torch.save(whole, {"deprune": header, "sha256": _digest(header, whole)})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{self.folder} cannot be made: {error.strerror}") from error
        write_atomically(path_in(self.folder, step), data)
        self.written.add(step)
        self._prune()
        memory.give_back()

    def confirm(self, step: int) -> None:
        """The other side's newest checkpoint is of `step`: one that this side has too is now the newest of both. 0: it
        has said nothing."""
        if step in self.written and step > max(self.shared, default=-1):
            self.shared = {step}
            self._prune()

    def news(self, step: int, every: int) -> int:
        """What the other side is told with the frames of `step`: `step` itself, if it is one of the regular checkpoints
        and was written; else 0."""
        return step if step % every == 0 and step in self.written else 0

    def sound(self) -> tuple[list[int], list[str]]:
        """Steps of the checkpoints that can be gone on from, the oldest first, and a warning for each other one.

        Called by the process that owns the folder from now on. Removes what an earlier one left half-written.
        """
        good, warnings = [], []
        with contextlib.suppress(FileNotFoundError):
            for path in self.folder.glob(".step-*"):
                path.unlink()
        for step in steps_in(self.folder):
            try:
                self.read(step)
                good.append(step)
            except RunFolderError as error:
                warnings.append(str(error))
        self.written = set(good)
        return good, warnings

    def read(self, step: int) -> Checkpoint:
        """RunFolderError where the file is damaged, or belongs to another run or recipe."""
        path = path_in(self.folder, step)
        header, tensors = read_file(path)
        if (header["run_id"], header["digest"], header["step"]) != (self.run_id, self.digest, step):
            raise RunFolderError(f"{path} is of another run, recipe or step; it is left alone")
        return Checkpoint(step, tensors, header["state"])

    def forget_after(self, step: int) -> None:
        """The run goes on from `step`: remove the checkpoints of later steps, which will be made again.

        Those that are left all count as shared until the other side tells of a newer one. It need not have this very
        step: it may not have been put back at all, because it stood there.
        """
        for later in [other for other in steps_in(self.folder) if other > step]:
            path_in(self.folder, later).unlink(missing_ok=True)
            self.written.discard(later)
        self.shared = set(self.written)

    def clear(self) -> None:
        """Remove all: the run is finished."""
        clear(self.folder)
        self.written.clear()
        self.shared.clear()

    def _prune(self) -> None:
        kept = {*sorted(self.written)[-_KEPT:], *self.shared}
        for step in self.written - kept:
            path_in(self.folder, step).unlink(missing_ok=True)
        self.written &= kept


def part(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with `name` and a dot, without it."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def clear(folder: Path) -> None:
    """Remove the checkpoints in a folder, half-written ones and stores too, and the folder if nothing else is in it."""
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            if path.name.startswith(("step-", ".step-", "store-")):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def unsound(folder: Path) -> str:
    """Why the newest checkpoint in a folder cannot be used; "" where it can, or there is none."""
    for step in steps_in(folder)[-1:]:
        try:
            read_file(path_in(folder, step))
        except RunFolderError as error:
            return str(error)
    return ""


def newest(folder: Path) -> Mapping[str, Any] | None:
    """Header of the newest sound checkpoint in a folder ("run_id", "digest", "step", "state"); None without one."""
    for step in reversed(steps_in(folder)):
        with contextlib.suppress(RunFolderError):
            return read_file(path_in(folder, step))[0]
    return None


def steps_in(folder: Path) -> list[int]:
    """Steps of all checkpoints in a folder, sound or not, the oldest first."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name)))
    return []


def path_in(folder: Path, step: int) -> Path:
    return folder / f"step-{step:012}.safetensors"


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a checkpoint's file; RunFolderError where it is not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is no dict
        text = metadata["deprune"]
        if _digest(text, tensors) != metadata["sha256"]:
            raise ValueError("its checksum is wrong")
        header = json.loads(text)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RunFolderError(f"the checkpoint {path} is damaged ({error}) and is not used") from error
    if header.get("format") != _FORMAT:
        raise RunFolderError(f"the checkpoint {path} was written by another release of deprune and is not used")
    return header, tensors


def _digest(header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    result = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        value = tensors[name]
        result.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        result.update(raw(value))
    return result.hexdigest()


def raw(value: torch.Tensor) -> memoryview:
    """The bytes of a tensor of any type, wherever it is."""
    import torch

    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
