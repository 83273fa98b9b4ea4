"""JSON as requests may have it: RFC 8259 in UTF-8, and nothing that Python adds. No torch.

NaN, Infinity, numbers beyond a double, lone surrogates, repeated keys, too deep nesting and too long integers are refused (400).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from herd.server.errors import ApiError

__all__ = ["MAX_DEPTH", "strict_json"]

MAX_DEPTH = 128
"""Arrays and objects inside each other."""
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")


def strict_json(data: bytes) -> Any:
    """The value of a body. Raises ApiError (400) saying what is wrong, without repeating the body."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refused(f"it is not UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise _refused("it begins with a byte order mark")
    _check_depth(data)
    try:
        value = json.loads(
            text, parse_constant=_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        raise _refused(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise _refused(f"it is nested deeper than {MAX_DEPTH} levels") from None
    if b"\\" in data and b"\\u" in data:  # one byte is found ten times faster than two: 15 ms of a body of 16 MB
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _refused("it holds half of a surrogate pair, which is no character") from None
    return value


def _check_depth(data: bytes) -> None:
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _BRACKETS.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise _refused(f"it is nested deeper than {MAX_DEPTH} levels")


def _refused(why: str) -> ApiError:
    return ApiError(400, f"the body is not JSON that can be read: {why}", code="invalid_json")


def _constant(name: str) -> Any:
    raise _refused(f"{name} is no JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _refused("a number is too large")
    return value


def _int(digits: str) -> int:
    if len(digits) > 400:
        raise _refused("a number is too large")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _refused("an object has the same key twice")
    return members
