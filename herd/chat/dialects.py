"""How a model is told about functions, and how its calls are written: one Dialect per trained wording. No torch.

The instruction strings are the ones the models were trained on (llama-models models/*/prompt_format.md and the chat templates
of the Hugging Face checkpoints), so they are reproduced to the letter, missing spaces included.

    json                3.1, HF template: in front of the first user text; {"name": ..., "parameters": ...}
    meta_json           3.1, Meta's document: a user message of its own; {"type": "function", "name": ..., "parameters": ...}
    function_tag        3.1, Meta's document: a user message of its own; <function=name>{...}</function>
    pythonic            3.2 and 3.3: in front of the system text; [f(a=1), g(b="x")]
    pythonic_user       3.2: around the first user text; calls as pythonic
    pythonic_user_3.3   3.3 and Llama 4: the same in other closing words
    llama4              Llama 4: in front of the system text, Llama 4's wording; calls as pythonic
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from herd.chat.format import ToolSpec
from herd.chat.messages import Message, Part, Text, ToolCall
from herd.chat.pycalls import print_python_calls
from herd.chat.toolspec import parameters_of
from herd.errors import PromptError

__all__ = [
    "DIALECTS",
    "JSON_INTRODUCTION",
    "LLAMA4_SYSTEM",
    "PYTHONIC_SYSTEM",
    "Dialect",
    "dialect_named",
    "with_system_text",
]

Messages = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to talk about functions.

    `place` puts the description of the tools into a conversation; `print` writes the calls of one assistant message.
    Both raise PromptError for what the dialect cannot say.
    """

    name: str
    place: Callable[[Messages, Sequence[ToolSpec]], Messages]
    print: Callable[[Sequence[ToolCall]], str]


def dialect_named(name: str) -> Dialect:
    """The dialect called `name`; PromptError listing the names otherwise."""
    if name not in DIALECTS:
        raise PromptError(f"there is no tool dialect {name!r}; choose one of {', '.join(DIALECTS)}")
    return DIALECTS[name]


def with_system_text(messages: Messages, text: str, joint: str) -> Messages:
    """The conversation with `text` in front of its system text (or as its system message)."""
    if messages and messages[0].role == "system":
        return (
            _prefixed(messages[0], text + joint) if messages[0].content else replace(messages[0], content=text),
            *messages[1:],
        )
    return (Message("system", text), *messages)


def _prefixed(message: Message, text: str) -> Message:
    if isinstance(message.content, str):
        return replace(message, content=text + message.content)
    parts: tuple[Part, ...] = (Text(text), *message.content)
    return replace(message, content=parts)


def _first_user(messages: Messages, dialect: str) -> int:
    for i, message in enumerate(messages):
        if message.role == "user":
            return i
    raise PromptError(
        f"the {dialect} dialect describes tools beside the first user message, and there is none: add one"
    )


def _dump(value: Any, *, indent: int | None = None, ascii: bool = False, sort: bool = False) -> str:
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ascii, sort_keys=sort, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PromptError(f"a tool description or an argument is not a JSON value ({error})") from error


def _described(tool: ToolSpec) -> dict[str, Any]:
    return {"name": tool.name, "description": tool.description, "parameters": parameters_of(tool)}


# ---- json -----------------------------------------------------------------------------------------------------------

JSON_INTRODUCTION = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


def _place_json(messages: Messages, tools: Sequence[ToolSpec]) -> Messages:
    i = _first_user(messages, "json")
    described = "".join(_dump({"type": "function", "function": _described(tool)}, indent=4) + "\n\n" for tool in tools)
    return (*messages[:i], _prefixed(messages[i], JSON_INTRODUCTION + described), *messages[i + 1 :])


def _print_json(calls: Sequence[ToolCall]) -> str:
    # "; " between calls is what Llama models write when they make several; the HF template refuses more than one.
    return "; ".join(f'{{"name": {_dump(call.name)}, "parameters": {_dump(_arguments(call))}}}' for call in calls)


def _arguments(call: ToolCall) -> dict[str, Any]:
    return dict(call.arguments)


# ---- meta_json ------------------------------------------------------------------------------------------------------


def _place_meta_json(messages: Messages, tools: Sequence[ToolSpec]) -> Messages:
    i = _first_user(messages, "meta_json")
    text = (
        "Answer the user's question by making use of the following functions if needed.\n"
        "If none of the function can be used, please say so.\n"
        "Here is a list of functions in JSON format:\n"
        + "\n".join(_meta_json(tool) for tool in tools)
        + "\n\nReturn function calls in JSON format."
    )
    return (*messages[:i], Message("user", text), *messages[i:])


def _meta_json(tool: ToolSpec) -> str:
    """Meta's layout: properties as a list of one-entry objects, each of type "object", `required` on one line."""
    schema = parameters_of(tool)
    properties = [
        {name: {"type": "object", "description": about.get("description", "")}}
        for name, about in schema.get("properties", {}).items()
    ]
    parameters = {"type": "object", "properties": properties, "required": _MARK}
    whole = {"type": "function", "function": _described(tool) | {"parameters": parameters}}
    return _dump(whole, indent=4).replace(_dump(_MARK), _dump(list(schema.get("required", []))))


_MARK = "\x00required\x00"


def _print_meta_json(calls: Sequence[ToolCall]) -> str:
    return "; ".join(
        _dump({"type": "function", "name": call.name, "parameters": _arguments(call)}, ascii=True) for call in calls
    )


# ---- function_tag ---------------------------------------------------------------------------------------------------

_TAG_RULES = (
    "Think very carefully before calling functions.\n"
    "If you choose to call a function ONLY reply in the following format with no prefix or suffix:\n\n"
    '<function=example_function_name>{"example_name": "example_value"}</function>\n\n'
    "Reminder:\n"
    "- If looking for real time information use relevant functions before falling back to brave_search\n"
    "- Function calls MUST follow the specified format, start with <function= and end with </function>\n"
    "- Required parameters MUST be specified\n"
    "- Only call one function at a time\n"
    "- Put the entire function call reply on one line"
)
_PYTHON_TYPES = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "array": "list",
    "object": "dict",
}


def _place_tags(messages: Messages, tools: Sequence[ToolSpec]) -> Messages:
    i = _first_user(messages, "function_tag")
    listed = "\n\n".join(
        f"Use the function '{tool.name}' to '{tool.description}':\n{_tag_description(tool)}" for tool in tools
    )
    text = f"You have access to the following functions:\n\n{listed}\n\n{_TAG_RULES}"
    return (*messages[:i], Message("user", text), *messages[i:])


def _tag_description(tool: ToolSpec) -> str:
    schema = parameters_of(tool)
    parameters = {
        name: {
            "description": about.get("description", ""),
            "param_type": _PYTHON_TYPES.get(str(about.get("type", "string")), "str"),
            "required": name in schema.get("required", []),
        }
        for name, about in schema.get("properties", {}).items()
    }
    head = f'{{"name": {_dump(tool.name)}, "description": {_dump(tool.description)}, "parameters": '
    return head + _dump(parameters, sort=True) + "}"


def _print_tags(calls: Sequence[ToolCall]) -> str:
    for call in calls:
        if ">" in call.name or "<" in call.name:
            raise PromptError(f"tool name {call.name!r} cannot stand in a function tag: rename the tool")
    return "\n".join(f"<function={call.name}>{_dump(_arguments(call), ascii=True)}</function>" for call in calls)


# ---- pythonic, pythonic_user, pythonic_user_3.3, llama4 -------------------------------------------------------------

PYTHONIC_SYSTEM = (
    "You are an expert in composing functions. You are given a question and a set of possible functions.\n"
    "Based on the question, you will need to make one or more function/tool calls to achieve the purpose.\n"
    "If none of the function can be used, point it out. If the given question lacks the parameters required by the "
    "function,\nalso point it out. You should only return the function call in tools call sections.\n\n"
    "If you decide to invoke any of the function(s), you MUST put it in the format of "
    "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]\n"
    "You SHOULD NOT include any other text in the response.\n\n"
    "Here is a list of functions in JSON format that you can invoke.\n\n"
)
# Opening line, format line and closing line are Meta's (prompt_format.md of Llama 4); the rules between are ours, shorter.
LLAMA4_SYSTEM = (
    "You are a helpful assistant and an expert in function composition. You can answer general questions using your "
    "internal knowledge OR invoke functions when necessary. Follow these strict guidelines:\n\n"
    "1. FUNCTION CALLS:\n"
    "- Call only the functions listed below, and only when every required parameter is known\n"
    "- Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)]\n"
    "- Write the list of calls alone, without any other text\n\n"
    "2. RESPONSE RULES:\n"
    "- When no function fits, answer in plain text\n"
    "- When a required parameter is missing, ask for it\n"
    "- Never mix text and function calls in one response\n\n"
    "3. TOOL RESPONSE HANDLING:\n"
    "- After a function result, answer the question briefly from it\n\n"
    "Here is a list of functions in JSON format that you can invoke:\n"
)


def _python_description(tools: Sequence[ToolSpec]) -> str:
    """The list of functions, with Meta's `"type": "dict"` and key order."""
    listed = []
    for tool in tools:
        schema = parameters_of(tool)
        parameters = {
            "type": "dict",
            "required": list(schema.get("required", [])),
            "properties": schema.get("properties", {}),
        }
        listed.append(_described(tool) | {"parameters": parameters})
    return _dump(listed, indent=4)


def _place_pythonic(messages: Messages, tools: Sequence[ToolSpec]) -> Messages:
    return with_system_text(messages, PYTHONIC_SYSTEM + _python_description(tools), "\n\n")


def _place_llama4(messages: Messages, tools: Sequence[ToolSpec]) -> Messages:
    return with_system_text(messages, LLAMA4_SYSTEM + _python_description(tools), "\n\n")


_PYTHONIC_USER = (
    "Should you decide to return the function call(s),Put it in the format of "
    "[func1(params_name=params_value, params_name2=params_value2...), func2(params)]\n\n"
    "NO other text MUST be included."
)
_PYTHONIC_USER_33 = (
    "Should you decide to return the function call(s), put them in the format of "
    "[func1(params_name=params_value, params_name2=params_value2...), func2(params)]\n\n"
    "You SHOULD NOT include any other text in the response."
)


def _place_pythonic_user(messages: Messages, tools: Sequence[ToolSpec], *, name: str, closing: str) -> Messages:
    i = _first_user(messages, name)
    described = f"Here is a list of functions in JSON format that you can invoke:\n{_python_description(tools)}"
    text = f"Questions: {messages[i].text}\n{described}\n\n{closing}"
    return (*messages[:i], replace(messages[i], content=text), *messages[i + 1 :])


def _pythonic_user(name: str, closing: str) -> Dialect:
    return Dialect(name, partial(_place_pythonic_user, name=name, closing=closing), print_python_calls)


DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("json", _place_json, _print_json),
        Dialect("meta_json", _place_meta_json, _print_meta_json),
        Dialect("function_tag", _place_tags, _print_tags),
        Dialect("pythonic", _place_pythonic, print_python_calls),
        _pythonic_user("pythonic_user", _PYTHONIC_USER),
        _pythonic_user("pythonic_user_3.3", _PYTHONIC_USER_33),
        Dialect("llama4", _place_llama4, print_python_calls),
    )
}
