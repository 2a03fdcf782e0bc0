"""TOML files and flags to frozen dataclasses: defaults < file < overrides, and no key is ever ignored."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from expkit.errors import UsageError

T = TypeVar("T")


def load_config(cls: type[T], path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> T:
    """Build `cls` from its defaults, then the TOML file, then the overrides.

    Args:
        cls: a dataclass. Fields may be bool, int, float, str, Path, Literal, tuple[...], X | None, or another
            dataclass, which is a table in the file.
        path: the TOML file; None leaves the defaults.
        overrides: flags by dotted key ("optimizer.lr"). A None value means "flag not given" and is ignored.

    Raises:
        UsageError: missing or malformed file, unknown key (the nearest known one is named), wrong type,
            missing required key, or a ValueError from the dataclass's own `__post_init__`. It names the file, unless
            the fault is in an override.
    """
    table = _read_toml(path) if path is not None else {}
    source = str(path) if path is not None else "configuration"
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    for key, value in given.items():
        _set_dotted(table, key, value)
    return typing.cast(T, _Reader(cls, source, tuple(given)).build(cls, table))


def parse_setting(text: str) -> tuple[str, Any]:
    """`optimizer.lr=1e-3`, from a flag `--set`, as an override: the value is TOML, or a plain string where it is none.

    Raises:
        UsageError: there is no "=".
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text!r}: expected KEY=VALUE, for example optimizer.lr=1e-3")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def to_toml(config: object) -> str:
    """Write a config as TOML that `load_config` reads back to an equal object.

    TOML has no null: a field that is None is left out, which is right only where None is its default.

    Raises:
        UsageError: a None in a field whose default is something else, or a value TOML cannot hold.
    """
    return "\n".join(_toml_lines(config, "")) + "\n"


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"configuration file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"configuration file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None


def _set_dotted(table: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UsageError(f'"{parent}" in "{key}" is not a table')
    table[last] = value


@dataclass(frozen=True)
class _Reader:
    """Turns tables into dataclasses; knows the outermost class, the file and the keys of overrides only to say where it
    hurts."""

    root: type
    source: str
    overrides: tuple[str, ...] = ()

    def fail(self, message: str, name: str = "") -> UsageError:
        """An error at a key, or at none in particular: then the file is at fault for certain if nothing overrode it."""
        key, given = f"{name.partition('[')[0]}.", [f"{each}." for each in self.overrides]
        own = any(key.startswith(each) or each.startswith(key) for each in given) if name else bool(given)
        return UsageError(message if own else f"{self.source}: {message}")

    def build(self, cls: Any, table: Mapping[str, Any], prefix: str = "") -> Any:
        hints = typing.get_type_hints(cls)
        known = {field.name: field for field in fields(cls) if field.init}
        for key in table:
            if key not in known:
                nearest = _nearest(prefix + key, self.root)
                raise self.fail(f'unknown key "{prefix}{key}"; did you mean "{nearest}"?', prefix + key)
        values: dict[str, Any] = {}
        for name, field in known.items():
            if name in table:
                values[name] = self.convert(table[name], hints[name], prefix + name)
            elif field.default is MISSING and field.default_factory is MISSING:
                if not is_dataclass(hints[name]):
                    raise self.fail(f'required key "{prefix}{name}" is missing', prefix + name)
                values[name] = self.build(hints[name], {}, f"{prefix}{name}.")
        try:
            return cls(**values)
        except UsageError:
            raise
        except ValueError as error:
            raise self.fail(str(error)) from None

    def convert(self, value: Any, hint: Any, name: str) -> Any:
        """Check a TOML or flag value against a type hint; returns it in that type."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Union, types.UnionType):  # X | None; TOML has no null, so a value is an X
            return self.convert(value, next(each for each in arguments if each is not type(None)), name)
        if origin is Literal:
            if (type(value), value) in [(type(each), each) for each in arguments]:
                return value
            raise self.fail(f"{name} = {value!r} is not one of {', '.join(map(repr, arguments))}", name)
        if origin is tuple and isinstance(value, (list, tuple)):
            return self.convert_tuple(value, arguments, name)
        if is_dataclass(hint) and isinstance(value, Mapping):
            return self.build(hint, value, f"{name}.")
        if hint is float and type(value) is int:
            return float(value)
        if hint is Path and isinstance(value, (str, Path)):
            return Path(value)
        if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or type(value) is not bool):
            return value
        raise self.fail(f"{name} = {value!r} is not {_describe(hint)}", name)

    def convert_tuple(self, value: Sequence[Any], arguments: tuple[Any, ...], name: str) -> tuple[Any, ...]:
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) != len(value):
            raise self.fail(f"{name} has {len(value)} entries where {len(arguments)} are needed", name)
        pairs = zip(value, arguments, strict=True)
        return tuple(self.convert(each, hint, f"{name}[{index}]") for index, (each, hint) in enumerate(pairs))


def _keys(cls: type, prefix: str = "") -> list[str]:
    """Dotted names of every key below a dataclass, tables included."""
    found: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        found.append(prefix + name)
        if is_dataclass(hint) and isinstance(hint, type):
            found.extend(_keys(hint, f"{prefix}{name}."))
    return found


def _nearest(key: str, root: type) -> str:
    """The known key most like `key`: by its full name, or by its last part when it sits in another table."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.split(".")[-1], candidate.split(".")[-1]).ratio()
        return max(whole, last)

    return max(_keys(root), key=likeness)


def _describe(hint: Any) -> str:
    if isinstance(hint, type) and is_dataclass(hint):
        return "a table"
    if typing.get_origin(hint) is tuple:
        return "a list"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path"}
    return names.get(hint, str(hint))


def _toml_lines(config: Any, prefix: str) -> list[str]:
    lines: list[str] = []
    tables: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if not field.init:
            continue
        if is_dataclass(value):
            tables += ["", f"[{prefix}{field.name}]", *_toml_lines(value, f"{prefix}{field.name}.")]
        elif value is not None:
            lines.append(f"{field.name} = {_toml_value(value, prefix + field.name)}")
        elif field.default is not None:
            raise UsageError(f"{prefix}{field.name} = None cannot be written: TOML has no null")
    return lines + tables


def _toml_value(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, Path)):
        # A JSON string is a TOML basic string except for DEL, which TOML wants escaped.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(entry, name) for entry in value) + "]"
    raise UsageError(f"{name} = {value!r} cannot be written as TOML")
