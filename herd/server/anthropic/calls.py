"""Anthropic's requests as calls: turns are joined, results of tools become messages of their own. No torch."""

from __future__ import annotations

import json
from typing import Any

from herd.server.anthropic.fields import CountBody, InputMessage, MessagesBody, NamedChoice, TextBlock
from herd.server.errors import ApiError
from herd.server.openai.chat import check_work, size_of
from herd.server.openai.sampling import check_sampling
from herd.server.protocol import Call, Chat
from herd.server.state import State, new_id

__all__ = ["call_of", "chat_of"]

ERROR = "Error: "
"""What stands before the result of a tool with `is_error`: Llama's prompts have no other place for it."""


def call_of(body: MessagesBody, state: State) -> Call:
    """The call of a request. Raises ApiError (400) for what cannot be honoured."""
    sampling: dict[str, Any] = {"max_tokens": body.max_tokens}
    for name in ("temperature", "top_p", "top_k"):
        if (value := getattr(body, name)) is not None:
            sampling[name] = value
    if body.stop_sequences:
        sampling["stop"] = body.stop_sequences
    if body.output_config is not None and body.output_config.format is not None:
        sampling["schema"] = body.output_config.format.schema_
    check_sampling(sampling, stop="stop_sequences", schema="output_config.format.schema")
    chat = chat_of(body)
    check_work(state, 1, size_of(chat.messages, chat.tools), "messages")
    return Call(new_id("msg_"), chat, sampling)


def chat_of(body: CountBody) -> Chat:
    """The conversation of a request. A last turn that is the assistant's is gone on with."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _system(body.system)})
    names: dict[str, str] = {}
    for i, message in enumerate(body.messages):
        for one in _turn(message, names, i):
            _join(messages, one)
    chosen = {"any": "required", "tool": "named"}
    choice = body.tool_choice
    kind = "auto" if choice is None else chosen.get(choice.type, choice.type)
    assert kind in ("auto", "none", "required", "named")
    return Chat(
        messages=tuple(messages),
        tools=tuple(_tool(tool) for tool in body.tools or ()),
        tool_choice=kind,  # type: ignore[arg-type]
        tool_name=choice.name if isinstance(choice, NamedChoice) else None,
        parallel=choice is None or choice.disable_parallel_tool_use is not True,
        continue_final=messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"),
    )


def _system(given: str | list[TextBlock]) -> Any:
    return given if isinstance(given, str) else [{"type": "text", "text": block.text} for block in given]


def _turn(message: InputMessage, names: dict[str, str], index: int) -> list[dict[str, Any]]:
    """A turn as messages. `names`: ids of calls so far -> their functions."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    out: list[dict[str, Any]] = []
    text: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(message.content):
        if block.type == "text":
            text.append({"type": "text", "text": block.text})
        elif block.type == "tool_use":
            assert block.id is not None
            assert block.name is not None
            names[block.id] = block.name
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"type": "function", "id": block.id, "function": function})
        else:
            assert block.tool_use_id is not None
            where = f"messages[{index}].content[{i}].tool_use_id"
            if block.tool_use_id not in names:
                raise ApiError(400, f"{where}: there is no tool_use with this id before", param=where)
            if text:
                out.append({"role": message.role, "content": text})
                text = []
            said = block.content or ""
            said = said if isinstance(said, str) else "".join(part.text or "" for part in said)
            result = {"role": "tool", "content": f"{ERROR}{said}" if block.is_error else said}
            out.append(result | {"tool_call_id": block.tool_use_id, "name": names[block.tool_use_id]})
    if text or calls or not out:
        out.append({"role": message.role, "content": text or "", **({"tool_calls": calls} if calls else {})})
    return out


def _join(messages: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Add a message; turns of one role that follow each other are one turn, as Anthropic says."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != one["role"] or one["role"] in ("tool", "system") or "tool_calls" in last:
        messages.append(one)
        return
    last["content"] = [*_parts(last["content"]), *_parts(one["content"])]
    if "tool_calls" in one:
        last["tool_calls"] = one["tool_calls"]


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _tool(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}
