"""The stream parser on ids: whatever the pieces, one message; markers, stop ids, and replies cut short."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from herd.chat.base import BaseFormat
from herd.chat.dialects import DIALECTS
from herd.chat.format import Delta, ToolSpec
from herd.chat.headers import HeaderFormat
from herd.chat.llama3 import Llama3Format
from herd.chat.llama4 import Llama4Format
from herd.chat.messages import Message, ToolCall
from herd.chat.reply import ReplyParser
from herd.chat.toolspec import BUILTIN_TOOLS
from tests.chat.conversations import TEXTS
from tests.vocabularies import Pieces, llama3, llama4

TOOLS = [ToolSpec("get_weather"), ToolSpec("get"), BUILTIN_TOOLS["brave_search"]]
WEATHER = ToolCall("get_weather", {"city": "São Paulo 🙂", "days": [1, 2]})


def feed(parser: ReplyParser, ids: Iterable[int]) -> tuple[Message, list[Delta]]:
    """The message, and every delta; checks that the deltas say what the message says."""
    deltas = [delta for id in ids for delta in parser.push(id)] + parser.close()
    message = parser.message()
    assert "".join(delta.text for delta in deltas if delta.text is not None) == message.content
    assert tuple(delta.tool_call for delta in deltas if delta.tool_call is not None) == message.tool_calls
    assert [delta.stop_reason for delta in deltas if delta.stop_reason is not None] == [message.stop_reason]
    assert all(sum(value is not None for value in (d.text, d.tool_call, d.stop_reason)) == 1 for d in deltas)
    assert not any(delta.text == "" for delta in deltas)
    return message, deltas


def written(format: HeaderFormat, message: Message) -> list[int]:
    """The ids an assistant message is learned as: what a model that says it generates."""
    rendered = format.render([Message("user", "x"), message], generate=False)
    return [id for id, learn in zip(rendered.tokens, rendered.loss_mask, strict=True) if learn]


FORMATS = {
    **{f"llama3 {dialect}": lambda dialect=dialect: Llama3Format(llama3(), dialect=dialect) for dialect in DIALECTS},
    **{f"llama4 {dialect}": lambda dialect=dialect: Llama4Format(llama4(), dialect=dialect) for dialect in DIALECTS},
}
MESSAGES = [
    *(Message("assistant", text, (), "end_of_turn") for text in TEXTS),
    Message("assistant", "wait", (), "end_of_message"),
    Message("assistant", "", (WEATHER,), "end_of_turn"),
    Message("assistant", "", (WEATHER, ToolCall("get"), WEATHER), "end_of_message"),
    Message("assistant", "Let me look 🙂.\n", (WEATHER,), "end_of_message"),
    Message("assistant", "", (ToolCall("code_interpreter", {"code": "print('é🙂')\n"}),), "end_of_message"),
    Message("assistant", "Computing.", (ToolCall("code_interpreter", {"code": "1"}),), "end_of_turn"),
    Message("assistant", "", (ToolCall("brave_search", {"query": 'say "hi"'}),), "end_of_message"),
]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_rendered_is_read_back(name: str) -> None:
    format = FORMATS[name]()
    for message in MESSAGES:
        read, _ = feed(format.parser(TOOLS), written(format, message))
        assert read == message


def test_text_in_any_pieces_gives_the_same() -> None:
    format = Llama3Format(llama3())
    rng = random.Random(3)
    for message in MESSAGES:
        if any(call.name in ("code_interpreter", "brave_search") for call in message.tool_calls):
            continue
        text = llama3().decode(written(format, message))
        for _ in range(20):
            parser = format.parser(TOOLS)
            at = 0
            while at < len(text):
                step = rng.randint(1, 7)
                parser.push_text(text[at : at + step])
                at += step
            parser.close()
            assert parser.message().content == message.content
            assert parser.message().tool_calls == message.tool_calls


def ids3(text: str) -> list[int]:
    return llama3().encode(text, allow_special=True)


def ids4(text: str) -> list[int]:
    return llama4().encode(text, allow_special=True)


def code(source: str) -> tuple[ToolCall, ...]:
    return (ToolCall("code_interpreter", {"code": source}),)


@pytest.mark.parametrize(
    ("reply", "content", "calls"),
    [
        ("<|python_tag|>print(1)<|eom_id|>", "", code("print(1)")),
        ("<|python_tag|>{'a': 1}<|eom_id|>", "", code("{'a': 1}")),
        ('<|python_tag|>{"name": "any", "parameters": {}}<|eom_id|>', "", (ToolCall("any"),)),
        ("<|python_tag|>[get(a=1), any()]<|eot_id|>", "", (ToolCall("get", {"a": 1}), ToolCall("any"))),
        ('<|python_tag|>wolfram_alpha.call(query="pi")<|eom_id|>', "", (ToolCall("wolfram_alpha", {"query": "pi"}),)),
        ('<|python_tag|>brave_search.call(query="a" + b)<|eom_id|>', "", code('brave_search.call(query="a" + b)')),
        ("<|python_tag|><function=any>{}</function><|eom_id|>", "", (ToolCall("any"),)),
        ("So: <|python_tag|>1<|eom_id|>", "So: ", code("1")),
        ("<|python_tag|><|eom_id|>", "", ()),
        ("<|python_tag|> \n<|eot_id|>", "", ()),
        ('brave_search.call(query="x")<|eot_id|>', "", (ToolCall("brave_search", {"query": "x"}),)),
        ('wolfram_alpha.call(query="x")<|eot_id|>', 'wolfram_alpha.call(query="x")', ()),
        ('{"name": "any", "parameters": {}}<|eot_id|>', '{"name": "any", "parameters": {}}', ()),
        ('{"name": "get", "parameters": {}<|eot_id|>', '{"name": "get", "parameters": {}', ()),
        ("hi<|reserved_special_token_5|> there<|eot_id|>", "hi there", ()),
    ],
)
def test_llama3_replies(reply: str, content: str, calls: tuple[ToolCall, ...]) -> None:
    message, _ = feed(Llama3Format(llama3()).parser(TOOLS), ids3(reply))
    assert (message.content, message.tool_calls) == (content, calls)
    assert message.stop_reason == ("end_of_message" if reply.endswith("<|eom_id|>") else "end_of_turn")


@pytest.mark.parametrize(
    ("reply", "content", "calls"),
    [
        ("<|python_start|>print(1)<|python_end|><|eom|>", "", code("print(1)")),
        ("<|python_start|>print(1)<|eom|>", "", code("print(1)")),
        ("<|python_start|>[any(a=1)]<|python_end|><|eot|>", "", (ToolCall("any", {"a": 1}),)),
        ('<|python_start|><|python_end|>{"name": "get", "parameters": {}}<|eot|>', "", (ToolCall("get"),)),
        ("[get(a=1), get()]<|eot|>", "", (ToolCall("get", {"a": 1}), ToolCall("get"))),
        ("<|python_start|>1<|python_end|> and <|python_start|>2<|python_end|><|eom|>", " and ", code("1") + code("2")),
        ("done<|python_end|><|eot|>", "done", ()),
    ],
)
def test_llama4_replies(reply: str, content: str, calls: tuple[ToolCall, ...]) -> None:
    message, _ = feed(Llama4Format(llama4()).parser(TOOLS), ids4(reply))
    assert (message.content, message.tool_calls) == (content, calls)


@pytest.mark.parametrize(
    ("reply", "content"),
    [
        ("Once upon", "Once upon"),
        ("", ""),
        ("<|python_tag|>import os\nos.remove('a", "import os\nos.remove('a"),
        ('<|python_tag|>brave_search.call(query="la', 'brave_search.call(query="la'),
        ('{"name": "get", "parameters": {"a"', '{"name": "get", "parameters": {"a"'),
        ("[get(a='x", "[get(a='x"),
    ],
)
def test_a_reply_cut_short_is_text_and_never_runs(reply: str, content: str) -> None:
    message, _ = feed(Llama3Format(llama3()).parser(TOOLS), ids3(reply))
    assert message == Message("assistant", content, (), "out_of_tokens")


def test_half_a_character_at_the_end_is_not_lost() -> None:
    ids = llama3().encode("🙂")
    assert len(ids) > 1
    message, _ = feed(Llama3Format(llama3()).parser(), ids[:-1])
    assert message.content == "\ufffd"


def test_stop_ids_end_the_reply_once() -> None:
    parser = Llama3Format(llama3()).parser()
    special = llama3().special.ids
    assert parser.push(special["<|eot_id|>"]) == [Delta(stop_reason="end_of_turn")]
    assert parser.push(1) == []
    assert parser.push_text("more") == []
    assert parser.close() == []
    assert parser.message().content == ""
    base = Llama3Format(llama3()).parser()
    assert base.push(special["<|end_of_text|>"]) == [Delta(stop_reason="end_of_turn")]


def test_text_streams_token_by_token() -> None:
    _, deltas = feed(Llama3Format(llama3()).parser(TOOLS), ids3("The sky is blue today.<|eot_id|>"))
    assert len(deltas) == 7


def test_base_models_keep_the_space_that_goes_on(pieces: Pieces) -> None:
    parser = BaseFormat(pieces.tokenizer).parser()
    for id in pieces.tokenizer.encode("red, orange"):
        parser.push(id)
    assert parser.message().content == " red, orange"
    assert BaseFormat(pieces.tokenizer).complete("The sky").tokens == [1, *pieces.tokenizer.encode("The sky")]
