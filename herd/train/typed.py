"""Dataclasses from plain values and back: types checked, unknown keys refused, the text under every field found.

The types that are understood: bool, int, float, str, None, Literal, unions of these, tuples, dictionaries and dataclasses. Two
short forms are accepted: a single value where a tuple is wanted, and a bare value for a dataclass with one required field
(`sources: stories.jsonl`).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from herd.errors import ConfigError

__all__ = ["Raw", "build", "documents", "keys", "nearest", "plain", "spelled", "types_of"]


class Raw(str):
    """A value as a command line gives it: text for a field that holds text, and YAML for any other."""


def build(cls: type, value: Any, where: str = "") -> Any:
    """The dataclass `cls` from a mapping. `where` is the dotted key that errors begin with. Raises ConfigError."""
    if isinstance(value, cls):
        return value
    if isinstance(value, Raw):
        value = _yaml(value, where)
    if not isinstance(value, Mapping):
        needed = [f.name for f in dataclasses.fields(cls) if _required(f)]
        if len(needed) != 1 or value is None or isinstance(value, (list, tuple)):
            raise ConfigError(
                f"{where or 'the configuration'}: expected keys ({', '.join(keys(cls))}), not {_short(value)}"
                + _meant(cls, value, where)
            )
        value = {needed[0]: value}
    hints = types_of(cls)
    made: dict[str, Any] = {}
    for key, given in value.items():
        if key not in hints:
            raise ConfigError(f"{_join(where, str(key))}: there is no such key; {nearest(str(key), keys(cls))}")
        made[key] = _convert(hints[key], given, _join(where, key))
    missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in made]
    if missing:
        raise ConfigError(
            f"{_join(where, missing[0])} is missing: {_first_sentence(documents(cls).get(missing[0], ''))}"
        )
    return cls(**made)


def _meant(cls: type, value: Any, where: str) -> str:
    """A hint for a bare text where only `source` takes one: `model: nano`."""
    return (
        f": did you mean {_join(where, 'source')}={value}?" if isinstance(value, str) and "source" in keys(cls) else ""
    )


def plain(value: Any) -> Any:
    """What YAML and JSON can hold of a dataclass: mappings, lists and scalars, every field in its order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def keys(cls: type) -> list[str]:
    """The names of the fields of `cls`, in order."""
    return [f.name for f in dataclasses.fields(cls)]


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """Field name -> type, resolved."""
    hints = typing.get_type_hints(cls)
    return {name: hints[name] for name in keys(cls)}


@functools.cache
def documents(cls: type) -> dict[str, str]:
    """Field name -> the string literal under it in the source, or its row in the class's own text ("name   what it is"), in one
    line. {} where the source is not at hand."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    except (OSError, TypeError):
        return {}
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    rows = re.findall(r"^(\w+) {2,}(.+(?:\n {2,}.+)*)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE)
    found = {name: " ".join(text.split()) for name, text in rows if name in keys(cls)}
    for this, after in itertools.pairwise(body):
        if (
            isinstance(this, ast.AnnAssign)
            and isinstance(this.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[this.target.id] = " ".join(after.value.value.split())
    return {name: re.sub(r"\bNone\b", "null", text) for name, text in found.items()}


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint: the nearest known names, or all of them."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"the keys here are {', '.join(known)}"


def spelled(hint: Any) -> str:
    """A type in the words of a reader of YAML: "a number", "one of wsd, cosine", "a list of texts or null"."""
    words = _words(hint)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _words(hint: Any) -> list[str]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return [word for part in get_args(hint) for word in _words(part)]
    if origin is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        return [f"one of {', '.join(choices)}"] if len(choices) > 1 else choices
    if origin is tuple:
        parts = get_args(hint)
        return [f"a list of {_words(parts[0])[0]}" if parts[-1] is Ellipsis else f"a list of {len(parts)} numbers"]
    if origin is dict or hint is dict:
        return ["keys with values"]
    if dataclasses.is_dataclass(hint):
        return ["keys with values"]
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", types.NoneType: "null"}
    return [names.get(hint, str(hint))]


def _convert(hint: Any, value: Any, where: str) -> Any:
    try:
        return _typed(hint, value, where)
    except _Unfit:
        raise ConfigError(f"{where}: expected {spelled(hint)}, not {_short(value)}") from None


class _Unfit(Exception):
    """A value that is not of a type; another one of a union may take it."""


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _one_of_types(get_args(hint), value, where)
    if isinstance(value, Raw) and hint is not str and not dataclasses.is_dataclass(hint):
        return _typed(hint, _yaml(value, where), where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in get_args(hint)):
            raise _Unfit
        return value
    if origin is tuple:
        return _tuple(get_args(hint), value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _Unfit
        return {str(key): _convert(get_args(hint)[1], item, _join(where, str(key))) for key, item in value.items()}
    return _scalar(hint, value)


def _scalar(hint: Any, value: Any) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as a text
        try:
            return float(value)
        except ValueError:
            raise _Unfit from None
    if hint is int and isinstance(value, float) and value == int(value):  # 1e9 tokens
        return int(value)
    if hint is int and isinstance(value, str) and _is_whole(value):
        return int(float(value))
    if isinstance(value, Raw):
        return str(value)
    if type(value) is not hint:
        raise _Unfit
    return value


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except (ValueError, OverflowError):
        return False


def _one_of_types(hints: Sequence[Any], value: Any, where: str) -> Any:
    if isinstance(value, Raw) and types.NoneType in hints and _yaml(value, where) is None:
        return None
    first: ConfigError | None = None
    # Texts last, so that "8" for `int | str` is a number, as YAML has it.
    for hint in sorted(hints, key=lambda one: one is str):
        try:
            return _typed(hint, value, where)
        except _Unfit:
            continue
        except ConfigError as error:
            first = first or error
    if first is not None:
        raise first
    raise _Unfit


def _tuple(parts: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if value is None or (isinstance(value, str) and parts[-1] is not Ellipsis):
        raise _Unfit
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if parts[-1] is Ellipsis:
        return tuple(_convert(parts[0], item, f"{where}.{i}") for i, item in enumerate(items))
    if len(items) != len(parts):
        raise _Unfit
    return tuple(_convert(part, item, f"{where}.{i}") for i, (part, item) in enumerate(zip(parts, items, strict=True)))


def _yaml(text: Raw, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"{where}: {_short(text)} is not YAML; put quotes around a text with special characters"
        ) from None


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].rstrip(".") or "this key is required"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _short(value: Any) -> str:
    text = repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
