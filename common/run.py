"""The run folder of one side: recipe.toml, run.json, metrics.jsonl, summary.json, the half's weights, checkpoints/;
the device's also local/, while its head learns alone, and alone.safetensors, what it has learnt so.

Everything but metrics.jsonl is written whole or not at all; a folder with another run in it is never touched
unless its user says so. An unfinished run goes on from its checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import checkpoint
from common import recipe as recipes
from common.errors import MismatchError, RecipeError, RunFolderError
from common.files import write_atomically
from common.metrics import MetricsLog
from common.recipe import Recipe
from common.schedule import Phase, phase_of_table

if TYPE_CHECKING:
    from torch import nn

ALONE_FILE = "alone.safetensors"
_OURS = (
    "recipe.toml", "run.json", "metrics.jsonl", "summary.json", "head.safetensors", "tail.safetensors", ALONE_FILE,
)  # fmt: skip
HEAD, TAIL = "head", "tail"
_HOLDERS = {HEAD: "device", TAIL: "server"}
_LOCK = ".lock"
# Room for weights twice over (the temporary copy) is asked for, and this for metrics and summary.
_SPARE_BYTES = 8 << 20


@dataclass(frozen=True)
class Manifest:
    """run.json: what a half needs to know of the run it belongs to."""

    run_id: str
    digest: str
    classes: tuple[str, ...]
    phase: Phase  # the last one: how the bottleneck and the codecs stand


@dataclass
class RunFolder:
    path: Path
    metrics: MetricsLog | None = field(default=None, repr=False)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from training in this folder; RunFolderError where one does. Leaves nothing behind in a
        folder that was not made yet and stays empty."""
        if self.path.is_symlink() and not self.path.exists():
            target = self.path.readlink()
            raise RunFolderError(
                f"run folder {self.path} is a link to {target}, which is not there: is its disk mounted?"
            )
        try:
            missing = [place for place in (self.path, *self.path.absolute().parents) if not place.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / _LOCK).open("a+")
        except OSError as error:
            raise RunFolderError(f"run folder {self.path} cannot be used: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by the kernel, however the process ends
                if not os.path.samestat(os.fstat(file.fileno()), (self.path / _LOCK).stat()):
                    raise BlockingIOError  # its last holder took it away just now
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise RunFolderError(
                    f"run folder {self.path} is in use by {holder}; stop that first, or choose another --run"
                ) from None
            except OSError as error:
                raise RunFolderError(
                    f"run folder {self.path} cannot be locked against other processes ({error.strerror}); choose one "
                    f"on a local disk"
                ) from error
            with contextlib.suppress(OSError):  # on a full disk nobody is told by whom it is held, and it is held
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # something lies there, or nothing can be written any more
                    (self.path / _LOCK).unlink(missing_ok=True)
                    for place in missing:
                        place.rmdir()

    def prepare(self, overwrite: bool, needed_bytes: int = 0, wanted: Recipe | None = None) -> None:
        """Make sure that a run, of the `wanted` recipe, can be written here; RunFolderError where another lies here or
        space is short."""
        try:
            # Made only when the run starts, so that one that never did leaves nothing behind.
            present = [name for name in _OURS if (self.path / name).exists()]
            untrained = self._untrained(present)
            nearest = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
            if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"{nearest} is no folder that can be written to")
            free = shutil.disk_usage(nearest).free
        except OSError as error:
            raise RunFolderError(f"run folder {self.path} cannot be used: {error.strerror}") from error
        if present and not untrained and not overwrite:
            kind = "a finished" if "summary.json" in present else "an unfinished"
            if kind == "an unfinished" and not self.unfinished() and (why := checkpoint.unsound(self.checkpoints)):
                raise RunFolderError(
                    f"{self.path} holds an unfinished run that cannot be gone on with: {why}; choose another --run, or "
                    f"pass --overwrite, which deletes that run"
                )
            differs = self.differs(wanted) if wanted else ""
            raise RunFolderError(
                f"{self.path} already holds {kind} run, and not this one{differs}; choose another --run, or pass "
                f"--overwrite, which deletes that run"
            )
        if free < needed_bytes + _SPARE_BYTES:
            raise RunFolderError(
                f"{self.path} has {free / 1e6:.0f} MB of free disk; "
                f"this run needs {(needed_bytes + _SPARE_BYTES) / 1e6:.0f}"
            )

    def _untrained(self, present: Sequence[str]) -> bool:
        """Whether the run that lies here, of which these are `present`, made no step: there is nothing to lose."""
        metrics = self.path / "metrics.jsonl"
        only = {"recipe.toml", metrics.name, ALONE_FILE}.issuperset(present)
        return only and metrics.is_file() and not metrics.stat().st_size and not self.unfinished()

    def left_by(self, half: str) -> Mapping[str, Any] | None:
        """As `unfinished`, for the side with this half; RunFolderError where the run that lies here is the other's, or
        where the folders of both lie here."""
        other = TAIL if half == HEAD else HEAD
        saved = self.unfinished()
        if saved:
            theirs = saved["state"]["half"] == other
        else:  # a server may hold both, where the head was published
            there = [name for name in (half, other) if (self.path / f"{name}.safetensors").is_file()]
            theirs = there == [other]
            inside = self.path / _HOLDERS[half]
            if not there and (inside / "run.json").is_file():
                raise RunFolderError(f"{self.path} holds the folders of a run's two sides: give {inside}")
        if theirs:
            raise RunFolderError(
                f"{self.path} is the folder of the {_HOLDERS[other]} of a run, and the {_HOLDERS[half]} keeps its own: "
                f"give that, or another folder"
            )
        return saved

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def local(self) -> Path:
        """Checkpoints of what the device's head learns before the run begins."""
        return self.path / "local"

    def unfinished(self) -> Mapping[str, Any] | None:
        """Head of the newest sound checkpoint of a run that was not finished; None where there is nothing to go on."""
        return None if (self.path / "summary.json").is_file() else checkpoint.newest(self.checkpoints)

    def differs(self, other: Recipe) -> str:
        """What another recipe says otherwise than the one that lies here, in brackets; "" where that is not known."""
        try:
            here, _ = recipes.load(self.path / "recipe.toml")
        except RecipeError:  # of another release, or edited since
            return ""
        found = [
            f"{key} is {recipes.in_toml(now)} and was {recipes.in_toml(before)}"
            for key, before, now in recipes.differences(here, other)
        ]
        return f" ({'; '.join(found[:3])}{'; and more' * (len(found) > 3)})" if found else ""

    def finished(self) -> Manifest | None:
        """The manifest of the finished run that lies here."""
        return self.read()[2] if (self.path / "summary.json").is_file() else None

    def start(self, recipe_text: str) -> None:
        """Make the folder, clear what an earlier run left there and open the metrics."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"run folder {self.path} cannot be made: {error.strerror}") from error
        checkpoint.clear(self.checkpoints)
        for name in _OURS:
            if name != "metrics.jsonl":  # opened anew below; it may be a link that its user made
                (self.path / name).unlink(missing_ok=True)
        write_atomically(self.path / "recipe.toml", recipe_text.encode())
        self.metrics = MetricsLog(self.path / "metrics.jsonl")

    def resume(self, step: int) -> dict[str, int]:
        """Go on from `step` with the run that lies here; the steps and bytes that are lost by that, as of `rewind`."""
        for name in ("head.safetensors", "tail.safetensors", "run.json"):
            (self.path / name).unlink(missing_ok=True)  # of an end that is made once more
        if self.metrics is None:
            self.metrics = MetricsLog(self.path / "metrics.jsonl", resume=True)
        return self.metrics.rewind(step)

    def log(self, line: dict[str, Any]) -> str | None:
        """A line of metrics.jsonl; the warning to show, once, where it could not be written."""
        return self.metrics.append(line) if self.metrics else None

    def sync(self) -> None:
        """Make the metrics safe on the disk: a checkpoint that is written next goes on from them."""
        if self.metrics:
            self.metrics.sync()

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
            self.metrics = None

    def write_half(self, name: str, half: nn.Module, manifest: Manifest) -> None:
        """Save `head` or `tail` with its manifest."""
        from common import weights  # which loads torch: not for a command that only looks into a folder

        write_atomically(self.path / f"{name}.safetensors", weights.to_bytes(half))
        write_atomically(self.path / "run.json", json.dumps(asdict(manifest), indent=1).encode())

    def write_alone(self, network: nn.Module) -> None:
        """Save what the device can be asked without a server."""
        from common import weights

        write_atomically(self.path / ALONE_FILE, weights.to_bytes(network))

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")

    def forget_checkpoints(self) -> None:
        """The run is finished: what it could go on from is not needed any more. What cannot be removed stays."""
        for folder in (self.checkpoints, self.local):
            with contextlib.suppress(OSError):
                checkpoint.clear(folder)

    def read(self) -> tuple[Recipe, str, Manifest]:
        """Recipe, its text and manifest of a finished run; RunFolderError where there is none here."""
        if not (self.path / "run.json").is_file():
            raise RunFolderError(
                f"{self.path.absolute()} holds no finished run (no run.json there); train one first, or check the path"
            )
        recipe, text = recipes.load(self.path / "recipe.toml")
        try:
            table = json.loads((self.path / "run.json").read_text())
            phase = phase_of_table(table["phase"])
            manifest = Manifest(table["run_id"], table["digest"], tuple(table["classes"]), phase)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{self.path}/run.json is damaged: {error!r}") from error
        return recipe, text, manifest

    def head_of(self, run_id: str) -> tuple[Recipe, Manifest]:
        """Recipe and manifest of a finished run whose head lies here; MismatchError where it is another's."""
        self.left_by(HEAD)
        recipe, _, manifest = self.read()
        if manifest.run_id != run_id:
            raise MismatchError(
                f"{self.path} holds the head of run {manifest.run_id}; the recipe starts from run {run_id}"
            )
        return recipe, manifest

    def fill_half(self, name: str, half: nn.Module) -> None:
        from common import weights

        path = self.path / f"{name}.safetensors"
        weights.fill(half, weights.read(path), str(path))
