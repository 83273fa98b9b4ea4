"""`herd.render` and the shapes of conversations that it takes."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from herd.chat.llama3 import Llama3Format
from herd.chat.messages import Image, Message, Text, ToolCall
from herd.chat.render import messages_from, render
from herd.errors import PromptError
from tests.vocabularies import llama3

CALL = ToolCall("get_weather", {"city": "Paris"}, "call_1")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"role": "user", "content": "hi"}, Message("user", "hi")),
        ({"role": "system", "content": ""}, Message("system")),
        ({"role": "developer", "content": "be brief"}, Message("system", "be brief")),
        ({"role": "assistant", "content": None}, Message("assistant")),
        ({"role": "assistant", "content": "x", "tool_calls": []}, Message("assistant", "x")),
        (
            {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "annotations": []},
            Message("assistant", "x"),
        ),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, Message("user", (Text("a"), Text("b")))),
        ({"role": "user", "content": [{"type": "image", "path": "a.png"}]}, Message("user", (Image(path="a.png"),))),
        ({"role": "user", "content": [{"type": "image", "image": b"x"}]}, Message("user", (Image(data=b"x"),))),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}]},
            Message("user", (Image(data=b"x"),)),
        ),
        (  # OpenAI
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                    }
                ],
            },
            Message("assistant", tool_calls=(CALL,)),
        ),
        (  # Hugging Face
            {
                "role": "assistant",
                "tool_calls": [{"id": "call_1", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}],
            },
            Message("assistant", tool_calls=(CALL,)),
        ),
        (  # llama-models
            {
                "role": "assistant",
                "content": "",
                "stop_reason": "end_of_message",
                "tool_calls": [{"call_id": "call_1", "tool_name": "get_weather", "arguments": {"city": "Paris"}}],
            },
            Message("assistant", tool_calls=(CALL,), stop_reason="end_of_message"),
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "now", "arguments": ""}]},
            Message("assistant", tool_calls=(ToolCall("now"),)),
        ),
        (
            {"role": "tool", "content": "25 C", "tool_call_id": "call_1", "name": "get_weather"},
            Message("tool", "25 C", name="get_weather", tool_call_id="call_1"),
        ),
        ({"role": "ipython", "content": "1"}, Message("tool", "1")),
        ({"role": "tool", "call_id": "call_1", "content": "1"}, Message("tool", "1", tool_call_id="call_1")),
    ],
)
def test_shapes(item: dict[str, Any], message: Message) -> None:
    assert messages_from([item]) == (message,)
    assert messages_from([message, item]) == (message, message)
    assert messages_from({"messages": [item]}) == (message,)


def _calls(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(calls)}


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ("hi", "message 1 is a str"),
        ({"content": "x"}, "message 1: role is None"),
        ({"role": "robot", "content": "x"}, "message 1: role is 'robot'"),
        ({"role": ["user"]}, "message 1: role is"),
        ({"role": "user", "content": 5}, "message 1: content is a int"),
        ({"role": "user", "content": [{"type": "video"}]}, r"message 1: content\[0\]"),
        ({"role": "user", "content": [{"type": "image"}]}, "has no source"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "http://x/y.png"}]}, "not fetched"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "data:;base64,***"}]}, "not base64"),
        ({"role": "user", "text": "x"}, "message 1: field 'text'"),
        ({"role": "user", "content": "x", "name": 5}, "message 1: name is a int"),
        ({"role": "assistant", "stop_reason": "stop"}, "message 1: stop_reason is 'stop'"),
        ({"role": "assistant", "tool_calls": {"name": "f"}}, "message 1: tool_calls is a dict"),
        (_calls("f"), r"message 1: tool_calls\[0\]"),
        (_calls({"type": "custom"}), r"message 1: tool_calls\[0\]"),
        (_calls({"function": "f"}), "function is a str"),
        (_calls({"function": {}}), "name is missing"),
        (_calls({"name": "f", "arguments": "{"}), "arguments of f are not JSON"),
        (_calls({"name": "f", "arguments": "[1]"}), "arguments of f are a list"),
        (_calls({"name": "f", "id": 5}), "id is a int"),
        ({"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}, "message 1: a user message cannot carry"),
    ],
)
def test_what_is_wrong_is_named(item: Any, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        messages_from([{"role": "user", "content": "x"}, item])


@pytest.mark.parametrize("conversation", ["hi", {"role": "user"}, 5, None])
def test_a_conversation_is_a_list(conversation: Any) -> None:
    with pytest.raises(PromptError, match="a conversation is a list of messages"):
        messages_from(conversation)


def test_data_urls_without_base64() -> None:
    (message,) = messages_from([{"role": "user", "content": [{"type": "image", "url": "data:,x"}]}])
    assert message.parts == (Image(data=b"x"),)
    assert base64.b64decode("eA==") == b"x"


def test_render_by_format_and_by_name() -> None:
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    rendered = render(conversation, Llama3Format(llama3()))
    assert render(conversation, ("llama3.1", llama3())) == rendered
    assert rendered.tokens == Llama3Format(llama3()).render(messages_from(conversation), generate=False).tokens
    assert sum(rendered.loss_mask) == 2
    assert len(render(conversation, ("llama3.1", llama3()), generate=True).tokens) == len(rendered.tokens) + 4
    with pytest.raises(PromptError, match="no prompt format 'llama5'"):
        render(conversation, ("llama5", llama3()))


@pytest.mark.parametrize(
    ("format", "complaint"),
    [
        ("llama3", r"give the name with its tokenizer, \('llama3', tokenizer\)"),
        (("llama3",), r"a tuple of 1: expected \(name, tokenizer\)"),
        ((5, 6), "the name of a prompt format is text, not a int"),
        (("llama3", "tokenizer.model"), r"a str where a tokenizer belongs: open it with herd\.load_tokenizer"),
        (("llama3", None), "a NoneType where a tokenizer belongs"),
        (None, "format is a NoneType: expected a prompt format"),
    ],
)
def test_what_is_no_format_is_said(format: Any, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        render([Message("user", "hi")], format)


def test_render_takes_a_list_of_tools() -> None:
    for tools in ("brave_search", {"type": "function"}, 5):
        with pytest.raises(PromptError, match=rf"tools are a list, not a {type(tools).__name__}"):
            render([Message("user", "hi")], Llama3Format(llama3()), tools)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"role": "user", "content": 5}, "content of a user message is a int, expected text or parts"),
        ({"role": "user", "content": ("a", 5)}, "content of a user message holds a str, expected Text and Image parts"),
        ({"role": "assistant", "stop_reason": "stop"}, "stop reason 'stop' is not one of end_of_turn"),
        ({"role": "tool", "stop_reason": "end_of_turn"}, "a tool message cannot carry a stop reason"),
        ({"role": "assistant", "tool_calls": ({"name": "f"},)}, "tool_calls hold a dict, expected ToolCalls"),
    ],
)
def test_messages_of_wrong_types_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        Message(**options)


def test_render_is_public() -> None:
    import herd

    assert herd.render is render
