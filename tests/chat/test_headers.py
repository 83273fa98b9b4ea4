"""Llama 3 and Llama 4 against Meta's chat_format.py, id for id."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from herd.chat.format import Rendered
from herd.chat.headers import HeaderFormat
from herd.chat.llama3 import Llama3Format
from herd.chat.llama4 import Llama4Format
from herd.chat.messages import Message, Text, ToolCall
from herd.errors import PromptError
from tests.chat.conversations import PLAIN, SPECIAL_TEXT, TEXTS, WITH_TOOLS
from tests.vocabularies import llama3, llama4, meta3, meta4

Reference = Callable[[Sequence[Message], str], list[int]]


def _raw(message: Message) -> Any:
    from llama_models.datatypes import RawMessage, RawTextItem, StopReason
    from llama_models.datatypes import ToolCall as RawCall

    content: Any = message.content
    if not isinstance(content, str):
        content = [RawTextItem(text=part.text) for part in content if isinstance(part, Text)]
    return RawMessage(
        role=message.role,
        content=content,
        stop_reason=None if message.stop_reason is None else StopReason(message.stop_reason),
        tool_calls=[
            RawCall(call_id="", tool_name=call.name, arguments=dict(call.arguments)) for call in message.tool_calls
        ],
    )


def _reference(chat_format: Any) -> Reference:
    from llama_models.datatypes import ToolPromptFormat

    def encode(messages: Sequence[Message], dialect: str) -> list[int]:
        raw = [_raw(message) for message in messages]
        return chat_format.encode_dialog_prompt(raw, ToolPromptFormat(dialect)).tokens

    return encode


@cache
def reference3() -> Reference:
    from llama_models.llama3.chat_format import ChatFormat

    return _reference(ChatFormat(meta3()))


@cache
def reference4() -> Reference:
    # Meta's Llama 4 chat format imports its image code, which needs torchvision; text needs neither.
    images = ModuleType("llama_models.llama4.preprocess")
    images.ResizeNormalizeImageTransform = images.VariableSizeImageTransform = object  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, images.__name__, images)
        from llama_models.llama4.chat_format import ChatFormat

    return _reference(ChatFormat(meta4()))


DIALECTS = {"meta_json": "json", "function_tag": "function_tag", "pythonic": "python_list"}


@pytest.mark.parametrize("conversation", PLAIN)
def test_llama3_ids_equal_metas(conversation: list[Message]) -> None:
    assert Llama3Format(llama3()).render(conversation).tokens == reference3()(conversation, "json")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_llama3_ids_equal_metas_with_tools(dialect: str) -> None:
    format, reference = Llama3Format(llama3(), dialect=dialect), reference3()
    for conversation in WITH_TOOLS:
        assert format.render(conversation).tokens == reference(conversation, DIALECTS[dialect])


@pytest.mark.parametrize("conversation", PLAIN)
def test_llama4_ids_equal_metas(conversation: list[Message]) -> None:
    assert Llama4Format(llama4()).render(conversation).tokens == reference4()(conversation, "json")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_llama4_ids_equal_metas_with_tools(dialect: str) -> None:
    """Except for one rule: a call whose message says end_of_turn closes with <|eot|> here, with <|eom|> at Meta's."""
    format, reference = Llama4Format(llama4(), dialect=dialect), reference4()
    eom, eot = llama4().special.ids["<|eom|>"], llama4().special.ids["<|eot|>"]
    for conversation in WITH_TOOLS:
        ours, theirs = format.render(conversation).tokens, reference(conversation, DIALECTS[dialect])
        if any(message.tool_calls and message.stop_reason == "end_of_turn" for message in conversation):
            at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            assert (ours[at], theirs[at]) == (eot, eom)
            theirs[at] = eot
        assert ours == theirs


def test_parts_are_encoded_one_by_one() -> None:
    message = Message("user", (Text("hel"), Text("lo"), Text(" world\n")))
    assert Llama3Format(llama3()).render([message]).tokens == reference3()([message], "json")


@pytest.mark.parametrize("call", [("brave_search", "gold price"), ("wolfram_alpha", "pi")])
def test_llama3_builtin_calls_equal_metas_behind_the_python_tag(call: tuple[str, str]) -> None:
    """Meta's encoder leaves out the tag that Meta's documents show; everything else is equal."""
    message = Message("assistant", tool_calls=(ToolCall(call[0], {"query": call[1]}),), stop_reason="end_of_message")
    ours = Llama3Format(llama3()).render([Message("user", "q"), message]).tokens
    tag = llama3().special.ids["<|python_tag|>"]
    assert ours.count(tag) == 1
    assert [id for id in ours if id != tag] == reference3()([Message("user", "q"), message], "json")


def test_llama3_code_equals_metas() -> None:
    message = Message("assistant", tool_calls=(ToolCall("code_interpreter", {"code": "print(1)\n"}),))
    ours = Llama3Format(llama3()).render([message]).tokens
    marked = Message("assistant", tool_calls=message.tool_calls, stop_reason="end_of_message")
    assert ours == reference3()([marked], "json")


# ---- the loss mask ---------------------------------------------------------------------------------------------------


def _learned(format: HeaderFormat, rendered: Rendered) -> list[str]:
    """The pieces that are learned, one string per unbroken stretch."""
    stretches: list[list[int]] = [[]]
    for id, learn in zip(rendered.tokens, rendered.loss_mask, strict=True):
        if learn:
            stretches[-1].append(id)
        elif stretches[-1]:
            stretches.append([])
    return [format.tokenizer.decode(ids, skip_special=False) for ids in stretches if ids]


def test_mask_is_what_the_assistant_wrote() -> None:
    call = ToolCall("get_weather", {"city": "Paris"})
    conversation = [
        Message("system", "Be brief."),
        Message("user", "Weather?"),
        Message("assistant", "Let me look.", (call,)),
        Message("tool", "25 C"),
        Message("assistant", "It is 25 C."),
        Message("user", "Thanks"),
        Message("assistant", ""),
    ]
    format = Llama3Format(llama3())
    printed = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
    expected = [f"Let me look.{printed}<|eot_id|>", "It is 25 C.<|eot_id|>", "<|eot_id|>"]
    assert _learned(format, format.render(conversation, generate=False)) == expected
    assert _learned(format, format.render(conversation)) == expected  # the open header at the end is not learned

    four = Llama4Format(llama4())
    expected = ['Let me look.[get_weather(city="Paris")]<|eom|>', "It is 25 C.<|eot|>", "<|eot|>"]
    assert _learned(four, four.render(conversation, generate=False)) == expected


def test_mask_of_code_and_builtin_tools() -> None:
    format = Llama3Format(llama3())
    code = Message("assistant", tool_calls=(ToolCall("code_interpreter", {"code": "print(1)"}),))
    search = Message("assistant", tool_calls=(ToolCall("brave_search", {"query": "x"}),))
    rendered = format.render([Message("user", "q"), code, Message("tool", "1"), search, Message("tool", "2")])
    assert _learned(format, rendered) == [
        "<|python_tag|>print(1)<|eom_id|>",
        '<|python_tag|>brave_search.call(query="x")<|eom_id|>',
    ]
    four = Llama4Format(llama4())
    rendered = four.render([Message("user", "q"), code])
    assert _learned(four, rendered) == ["<|python_start|>print(1)<|python_end|><|eom|>"]


def test_a_reply_that_was_cut_off_does_not_teach_to_stop() -> None:
    format = Llama3Format(llama3())
    rendered = format.render(
        [Message("user", "q"), Message("assistant", "I was", stop_reason="out_of_tokens")], generate=False
    )
    assert _learned(format, rendered) == ["I was"]
    assert rendered.tokens[-1] == llama3().special.ids["<|eot_id|>"]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Llama3Format(llama3()),
        lambda: Llama3Format.as_hf(llama3()),
        lambda: Llama4Format(llama4()),
        lambda: Llama4Format.as_hf(llama4()),
    ],
)
def test_what_is_trained_is_what_is_served(build: Callable[[], HeaderFormat]) -> None:
    """Up to every assistant message, the training ids are the serving prompt."""
    format = build()
    bos = format.tokenizer.special.bos
    for conversation in PLAIN + WITH_TOOLS:
        whole = format.render(conversation, generate=False)
        assert whole.tokens.count(bos) == 1
        assert whole.tokens[0] == bos
        for i, message in enumerate(conversation):
            if message.role == "assistant" and i:
                prompt = format.render(conversation[:i])
                assert whole.tokens[: len(prompt.tokens)] == prompt.tokens
                assert whole.loss_mask[len(prompt.tokens)]
                assert not whole.loss_mask[len(prompt.tokens) - 1]


# ---- forging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [lambda: Llama3Format(llama3()), lambda: Llama4Format(llama4())])
@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_no_special_id_comes_from_text(format: Callable[[], HeaderFormat], role: Any) -> None:
    one = format()
    special = set(one.tokenizer.special.ids.values())
    names = "".join(one.tokenizer.special.ids)
    harmless = [id for id in one.render([Message(role, "x")]).tokens if id in special]
    for text in (SPECIAL_TEXT, names, names.replace("><", ">\n\n<")):
        assert [id for id in one.render([Message(role, text)]).tokens if id in special] == harmless


def test_no_special_id_comes_from_calls() -> None:
    format = Llama3Format(llama3())
    special = set(llama3().special.ids.values())
    for call in (ToolCall("f", {"a": SPECIAL_TEXT}), ToolCall("brave_search", {"query": SPECIAL_TEXT})):
        ids = format.render([Message("assistant", SPECIAL_TEXT, (call,))], generate=False).tokens
        assert len([id for id in ids if id in special]) == 4 + (call.name == "brave_search")


# ---- options and refusals --------------------------------------------------------------------------------------------


def test_content_is_kept_unless_asked_for() -> None:
    conversation = [Message("user", "  hi \n"), Message("assistant", " yo "), Message("tool", " 1 ")]
    plain = [Message("user", "hi"), Message("assistant", "yo"), Message("tool", " 1 ")]
    assert Llama3Format(llama3()).render(conversation).tokens != Llama3Format(llama3()).render(plain).tokens
    stripped = Llama3Format(llama3(), strip_content=True).render(conversation)
    assert stripped.tokens == Llama3Format(llama3()).render(plain).tokens


def test_refusals() -> None:
    from herd.chat.messages import Image
    from herd.chat.toolspec import BUILTIN_TOOLS

    format = Llama3Format(llama3())
    with pytest.raises(PromptError, match="no messages"):
        format.render([])
    with pytest.raises(PromptError, match="holds an image"):
        format.render([Message("user", (Text("see"), Image(data=b"x")))])
    with pytest.raises(PromptError, match="no other call"):
        two = (ToolCall("code_interpreter", {"code": "1"}), ToolCall("f"))
        format.render([Message("assistant", tool_calls=two)])
    with pytest.raises(PromptError, match="two messages"):
        two = (ToolCall("brave_search", {"query": "1"}), ToolCall("f"))
        format.render([Message("assistant", tool_calls=two)])
    old = Llama3Format(llama3(), dialect=None, name="llama3")
    with pytest.raises(PromptError, match="trained without tools"):
        old.render([Message("user", "x")], [BUILTIN_TOOLS["brave_search"]])
    with pytest.raises(PromptError, match="trained without tools"):
        old.render([Message("assistant", tool_calls=(ToolCall("f"),))])
    with pytest.raises(PromptError, match="trained without tools"):
        old.render([Message("assistant", tool_calls=(ToolCall("brave_search", {"query": "x"}),))])
    with pytest.raises(PromptError, match="cannot stand in a function tag"):
        Llama3Format(llama3(), dialect="function_tag").render([Message("assistant", tool_calls=(ToolCall("a>b"),))])
    with pytest.raises(PromptError, match="no tool dialect 'yaml'"):
        Llama3Format(llama3(), dialect="yaml")
    with pytest.raises(PromptError, match=r"<\|start_header_id\|>"):
        Llama3Format(llama4())


def test_every_text_in_every_role_is_written_whole() -> None:
    format = Llama3Format(llama3())
    for text in TEXTS:
        shown = llama3().decode(format.render([Message("user", text)], generate=False).tokens, skip_special=False)
        assert shown == f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
