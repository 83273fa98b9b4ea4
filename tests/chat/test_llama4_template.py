"""`Llama4Format.as_hf` against the chat template that transformers carries for Llama 4, run by transformers' own renderer."""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from herd.chat.llama4 import Llama4Format
from herd.chat.messages import Message, ToolCall
from herd.chat.reply import ReplyParser
from herd.chat.toolspec import tools_from
from tests.chat.conversations import PLAIN, WITH_TOOLS
from tests.vocabularies import llama4

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather für alle 🙂",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@cache
def template() -> str:
    """The template's text, out of the source file: importing the module would need image packages."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "models" / "llama4" / "processing_llama4.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "chat_template":
            return ast.literal_eval(node.value)
    raise AssertionError("transformers no longer carries the template")


def theirs(conversation: list[Message], tools: list[Any]) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = []
    for message in conversation:
        item: dict[str, Any] = {"role": message.role, "content": message.text}
        if message.tool_calls:
            item["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in message.tool_calls
            ]
        messages.append(item)
    rendered, _ = render_jinja_template(
        conversations=[messages],
        tools=tools or None,
        chat_template=template(),
        add_generation_prompt=True,
        bos_token="<|begin_of_text|>",
    )
    return rendered[0]


@pytest.mark.parametrize("tools", [[], [WEATHER]])
def test_as_hf_writes_what_the_template_writes(tools: list[Any]) -> None:
    format = Llama4Format.as_hf(llama4())
    compared = 0
    for conversation in PLAIN + WITH_TOOLS:
        turns = [replace(message, stop_reason=None) for message in conversation]
        spoken = [message for message in turns if message.role != "system"]
        if tools and (not spoken or spoken[0].role != "user"):
            continue  # the template would call an assistant's text the user's
        ours = llama4().decode(format.render(turns, tools_from(tools)).tokens, skip_special=False)
        assert ours == theirs(turns, tools)
        compared += 1
    assert compared > 60 - 5 * len(tools)


def test_several_calls_and_words_before_them() -> None:
    format = Llama4Format.as_hf(llama4())
    calls = (ToolCall("get_weather", {"city": "Paris"}), ToolCall("get_weather", {"city": "São Paulo"}))
    message = Message("assistant", "Let me look.", calls)
    conversation = [Message("user", "Weather?"), message, Message("tool", "25 C")]
    rendered = format.render(conversation, tools_from([WEATHER]))
    assert llama4().decode(rendered.tokens, skip_special=False) == theirs(conversation, [WEATHER])
    parser = format.parser(tools_from([WEATHER]))
    assert isinstance(parser, ReplyParser)
    for id, learn in zip(rendered.tokens, rendered.loss_mask, strict=True):
        if learn:
            parser.push(id)
    assert parser.message() == replace(message, stop_reason="end_of_turn")
