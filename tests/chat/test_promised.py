"""Promised calls told while they are written: joined, the parts are the calls, however the text was cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from herd.chat.dialects import DIALECTS
from herd.chat.format import Delta, ToolSpec
from herd.chat.llama3 import Llama3Format
from herd.chat.messages import ToolCall
from herd.chat.promised import PromisedCalls
from tests.cli.tiny import tokenizer

TOOLS = (ToolSpec("get.it"), ToolSpec("g"))
CALLS = [
    ToolCall("get.it", {"a": {"b": ['}]"', "é\n"]}, "c": 1.5}),
    ToolCall("g", {}),
    ToolCall("get.it", {"text": '"; {"name": "g", "parameters": {}}'}),
]


def read(text: str, dialect: str, *, stop: bool = True) -> list[Delta]:
    """The deltas of a reply that is this text, byte by byte."""
    format = Llama3Format(tokenizer(), dialect=dialect)
    parser: Any = format.parser(TOOLS)
    parser.leading_calls_only()
    promised = PromisedCalls(parser, tokenizer(), [tool.name for tool in TOOLS])
    out = [delta for byte in text.encode() for delta in promised.push(byte)]
    if stop:
        out += promised.push(tokenizer().special.ids["<|eot_id|>"])
    return out + promised.close()


def told(deltas: list[Delta]) -> dict[int, tuple[str | None, str]]:
    """Number -> name and arguments of the parts."""
    out: dict[int, tuple[str | None, str]] = {}
    for delta in deltas:
        if (part := delta.part) is not None:
            name, arguments = out.get(part.number, (None, ""))
            assert part.name is None or name is None, "a name is told once"
            out[part.number] = (part.name or name, arguments + part.arguments)
    return out


@pytest.mark.parametrize("dialect", ["json", "meta_json", "function_tag"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_the_calls(dialect: str, count: int) -> None:
    text = DIALECTS[dialect].print(CALLS[:count])
    deltas = read(text, dialect)
    parts = told(deltas)
    assert [(name, json.loads(arguments)) for name, arguments in parts.values()] == [
        (call.name, call.arguments) for call in CALLS[:count]
    ]
    assert [delta.tool_call for delta in deltas if delta.tool_call] == CALLS[:count]
    assert not [delta for delta in deltas if delta.text]
    first = next(i for i, delta in enumerate(deltas) if delta.tool_call)
    assert len([delta for delta in deltas[:first] if delta.part]) > 10, "they come before the call is complete"


def test_python_calls_are_named_at_once() -> None:
    deltas = read(DIALECTS["pythonic"].print(CALLS), "pythonic")
    assert deltas[0].part is not None
    assert deltas[0].part.name == "get.it"
    assert told(deltas) == {0: ("get.it", "")}
    assert [delta.tool_call for delta in deltas if delta.tool_call] == CALLS


@pytest.mark.parametrize("dialect", ["json", "pythonic"])
def test_a_call_that_is_cut_short_is_not_told_twice(dialect: str) -> None:
    text = DIALECTS[dialect].print(CALLS[:1])[:-4]
    deltas = read(text, dialect, stop=False)
    assert told(deltas)[0][0] == "get.it"
    assert not [delta for delta in deltas if delta.text or delta.tool_call]
    assert deltas[-1].stop_reason == "out_of_tokens"


@pytest.mark.parametrize("dialect", ["json", "pythonic"])
def test_text_stays_text(dialect: str) -> None:
    text = 'Hello.\n{"name": "g", "parameters": {}}\n[g()]'
    deltas = read(text, dialect)
    assert "".join(delta.text or "" for delta in deltas) == text
    assert not told(deltas)
