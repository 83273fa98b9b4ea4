"""A conversation to ids in one call, and conversations in the shapes that callers have. No torch."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from herd.chat.format import ChatFormat, Rendered, ToolSpec
from herd.chat.formats import format_named
from herd.chat.messages import Image, Message, Part, Role, StopReason, Text, ToolCall
from herd.chat.toolspec import tools_from
from herd.errors import PromptError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["messages_from", "render"]

_ROLE_NAMES: Mapping[str, Role] = {"developer": "system", "ipython": "tool", "function": "tool"}
"""Other names of roles: OpenAI's newer system role, Llama's header for tool results, OpenAI's older one."""


def render(
    messages: Sequence[Message | Mapping[str, Any]],
    format: ChatFormat | tuple[str, Tokenizer],
    tools: Sequence[ToolSpec | Any] = (),
    *,
    generate: bool = False,
) -> Rendered:
    """Ids and loss mask of `messages` in a prompt format.

    Messages may be plain dictionaries (see `messages_from`), tools anything that `herd.chat.toolspec.tools_from` takes.
    `format` is a format, or its name and a tokenizer. `generate` opens the assistant's reply at the end; without it the
    conversation is rendered as it is, for training. Raises PromptError.
    """
    return _format(format).render(messages_from(messages), tools_from(tools), generate=generate)


def _format(given: Any) -> ChatFormat:
    """The format that callers mean; PromptError for anything but a format, or a name and a tokenizer."""
    if isinstance(given, str):
        raise PromptError(
            f"a prompt format needs a tokenizer: give the name with its tokenizer, ({given!r}, tokenizer)"
        )
    if not isinstance(given, tuple):
        if not hasattr(given, "render"):
            raise PromptError(f"format is a {type(given).__name__}: expected a prompt format, or (name, tokenizer)")
        return given
    if len(given) != 2:
        raise PromptError(f"format is a tuple of {len(given)}: expected (name, tokenizer)")
    name, tokenizer = given
    if not isinstance(name, str):
        raise PromptError(f"the name of a prompt format is text, not a {type(name).__name__}")
    if not hasattr(tokenizer, "special"):
        kind = type(tokenizer).__name__
        raise PromptError(f"format holds a {kind} where a tokenizer belongs: open it with herd.load_tokenizer")
    return format_named(name, tokenizer)


def messages_from(conversation: Any) -> tuple[Message, ...]:
    """Messages from Messages or dictionaries, in OpenAI's, Hugging Face's or Llama's shape.

    Taken per message: `role`, `content` (text, None, or a list of text and image parts), `tool_calls` (function objects with
    arguments as JSON text or as an object; an empty list is fine), `stop_reason`, `name`, `tool_call_id`. Other fields are
    ignored when they are empty. Raises PromptError naming the message and the field.
    """
    if isinstance(conversation, Mapping) and "messages" in conversation:
        conversation = conversation["messages"]
    if isinstance(conversation, str | Mapping) or not isinstance(conversation, Sequence):
        raise PromptError(f"a conversation is a list of messages, not a {type(conversation).__name__}")
    return tuple(
        item if isinstance(item, Message) else _message(item, f"message {i}") for i, item in enumerate(conversation)
    )


_FIELDS = {"role", "content", "tool_calls", "stop_reason", "name", "tool_call_id", "call_id"}


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise PromptError(f"{where} is a {type(item).__name__}: expected an object with role and content")
    if unknown := [field for field, value in item.items() if field not in _FIELDS and value]:
        raise PromptError(f"{where}: field {unknown[0]!r} is not known; a message has {', '.join(sorted(_FIELDS))}")
    role = item.get("role")
    if not isinstance(role, str) or (role not in _ROLE_NAMES and role not in get_args(Role)):
        raise PromptError(f"{where}: role is {role!r}, expected one of {', '.join(get_args(Role))}")
    stop = item.get("stop_reason")
    if stop is not None and stop not in get_args(StopReason):
        raise PromptError(f"{where}: stop_reason is {stop!r}, expected one of {', '.join(get_args(StopReason))}")
    call_id = item.get("tool_call_id", item.get("call_id"))
    for field, value in (("name", item.get("name")), ("tool_call_id", call_id)):
        if value is not None and not isinstance(value, str):
            raise PromptError(f"{where}: {field} is a {type(value).__name__}, expected text")
    calls = item.get("tool_calls") or ()
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise PromptError(f"{where}: tool_calls is a {type(calls).__name__}, expected a list")
    try:
        return Message(
            _ROLE_NAMES.get(role, role),  # type: ignore[arg-type]
            _content(item.get("content"), where),
            tuple(_call(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls)),
            stop,
            item.get("name"),
            call_id,
        )
    except PromptError as error:
        raise error if str(error).startswith(where) else PromptError(f"{where}: {error}") from error


def _content(content: Any, where: str) -> str | tuple[Part, ...]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise PromptError(f"{where}: content is a {type(content).__name__}, expected text or a list of parts")
    return tuple(_part(part, f"{where}: content[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> Part:
    if isinstance(part, Text | Image):
        return part
    if isinstance(part, str):
        return Text(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind == "image_url":
        url = part.get("image_url")
        return _image(url.get("url") if isinstance(url, Mapping) else url, where)
    if kind == "image":
        source = next((part[key] for key in ("image", "path", "url", "data") if part.get(key) is not None), None)
        return _image(source, where)
    raise PromptError(f"{where}: expected {{'type': 'text', 'text': ...}} or an image part")


def _image(source: Any, where: str) -> Image:
    if isinstance(source, bytes):
        return Image(data=source)
    if not isinstance(source, str):
        raise PromptError(f"{where}: the image has no source: give encoded bytes, a path or a data: URL")
    if source.startswith("data:"):
        head, _, data = source.partition(",")
        try:
            return Image(data=base64.b64decode(data, validate=True) if head.endswith(";base64") else data.encode())
        except (binascii.Error, ValueError) as error:
            raise PromptError(f"{where}: the data: URL is not base64 ({error})") from error
    if source.startswith(("http://", "https://")):
        raise PromptError(
            f"{where}: images are not fetched from the network here; give the bytes, a path or a data: URL"
        )
    return Image(path=source.removeprefix("file://"))


def _call(call: Any, where: str) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    if not isinstance(call, Mapping) or call.get("type", "function") != "function":
        raise PromptError(f"{where}: expected {{'type': 'function', 'function': {{'name': ..., 'arguments': ...}}}}")
    inner = call.get("function", call)
    if not isinstance(inner, Mapping):
        raise PromptError(f"{where}: function is a {type(inner).__name__}, expected an object")
    name = inner.get("name", inner.get("tool_name"))
    if not isinstance(name, str) or not name:
        raise PromptError(f"{where}: name is missing or not text")
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: arguments of {name} are not JSON ({error})") from error
    if arguments is not None and not isinstance(arguments, Mapping):
        raise PromptError(f"{where}: arguments of {name} are a {type(arguments).__name__}, expected an object")
    id = call.get("id", call.get("call_id"))
    if id is not None and not isinstance(id, str):
        raise PromptError(f"{where}: id is a {type(id).__name__}, expected text")
    return ToolCall(name, dict(arguments or {}), id)
