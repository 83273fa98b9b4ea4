"""Calls written as Python: `[f(a=1), g(b='x')]` and `brave_search.call(query="...")`. Reading and printing. No torch.

The text comes from a model, so nothing is ever evaluated or compiled: a small reader takes names, keyword arguments and
literals (strings, numbers, True/False/None and their JSON spellings, lists, tuples, dicts), and nothing else. It does not use
`ast`, which refuses argument names that are Python keywords (`book(from="A")`), warns about unknown escapes, and recurses
without a limit on hostile text. Tests hold the literals equal to `ast.literal_eval`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from herd.chat.messages import ToolCall
from herd.errors import PromptError

__all__ = ["MAX_DEPTH", "parse_dotted_call", "parse_python_calls", "print_dotted_call", "print_python_calls"]

MAX_DEPTH = 64
"""Deepest nesting of lists and dicts that is read as arguments; deeper text is not a call."""

FUNCTION_NAME = re.compile(r"\w[\w-]*(?:\.\w[\w-]*)*")
ARGUMENT_NAME = re.compile(r"[^\W\d][\w-]*")
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?)")
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = {"\n": "", "\\": "\\", "'": "'", '"': '"', "n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f"}
_ESCAPES |= {"a": "\a", "v": "\v"}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}


class _NotACall(Exception):
    """The text is not a call in this syntax; never leaves this module."""


def parse_python_calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Names and arguments of `[f(a=1), g()]`, which must be all of `text`; None when it is anything else."""
    reader = _Reader(text)
    try:
        reader.expect("[")
        calls = [reader.call()]
        while reader.take(","):
            if reader.peek() == "]":
                break
            calls.append(reader.call())
        reader.expect("]")
        reader.end()
    except _NotACall:
        return None
    return calls


def parse_dotted_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of `name.call(query="...")`, which must be all of `text`; None when it is anything else."""
    reader = _Reader(text)
    try:
        name, arguments = reader.call()
        reader.end()
    except _NotACall:
        return None
    return (name.removesuffix(".call"), arguments) if name.endswith(".call") else None


def print_python_calls(calls: Sequence[ToolCall]) -> str:
    """`[f(a=1), g(b="x")]`. Raises PromptError for a name or a value that Python call syntax cannot hold."""
    return f"[{', '.join(_print_call(call.name, call.arguments) for call in calls)}]"


def print_dotted_call(call: ToolCall) -> str:
    """`name.call(query="...")`, the built-in tools' form."""
    return _print_call(f"{call.name}.call", call.arguments)


def _print_call(name: str, arguments: Mapping[str, Any]) -> str:
    if not FUNCTION_NAME.fullmatch(name):
        raise PromptError(f"tool name {name!r} cannot be written as a Python call: use letters, digits, _ - and .")
    for key in arguments:
        if not ARGUMENT_NAME.fullmatch(key):
            raise PromptError(f"argument {key!r} of {name} cannot be written as a Python keyword argument: rename it")
    return f"{name}({', '.join(f'{key}={_print_value(value, name)}' for key, value in arguments.items())})"


def _print_value(value: Any, name: str) -> str:
    if isinstance(value, str):
        # A JSON string is also a Python string, and short ones look as in Meta's prints: "text".
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        items = (f"{_print_value(key, name)}: {_print_value(item, name)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_print_value(item, name) for item in value)}]"
    raise PromptError(f"an argument of {name} holds {value!r}: tool arguments must be JSON values")


class _Reader:
    """A position in a text. Every method moves past what it read or raises _NotACall."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def peek(self) -> str:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.text[self.at : self.at + 1]

    def take(self, char: str) -> bool:
        if self.peek() != char:
            return False
        self.at += 1
        return True

    def expect(self, char: str) -> None:
        if not self.take(char):
            raise _NotACall

    def end(self) -> None:
        if self.peek():
            raise _NotACall

    def match(self, pattern: re.Pattern[str]) -> str:
        self.peek()
        found = pattern.match(self.text, self.at)
        if found is None or not found.group():
            raise _NotACall
        self.at = found.end()
        return found.group()

    def call(self) -> tuple[str, dict[str, Any]]:
        name = self.match(FUNCTION_NAME)
        self.expect("(")
        arguments: dict[str, Any] = {}
        while self.peek() != ")":
            key = self.match(ARGUMENT_NAME)
            self.expect("=")
            if key in arguments:
                raise _NotACall
            arguments[key] = self.value(0)
            if not self.take(","):
                break
        self.expect(")")
        return name, arguments

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _NotACall
        char = self.peek()
        if char == "[":
            return self.sequence("[", "]", depth)[0]
        if char == "(":
            items, commas = self.sequence("(", ")", depth)
            return items[0] if len(items) == 1 and not commas else items
        if char == "{":
            return self.mapping(depth)
        if char and (char in "\"'" or (char in "rR" and self.text[self.at + 1 : self.at + 2] in ("'", '"'))):
            text = self.string()
            while self.peek() in ("'", '"'):  # adjacent literals join, as in Python
                text += self.string()
            return text
        if char.isalpha():
            word = self.match(ARGUMENT_NAME)
            if word not in _WORDS:
                raise _NotACall
            return _WORDS[word]
        return self.number()

    def sequence(self, opening: str, closing: str, depth: int) -> tuple[list[Any], int]:
        """Items and how many commas stood between and behind them."""
        self.expect(opening)
        items: list[Any] = []
        commas = 0
        while self.peek() != closing:
            items.append(self.value(depth + 1))
            if not self.take(","):
                break
            commas += 1
        self.expect(closing)
        return items, commas

    def mapping(self, depth: int) -> dict[str, Any]:
        self.expect("{")
        found: dict[str, Any] = {}
        while self.peek() != "}":
            key = self.value(depth + 1)
            if not isinstance(key, str):  # arguments are JSON values, and JSON keys are strings
                raise _NotACall
            self.expect(":")
            found[key] = self.value(depth + 1)
            if not self.take(","):
                break
        self.expect("}")
        return found

    def number(self) -> int | float:
        text = self.match(_NUMBER)
        following = self.text[self.at : self.at + 1]
        if following.isalnum() or following == "_":
            raise _NotACall
        try:
            if "x" in text.lower():
                return int(text, 16)
            if any(char in text for char in ".eE"):
                value = float(text)
                if math.isfinite(value):
                    return value
                raise _NotACall
            return int(text)
        except ValueError as error:  # 1__0, or more digits than Python converts
            raise _NotACall from error

    def string(self) -> str:
        raw = self.text[self.at] in "rR"
        self.at += raw
        quote = self.text[self.at]
        if self.text.startswith(quote * 3, self.at):
            quote *= 3
        self.at += len(quote)
        pieces: list[str] = []
        while not self.text.startswith(quote, self.at):
            if self.at >= len(self.text):
                raise _NotACall
            char = self.text[self.at]
            if char == "\\" and raw:
                pieces.append(self.text[self.at : self.at + 2])
                self.at += 2
            elif char == "\\":
                pieces.append(self.escape())
            else:
                pieces.append(char)
                self.at += 1
        self.at += len(quote)
        return "".join(pieces)

    def escape(self) -> str:
        char = self.text[self.at + 1 : self.at + 2]
        if not char:
            raise _NotACall
        self.at += 2
        if char in _HEX_ESCAPES:
            digits = self.text[self.at : self.at + _HEX_ESCAPES[char]]
            if not re.fullmatch(rf"[0-9a-fA-F]{{{_HEX_ESCAPES[char]}}}", digits):
                raise _NotACall
            self.at += len(digits)
            code = int(digits, 16)
            if char == "u" and 0xD800 <= code < 0xDC00 and self.text.startswith("\\u", self.at):
                return self.surrogates(code)
            if code > 0x10FFFF or 0xD800 <= code < 0xE000:
                raise _NotACall
            return chr(code)
        if char in "01234567":
            match = re.compile(r"[0-7]{1,3}").match(self.text, self.at - 1)
            assert match is not None
            self.at = match.end()
            return chr(int(match.group(), 8))
        return _ESCAPES.get(char, "\\" + char)  # an unknown escape stands for itself, as in Python

    def surrogates(self, high: int) -> str:
        """A character as two JSON escapes (which models write inside Python strings too)."""
        digits = self.text[self.at + 2 : self.at + 6]
        if not re.fullmatch(r"[dD][c-fC-F][0-9a-fA-F]{2}", digits):
            raise _NotACall
        self.at += 6
        return chr(0x10000 + ((high - 0xD800) << 10) + (int(digits, 16) - 0xDC00))
