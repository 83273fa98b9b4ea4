"""Grammars (Lark, as llguidance reads it) under which a reply is tool calls in a dialect, and nothing else. No torch.

    json           {"name": "f", "parameters": {...}}; {...}
    meta_json      {"type": "function", "name": "f", "parameters": {...}}; {...}
    function_tag   <function=f>{...}</function>
    Python         [f(a=1), g(b="x")]              pythonic, pythonic_user, pythonic_user_3.3, llama4

Arguments follow the tool's JSON Schema. In Python calls, the values of single arguments do: JSON where that is Python too, words
(True, None) where it is not; they come in the order of the schema. What a schema says of all arguments together cannot be written
that way and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from herd.chat.format import ToolSpec
from herd.chat.pycalls import ARGUMENT_NAME, FUNCTION_NAME
from herd.chat.toolspec import parameters_of
from herd.errors import PromptError

__all__ = ["calls_grammar"]

_HARMLESS = {"type", "properties", "required", "description", "title", "$defs", "definitions", "$schema", "$id", "examples",
             "default", "additionalProperties", "strict"}  # fmt: skip
"""Keywords of a parameters schema that say nothing of arguments together."""
_TEXT = r"/(\s*[^\s{\[<](.|\n)*)?/"
_WORDS = {"boolean": '("True" | "False")', "null": '"None"'}


def calls_grammar(
    tools: Sequence[ToolSpec],
    dialect: str,
    *,
    parallel: bool = True,
    options: Mapping[str, Any] | None = None,
    otherwise: Mapping[str, Any] | bool | None = None,
    text: bool = False,
) -> str:
    """The grammar of a reply that is one call of `tools`, or with `parallel` one after another.

    `options` are llguidance's for JSON (`x-guidance`). With `otherwise`, a JSON Schema, the reply may also be that instead; with
    `text`, any text that does not begin as a call does (to be read with `leading_calls_only`).
    Raises PromptError for a tool that the dialect cannot call in a promised form.
    """
    if not tools:
        raise PromptError("a call was asked for, but there are no tools: give some")
    maker, joint, wrap = _DIALECTS.get(dialect, (_python_call, '", "', ('"["', '"]"')))
    rules = _Rules(dict(options or {}))
    if otherwise is not None and maker in (_json_call, _meta_json_call):
        # A lexer that has begun a literal does not turn back, so both are JSON there.
        one = rules.json({"anyOf": [_call_schema(tool, maker is _meta_json_call) for tool in tools]})
        either = rules.json(
            {"anyOf": [*(_call_schema(tool, maker is _meta_json_call) for tool in tools), _plain_schema(otherwise)]}
        )
        more = f"{either} | {one} ({joint} {one})+" if parallel else either
        return f"start: {more}\n" + "\n".join(rules.lines)
    calls = " | ".join(rules.add(maker(tool, rules)) for tool in tools)
    one = rules.add(calls)
    whole = f"{wrap[0]} {one} ({joint} {one})* {wrap[1]}" if parallel else f"{wrap[0]} {one} {wrap[1]}"
    if text:
        whole += f" | {_TEXT}"
    if otherwise is not None:
        whole += f" | {rules.json({} if otherwise is True else dict(otherwise or {}))}"
    return f"start: {whole}\n" + "\n".join(rules.lines)


class _Rules:
    """Rules of a grammar, numbered as they are added."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self._options = options

    def add(self, body: str) -> str:
        """The name of a new rule."""
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        return name

    def json(self, schema: Mapping[str, Any]) -> str:
        """A rule for JSON that meets a schema."""
        guided = dict(schema) | ({"x-guidance": self._options} if self._options else {})
        return self.add(f"%json {_dump(guided)}")


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PromptError(f"a tool's parameters are not JSON ({error})") from error


def _json_call(tool: ToolSpec, rules: _Rules) -> str:
    return f"{_quoted(_name_head(tool))} {rules.json(_arguments(tool))} {_quoted('}')}"


def _meta_json_call(tool: ToolSpec, rules: _Rules) -> str:
    head = '{"type": "function", ' + _name_head(tool)[1:]
    return f"{_quoted(head)} {rules.json(_arguments(tool))} {_quoted('}')}"


def _call_schema(tool: ToolSpec, typed: bool) -> dict[str, Any]:
    """A call as a JSON Schema."""
    properties: dict[str, Any] = {"type": {"const": "function"}} if typed else {}
    properties |= {"name": {"const": tool.name}, "parameters": _plain_schema(_arguments(tool))}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _plain_schema(schema: Mapping[str, Any] | bool) -> dict[str, Any]:
    """A schema that can stand inside another: one without references to its own root."""
    if schema is True or schema is False:
        return {}
    if '"$ref"' in _dump(schema):
        raise PromptError(
            "tools and a response format together cannot hold $ref with this model: write the schemas out, or leave one away"
        )
    return {key: value for key, value in schema.items() if key not in ("$schema", "$id")}


def _name_head(tool: ToolSpec) -> str:
    return f'{{"name": {json.dumps(tool.name)}, "parameters": '


def _tag_call(tool: ToolSpec, rules: _Rules) -> str:
    if ">" in tool.name or "<" in tool.name:
        raise PromptError(f"tool name {tool.name!r} cannot stand in a function tag: rename the tool")
    return f"{_quoted(f'<function={tool.name}>')} {rules.json(_arguments(tool))} {_quoted('</function>')}"


def _arguments(tool: ToolSpec) -> dict[str, Any]:
    """The schema of all arguments, which are an object whatever it says."""
    schema = {key: value for key, value in parameters_of(tool).items() if key != "strict"}
    schema.setdefault("type", "object")
    if schema.get("properties") is not None:
        # A model invents arguments otherwise, and no schema means to ask for that.
        schema.setdefault("additionalProperties", False)
    return schema


def _python_call(tool: ToolSpec, rules: _Rules) -> str:
    schema = parameters_of(tool)
    if not FUNCTION_NAME.fullmatch(tool.name):
        raise PromptError(f"tool name {tool.name!r} cannot be written as a Python call: use letters, digits, _ - and .")
    odd = [key for key in schema if key not in _HARMLESS and not key.startswith("x-")]
    if odd:
        raise PromptError(
            f"tool {tool.name!r}: parameters.{odd[0]} says something of several arguments together, which cannot be enforced "
            "in the Python calls of this model: leave it out, or use tool_choice 'auto'"
        )
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    required = set(schema.get("required", ()))
    properties = list(schema.get("properties", {}).items())
    first, more = _quoted(""), _quoted("")
    for name, about in reversed(properties):
        if not ARGUMENT_NAME.fullmatch(name):
            raise PromptError(
                f"argument {name!r} of {tool.name} cannot be written as a Python keyword argument: rename it"
            )
        value = f"{_quoted(f'{name}=')} {_python_value(about, shared, rules)}"
        begun, going = f"{value} {more}", f"{_quoted(', ')} {value} {more}"
        if name not in required:
            begun, going = f"{begun} | {first}", f"{going} | {more}"
        first, more = rules.add(begun), rules.add(going)
    return f"{_quoted(f'{tool.name}(')} {first} {_quoted(')')}"


def _python_value(about: Mapping[str, Any], shared: Mapping[str, Any], rules: _Rules) -> str:
    """One argument's value."""
    kinds = about.get("type")
    listed = kinds if isinstance(kinds, list) else [kinds]
    if set(about) & {"enum", "const"} or not set(listed) & set(_WORDS):
        return rules.json({**shared, **about})
    choices = [_WORDS[kind] for kind in listed if kind in _WORDS]
    others = [kind for kind in listed if kind not in _WORDS]
    if others:
        choices.append(rules.json({**shared, **about, "type": others}))
    return rules.add(" | ".join(choices))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_Maker = Callable[[ToolSpec, _Rules], str]
_DIALECTS: dict[str, tuple[_Maker, str, tuple[str, str]]] = {
    "json": (_json_call, '"; "', ('""', '""')),
    "meta_json": (_meta_json_call, '"; "', ('""', '""')),
    "function_tag": (_tag_call, '"\\n"', ('""', '""')),
}
