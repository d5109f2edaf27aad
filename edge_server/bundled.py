"""The recipes that come along, by name: those in recipes/, which an installed package has beside this file."""

from __future__ import annotations

from pathlib import Path

from common.errors import RecipeError

_HERE = Path(__file__).parent


def names() -> list[str]:
    return sorted(path.stem for path in _folder().glob("*.toml"))


def path_of(given: Path) -> Path:
    """`given` where it is a file, or is written like one; else the bundled recipe of that name."""
    if given.exists() or given.suffix or given.name != str(given):
        return given
    if given.name not in names():
        raise RecipeError(f"there is no file {given}, and no recipe of that name comes along: {', '.join(names())}")
    return _folder() / f"{given}.toml"


def _folder() -> Path:
    installed = _HERE / "recipes"
    return installed if installed.is_dir() else _HERE.parent / "recipes"
