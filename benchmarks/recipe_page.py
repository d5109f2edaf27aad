"""Writes docs/recipe.md, every key of a recipe with its default and meaning, from the dataclasses of common/recipe.py
and the comments that stand there."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from common import recipe

PAGE = Path("docs/recipe.md")
_HEAD = """# Every key of a recipe

A recipe is one TOML file, which the server owns; the device gets it in the handshake. `edge-server recipes` lists
those that come along and prints them, to make one's own of; [README](../README.md#recipes) shows the methods by
example. A key that is not known is refused, as are most that would do nothing, with what to write instead. (Written by
`.venv/bin/python -m benchmarks.recipe_page` from `common/recipe.py`.)
"""
PARTS = {
    "": (recipe.Recipe, "At the top of the file"),
    "model": (recipe.ModelRecipe, "`[model]`"),
    "data": (recipe.DataRecipe, "`[data]`"),
    "bottleneck": (recipe.BottleneckRecipe, "`[bottleneck]`"),
    "codec": (recipe.CodecRecipe, "`[codec]`"),
    "schedule": (recipe.ScheduleRecipe, "`[schedule]`"),
    "phases": (recipe.PhaseRecipe, "An entry of `phases` in `[schedule]`: `[width, epochs]`, or a table"),
    "local": (recipe.LocalRecipe, "`[local]`"),
    "optimiser": (recipe.OptimiserRecipe, "`[optimiser]`"),
}
_FIELD = re.compile(r"    (\w+): [^#]*?(?:  # (.*))?")


def page() -> str:
    parts = [_HEAD]
    for cls, title in PARTS.values():
        lines = [f"## {title}", "", "| key | default | meaning |", "| --- | --- | --- |"]
        lines += [f"| `{name}` | {default} | {meaning} |" for name, default, meaning in keys(cls)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def keys(cls: type) -> Iterator[tuple[str, str, str]]:
    """Of each key its name, default and meaning, as cells of a table."""
    comments = dict(_comments(cls))
    for field in dataclasses.fields(cls):
        if field.name in PARTS and field.name != "phases":  # a table of its own
            continue
        default = "required" if field.default is dataclasses.MISSING else f"`{recipe.in_toml(field.default)}`"
        yield field.name, default, comments[field.name].replace("|", "\\|")


def _comments(cls: type) -> Iterator[tuple[str, str]]:
    """What stands beside each field, or above it."""
    above: list[str] = []
    for line in inspect.getsource(cls).splitlines():
        if line.startswith("    # "):
            above.append(line.removeprefix("    # "))
        elif found := _FIELD.fullmatch(line):
            yield found[1], " ".join([*above, *filter(None, [found[2]])])
            above = []
        elif not line.startswith("    #"):
            above = []


if __name__ == "__main__":
    PAGE.write_text(page())
