"""A table of TOML becomes a frozen dataclass, checked against its annotations; called by recipe.py."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any

from common.errors import RecipeError
from common.words import several


def demand(holds: bool, message: str) -> None:
    if not holds:
        raise RecipeError(message)


def one_of(where: str, value: str, legal: typing.Collection[str]) -> None:
    demand(value in legal, f"{where} is {value!r}; legal are {', '.join(legal)}")


def build(cls: type, table: dict[str, Any], prefix: str = "", root: type | None = None) -> Any:
    """The dataclass `cls` of a table whose key in the file is `prefix`; RecipeError names the key and what is legal.

    A dataclass with SHORT may also be written as a list of the fields that have no default; SHORT is how, for people.
    `root`: the dataclass of the whole file.
    """
    hints = typing.get_type_hints(cls)
    fields, root = {f.name: f for f in dataclasses.fields(cls)}, root or cls
    for key in table:
        if key not in fields:
            raise RecipeError(f"unknown key {prefix}{key}{_advice(key, cls, root)} (legal: {', '.join(fields)})")
    values = {}
    for name, spec in fields.items():
        if name in table:
            values[name] = _convert(table[name], hints[name], prefix + name, root)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise RecipeError(f"key {prefix}{name} is missing")
    return cls(**values)


def _advice(key: str, cls: type, root: type) -> str:
    """Where a key that is unknown in `cls` may belong."""
    for name, hint in typing.get_type_hints(cls).items():
        if isinstance(hint, types.GenericAlias) and key in _fields(hint.__args__[0]):
            return f"; it belongs in {name}: {hint.__args__[0].SHORT}"
    if near := difflib.get_close_matches(key, _fields(cls), n=1):
        return f"; did you mean {near[0]}?"
    homes = [f"in [{name}]" for name, hint in typing.get_type_hints(root).items() if key in _fields(hint)]
    homes += ["at the top of the file"] if key in _fields(root) else []
    return f"; it belongs {' or '.join(homes)}" if homes else ""


def _fields(hint: Any) -> list[str]:
    return [spec.name for spec in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else []


def _convert(value: Any, hint: Any, where: str, root: type) -> Any:
    short = getattr(hint, "SHORT", "")
    if short and isinstance(value, list):
        keys = [spec.name for spec in dataclasses.fields(hint) if spec.default is dataclasses.MISSING]
        demand(
            len(value) == len(keys),
            f"{where} has {several(len(value), 'item')}; give {short.partition(', such')[0]}, or a table",
        )
        value = dict(zip(keys, value, strict=True))
    if dataclasses.is_dataclass(hint):
        form = f"{short}, or a table" if short else f"a table, [{where}]"
        demand(isinstance(value, dict), f"{where} must be {form}")
        return build(typing.cast(type, hint), value, f"{where}.", root)
    if isinstance(hint, types.GenericAlias):
        args = hint.__args__
        demand(isinstance(value, list), f"{where} is {value!r}; give a list")
        if args[-1] is Ellipsis:
            return tuple(_convert(item, args[0], f"{where}[{i}]", root) for i, item in enumerate(value))
        demand(len(value) == len(args), f"{where} has {several(len(value), 'item')}; give {len(args)}")
        return tuple(
            _convert(item, arg, f"{where}[{i}]", root) for i, (item, arg) in enumerate(zip(value, args, strict=True))
        )
    if hint is float and type(value) is int:
        demand(abs(value) < 2**1000, f"{where} is too large; give a finite number")
        value = float(value)
    names = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}
    # `type(...) is`: TOML's true is no number, though Python's bool is an int.
    demand(type(value) is hint, f"{where} is {value!r}; give {names[hint]}")
    demand(not (hint is float and not abs(value) < float("inf")), f"{where} is {value}; give a finite number")
    return value
