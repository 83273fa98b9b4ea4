"""Describing functions to a model: ToolSpec checks, the built-in tools, schemas from Python functions. No torch."""

from __future__ import annotations

import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

from herd.chat.format import ToolSpec
from herd.errors import PromptError

__all__ = ["BUILTIN_TOOLS", "check_tools", "is_builtin", "parameters_of", "tool_from_function", "tools_from"]

TOOL_NAME = re.compile(r"(?=.{1,64}\Z)[A-Za-z0-9_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_][A-Za-z0-9_-]*)*")


def _one_string(name: str, description: str) -> dict[str, Any]:
    properties = {name: {"type": "string", "description": description}}
    return {"type": "object", "properties": properties, "required": [name]}


BUILTIN_TOOLS = {
    spec.name: spec
    for spec in (
        ToolSpec("brave_search", "Search the web.", _one_string("query", "What to search for.")),
        ToolSpec("wolfram_alpha", "Compute or look up a fact.", _one_string("query", "What to compute.")),
        ToolSpec("code_interpreter", "Run Python code.", _one_string("code", "Python source.")),
    )
}
"""The tools that Llama 3.1 and later know by name; the system message switches them on."""


def is_builtin(tool: ToolSpec) -> bool:
    """Whether `tool` means a built-in one: its name, and no parameters of its own."""
    known = BUILTIN_TOOLS.get(tool.name)
    return known is not None and (not tool.parameters or dict(tool.parameters) == dict(known.parameters or {}))


def parameters_of(tool: ToolSpec) -> dict[str, Any]:
    """The JSON Schema of a tool's arguments; an object without properties when the spec gives none."""
    if tool.parameters:
        return dict(tool.parameters)
    if is_builtin(tool):
        return dict(BUILTIN_TOOLS[tool.name].parameters or {})
    return {"type": "object", "properties": {}}


def check_tools(tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
    """The tools as a tuple; PromptError naming the tool and the field when one cannot be described to a model."""
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if not isinstance(tool, ToolSpec):
            raise PromptError(
                f"tool {i} is a {type(tool).__name__}: expected a ToolSpec (herd.chat.toolspec.tools_from)"
            )
        where = f"tool {i} ({tool.name!r})"
        if not TOOL_NAME.fullmatch(tool.name):
            raise PromptError(f"{where}: a name has 1 to 64 letters, digits, _ - and .")
        if tool.name in seen:
            raise PromptError(f"{where}: the name is given twice")
        seen.add(tool.name)
        _check_schema(where, parameters_of(tool))
    return tuple(tools)


def _check_schema(where: str, schema: Mapping[str, Any]) -> None:
    if schema.get("type", "object") != "object":
        raise PromptError(f"{where}: parameters has type {schema['type']!r}, expected 'object'")
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise PromptError(f"{where}: parameters.properties is a {type(properties).__name__}, expected an object")
    for name, about in properties.items():
        if not isinstance(about, Mapping):
            raise PromptError(f"{where}: parameters.properties.{name} is not an object")
    required = schema.get("required", [])
    if not isinstance(required, list | tuple) or not all(isinstance(name, str) for name in required):
        raise PromptError(f"{where}: parameters.required is not a list of names")
    if missing := [name for name in required if name not in properties]:
        raise PromptError(f"{where}: parameters.required names {missing[0]!r}, which is not among the properties")


def tools_from(tools: Sequence[Any]) -> tuple[ToolSpec, ...]:
    """ToolSpecs from what callers have: ToolSpecs, Python functions, names of built-in tools, OpenAI tool objects
    (`{"type": "function", "function": {...}}`) or the inner object alone. Raises PromptError naming index and field."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise PromptError(f"tools are a list, not a {type(tools).__name__}")
    return check_tools([_tool_from(i, tool) for i, tool in enumerate(tools)])


def _tool_from(i: int, tool: Any) -> ToolSpec:
    if isinstance(tool, ToolSpec):
        return tool
    if isinstance(tool, str):
        if tool not in BUILTIN_TOOLS:
            raise PromptError(f"tool {i}: {tool!r} is not built in; those are {', '.join(BUILTIN_TOOLS)}")
        return BUILTIN_TOOLS[tool]
    if isinstance(tool, Mapping):
        inner = tool.get("function", tool)
        if tool.get("type", "function") != "function" or not isinstance(inner, Mapping):
            raise PromptError(f"tool {i}: expected {{'type': 'function', 'function': {{...}}}}")
        name, description = inner.get("name"), inner.get("description") or ""
        parameters = inner.get("parameters")
        if not isinstance(name, str) or not isinstance(description, str):
            raise PromptError(f"tool {i}: name and description must be text")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise PromptError(f"tool {i} ({name!r}): parameters is not a JSON Schema object")
        return ToolSpec(name, description, parameters)
    if callable(tool):
        return tool_from_function(tool)
    raise PromptError(f"tool {i} is a {type(tool).__name__}: expected a ToolSpec, an object, a function or a name")


def tool_from_function(function: Callable[..., Any]) -> ToolSpec:
    """A ToolSpec from a Python function: its name, signature, type hints and docstring.

    The first paragraph of the docstring is the description; lines `name: text` (Google's `Args:` section) describe the
    parameters. Parameters without default are required. Raises PromptError for one that has no type hint, a type that
    JSON Schema lacks, or `*args`.
    """
    name = getattr(function, "__name__", type(function).__name__)
    summary, about = _docstring(inspect.getdoc(function) or "")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as error:
        raise PromptError(f"{name}: its type hints cannot be resolved ({error})") from error
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PromptError(f"{name}: parameter {parameter} cannot be called by name; a tool's parameters must be")
        if parameter.name not in hints:
            raise PromptError(f"{name}: parameter {parameter.name!r} has no type hint, so its schema is unknown")
        schema = _schema_of(hints[parameter.name], f"{name}: parameter {parameter.name!r}")
        if parameter.name in about:
            schema["description"] = about[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        elif parameter.default is not None:
            default = parameter.default
            schema["default"] = default.value if isinstance(default, enum.Enum) else default
        properties[parameter.name] = schema
    schema = {"type": "object", "properties": properties, "required": required}
    return check_tools([ToolSpec(name, summary, schema)])[0]


def _docstring(doc: str) -> tuple[str, dict[str, str]]:
    """First paragraph, and descriptions by parameter name from the Args section."""
    summary = " ".join(doc.split("\n\n")[0].split())
    about: dict[str, str] = {}
    section = re.search(r"^(?:Args|Arguments|Parameters):[ \t]*\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    if section is None:
        return summary, about
    if section.start() < len(doc.split("\n\n")[0]):
        summary = " ".join(doc[: section.start()].split())
    lines = inspect.cleandoc(section.group(1)).split("\n")
    current = None
    for line in lines:
        if match := re.match(r"(\w+)(?:\s*\([^)]*\))?:\s*(.*)", line):
            current = match.group(1)
            about[current] = match.group(2).strip()
        elif current is not None and line.startswith(" "):
            about[current] = f"{about[current]} {line.strip()}".strip()
    return summary, about


_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def _schema_of(hint: Any, where: str) -> dict[str, Any]:
    """JSON Schema of a type hint; PromptError for a type without one."""
    if hint is Any:
        return {}
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        schema = _schema_of(arguments[0], where)
        described = [note for note in arguments[1:] if isinstance(note, str)]
        return schema | ({"description": described[0]} if described else {})
    if origin is Literal:
        return _enumeration(list(arguments), where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enumeration([member.value for member in hint], where)
    if origin in (Union, types.UnionType):
        members = [argument for argument in arguments if argument is not type(None)]
        if len(members) == 1:  # Optional: leaving the argument out says None
            return _schema_of(members[0], where)
        return {"anyOf": [_schema_of(member, where) for member in members]}
    if hint in (list, tuple) or origin in (list, tuple, Sequence):
        items = [argument for argument in arguments if argument is not Ellipsis]
        return {"type": "array"} | ({"items": _schema_of(items[0], where)} if len(items) == 1 else {})
    if hint is dict or origin in (dict, Mapping):
        values = {"additionalProperties": _schema_of(arguments[1], where)} if len(arguments) == 2 else {}
        return {"type": "object"} | values
    raise PromptError(f"{where} has type {hint!r}, which JSON Schema cannot say: use str, int, float, bool, list, dict")


def _enumeration(values: list[Any], where: str) -> dict[str, Any]:
    kinds = {_SIMPLE.get(type(value)) for value in values}
    if None in kinds:
        raise PromptError(f"{where} chooses between {values!r}: choices must be text, numbers or booleans")
    return ({"type": kinds.pop()} if len(kinds) == 1 else {}) | {"enum": values}
