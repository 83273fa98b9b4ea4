"""Calls written as JSON: `{"name": "f", "parameters": {...}}` in the shapes that models write, and lists of them. No torch."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["CALL_KEYS", "json_value", "parse_json_calls"]

CALL_KEYS = frozenset({"type", "name", "parameters", "arguments", "function", "id"})
"""Every key that an object which is a call may have."""


def parse_json_calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Names and arguments of one JSON call or a JSON array of calls, which must be all of `text`; else None."""
    value = json_value(text)
    calls = [_json_call(item) for item in (value if isinstance(value, list) else [value])]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def json_value(text: str) -> Any:
    """The JSON value that `text` is, or None. Line ends inside strings are taken, for models write them; numbers that are
    not finite and halves of surrogate pairs are not: nobody could pass them on."""
    try:
        value = json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)


def _json_call(value: Any) -> tuple[str, dict[str, Any]] | None:
    if not isinstance(value, dict) or not value.keys() <= CALL_KEYS or value.get("type", "function") != "function":
        return None
    if isinstance(value.get("function"), dict):  # OpenAI's shape, which models have seen too
        return _json_call(value["function"]) if not {"name", "parameters", "arguments"} & value.keys() else None
    name = value.get("name", value.get("function"))
    if not isinstance(name, str) or {"parameters", "arguments"} <= value.keys():
        return None
    arguments = value.get("parameters", value.get("arguments", {}))
    if isinstance(arguments, str):
        arguments = json_value(arguments)
    return (name, arguments) if isinstance(arguments, dict) else None
