"""What llguidance is given for a constraint, what is refused before that, and its messages in short."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from herd.chat.params import Constraint
from herd.errors import ConfigError

__all__ = ["checked", "children", "json_source", "reason", "source_of"]

MAX_PATTERN = 4_000
"""Characters of one regex: building an automaton can take time in the square of them, which no fuel limits."""
MAX_MULTIPLE = 10_000
"""Largest multipleOf, in units of its last decimal: the automaton has that many states, and no fuel limit either."""
TERMINAL = re.compile(r"/(?:[^/\\\n]|\\.)*/")
WHITESPACE = r" |\r?\n[ \t]{0,32}"
"""Between the parts of JSON: a space, or a line break and indentation. With all that JSON allows, small models fill the rest of
their reply with blank lines."""
JSON_OPTIONS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}
"""All of llguidance's options, so that a schema cannot set them itself."""
HOLDERS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
VALUES = ("const", "enum", "default", "examples", "example")


def source_of(constraint: Constraint) -> str:
    """What llguidance compiles for `constraint`. Raises ValueError with its message where that already fails."""
    from llguidance import LLMatcher

    match constraint.kind:
        case "regex":
            return LLMatcher.grammar_from_regex(constraint.text)
        case "grammar":
            return LLMatcher.grammar_from_lark(constraint.text)
        case "choices":
            listed = " | ".join(json.dumps(c, ensure_ascii=False) for c in json.loads(constraint.text))
            return LLMatcher.grammar_from_lark(f"start: {listed}")
        case "json_object":
            return json_source('{"type":"object"}')
        case "schema":
            return json_source("{}" if constraint.text == "true" else constraint.text)


def json_source(schema: str) -> str:
    """What llguidance compiles for a JSON Schema, given as text. Raises ValueError with its message when it cannot be read."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)  # type: ignore[arg-type]


def checked(constraint: Constraint) -> Any:
    """Raise ConfigError for what llguidance would take but not in time; the parsed schema, where it is one."""
    if constraint.kind == "regex" and len(constraint.text) > MAX_PATTERN:
        raise ConfigError(f"regex has {len(constraint.text):,} characters: at most {MAX_PATTERN:,} can be compiled")
    if (
        constraint.kind == "grammar"
        and (longest := max(map(len, TERMINAL.findall(constraint.text)), default=0)) > MAX_PATTERN
    ):
        raise ConfigError(f"grammar has a regex of {longest:,} characters: at most {MAX_PATTERN:,} can be compiled")
    if constraint.kind != "schema" or constraint.text == "true":
        return None
    schema = json.loads(constraint.text)
    for pointer, part in _parts(schema):
        pattern, multiple = part.get("pattern"), part.get("multipleOf")
        if isinstance(pattern, str) and len(pattern) > MAX_PATTERN:
            raise ConfigError(f"schema at {pointer}/pattern: {len(pattern):,} characters are more than {MAX_PATTERN:,}")
        if isinstance(multiple, int | float) and _units(multiple) > MAX_MULTIPLE:
            raise ConfigError(f"schema at {pointer}/multipleOf: {multiple!r} is too fine or too large to be enforced")
        if "x-guidance" in part:
            raise ConfigError(f"schema at {pointer}/x-guidance: this keyword is not honoured, leave it out")
    return schema


def _units(value: float) -> float:
    """`value` in units of its last decimal place."""
    digits = f"{abs(value):.12e}".split("e")[0].replace(".", "").strip("0")
    whole = abs(value) == int(abs(value))
    return abs(value) if whole else int(digits or "0")


def _parts(schema: Any, at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every subschema with its JSON pointer, the outermost first."""
    todo = [(at, schema)]
    while todo:
        at, part = todo.pop()
        if isinstance(part, dict):
            yield at, part
            todo += [(at + pointer, child) for pointer, child in children(part)]


def children(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas directly inside `schema`, with their JSON pointers from it."""
    for key, value in schema.items():
        inside: Iterable[tuple[str, Any]] = ()
        name = _escaped(key)
        if key in HOLDERS and isinstance(value, dict):
            inside = ((f"/{name}/{_escaped(k)}", v) for k, v in value.items())
        elif isinstance(value, dict) and key not in VALUES:
            inside = ((f"/{name}", value),)
        elif isinstance(value, list) and key not in VALUES:
            inside = ((f"/{name}/{i}", v) for i, v in enumerate(value))
        yield from ((pointer, child) for pointer, child in inside if isinstance(child, dict))


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def reason(message: str) -> str:
    """llguidance's message as one short line: what is wrong and, in a regex, where."""
    lines = message.replace("<non-verbose/>", "").splitlines() or [""]
    for i, line in enumerate(lines):
        if line.startswith("error: "):
            caret = lines[i - 1].find("^") if i else -1
            place = f" at character {caret - 4}" if caret >= 4 else ""
            return f"{line.removeprefix('error: ')}{place}"
    text = lines[0].strip().split(". Enable ")[0]
    if text.startswith("NoExtension"):  # what llguidance calls a parser that stops before it began
        return "nothing can satisfy it"
    if text.startswith("Unable to determine"):
        return "the patterns and lengths that must hold together are too complex to find out whether anything satisfies them"
    return text if len(text) <= 200 else f"{text[:197]}..."
