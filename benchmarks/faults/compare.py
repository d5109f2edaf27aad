"""Whether a run that suffered faults is the run without any: weights, losses, outcome, and the meters' books."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

HALVES = {"device": "head.safetensors", "server": "tail.safetensors"}
_LINE = ("step", "phase", "width", "loss", "accuracy")


def differences(reference: Path, run: Path) -> list[str]:
    """What is not as it should be, a sentence each; both folders hold `device` and `server` of a finished run."""
    try:
        return [*_weights(reference, run), *_lines(reference, run), *_outcome(reference, run), *_books(run)]
    except (OSError, ValueError, KeyError) as error:
        return [f"the run in {run} cannot be read: {error!r}"]


def weights_equal(reference: Path, run: Path) -> bool:
    return not list(_weights(reference, run))


def _weights(reference: Path, run: Path) -> list[str]:
    found = []
    for side, name in HALVES.items():
        ours, theirs = load_file(run / side / name), load_file(reference / side / name)
        # Bytes, not values: NaN differs from itself, and 0.0 doesn't from -0.0.
        same = ours.keys() == theirs.keys() and all(
            (ours[key].dtype, ours[key].shape, ours[key].tobytes())
            == (theirs[key].dtype, theirs[key].shape, theirs[key].tobytes())
            for key in theirs
        )
        if not same:
            odd = [key for key in theirs if key not in ours or ours[key].tobytes() != theirs[key].tobytes()]
            found.append(f"{side}/{name} differs in {len(odd)} of {len(theirs)} tensors")
    return found


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _lines(reference: Path, run: Path) -> list[str]:
    """Each step once, on both sides, with the loss that it has without faults."""
    found = []
    for side in HALVES:
        ours, theirs = _metrics(run / side), _metrics(reference / side)
        steps, wanted = [line["step"] for line in ours], [line["step"] for line in theirs]
        if steps != wanted:
            twice = len(steps) - len(set(steps))
            missing = len(set(wanted) - set(steps))
            found.append(f"{side}/metrics.jsonl has {twice} steps twice, {missing} not at all, or not in order")
            continue
        odd = [a["step"] for a, b in zip(ours, theirs, strict=True) if any(a[key] != b[key] for key in _LINE)]
        if odd:
            found.append(f"{side}/metrics.jsonl differs in {len(odd)} steps, first in step {odd[0]}")
    return found


def summary(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return table


def _outcome(reference: Path, run: Path) -> list[str]:
    found = []
    for side in HALVES:
        ours, theirs = summary(run / side), summary(reference / side)
        for key in ("accuracy", "loss", "steps", "samples", "phases"):
            if ours[key] != theirs[key]:
                found.append(f"{side}/summary.json has {key} {ours[key]}, {theirs[key]} without faults")
    return found


def _books(run: Path) -> list[str]:
    """Payload and message bytes by role and direction: what the device counted, the server must have counted too."""
    device, server = (summary(run / side)["bytes"] for side in HALVES)
    found = []
    for way in ("up", "down"):
        ours, theirs = device[way]["by_role"], server[way]["by_role"]
        odd = [role for role in sorted({*ours, *theirs}) if ours.get(role) != theirs.get(role)]
        if odd:
            found.append(f"the meters disagree on bytes {way} of {', '.join(odd)}")
    lines = (_metrics(run / side) for side in HALVES)
    odd_steps = [a["step"] for a, b in zip(*lines, strict=False) if a["bytes"] != b["bytes"]]
    if odd_steps:
        found.append(f"the meters disagree on the bytes of {len(odd_steps)} steps, first of step {odd_steps[0]}")
    return found
