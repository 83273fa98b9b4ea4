"""Grammars of promised calls: what they let through is read as calls that follow the schema, and nothing else is."""

from __future__ import annotations

import random
from typing import Any

import jsonschema
import pytest

from herd.chat.callgrammar import calls_grammar
from herd.chat.dialects import DIALECTS
from herd.chat.format import ToolSpec
from herd.chat.messages import ToolCall
from herd.chat.toolcalls import CallScanner
from herd.engine.grammar_source import JSON_OPTIONS
from herd.errors import PromptError

llguidance = pytest.importorskip("llguidance")

LOOKUP = ToolSpec(
    "look.up",
    "",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "exact": {"type": "boolean"},
            "hint": {"type": ["string", "null"]},
            "where": {"$ref": "#/$defs/place"},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
        },
        "required": ["days", "exact"],
        "additionalProperties": False,
        "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
    },
)
NOW = ToolSpec("now")
TOOLS = (LOOKUP, NOW)
CALLS = [
    ToolCall("look.up", {"days": 3, "exact": True}),
    ToolCall(
        "look.up",
        {"city": 'Aix "en" Provence', "days": 1, "exact": False, "hint": None, "where": {"x": 1.5}, "tags": ["a"]},
    ),
    ToolCall("now", {}),
]
WRONG = [
    ToolCall("look.up", {"days": 3}),
    ToolCall("look.up", {"days": 30, "exact": True}),
    ToolCall("look.up", {"days": "3", "exact": True}),
    ToolCall("look.up", {"days": 3, "exact": True, "more": 1}),
    ToolCall("look.up", {"days": 3, "exact": True, "tags": ["c"]}),
    ToolCall("other", {}),
]
VOCABULARY = llguidance.LLTokenizer("byte")


def accepts(grammar: str, text: str) -> bool:
    """Whether the whole text can be written under a grammar."""
    matcher = llguidance.LLMatcher(VOCABULARY, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
    ids = VOCABULARY.tokenize_str(text)
    done = matcher.try_consume_tokens(ids) == len(ids)
    assert not matcher.is_error(), matcher.get_error()
    return done and matcher.is_accepting()


def made(dialect: str, **more: Any) -> str:
    return calls_grammar(TOOLS, dialect, options=JSON_OPTIONS, **more)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_calls_as_the_dialect_prints_them(dialect: str) -> None:
    grammar = made(dialect)
    written = DIALECTS[dialect].print
    for call in CALLS:
        assert accepts(grammar, written([call])), written([call])
    assert accepts(grammar, written(CALLS))
    assert accepts(made(dialect, parallel=False), written(CALLS[:1]))
    assert not accepts(made(dialect, parallel=False), written(CALLS))
    for call in WRONG:
        assert not accepts(grammar, written([call])), written([call])
    for text in ("", "Hello", "{}", "[]", written(CALLS)[:-1], written(CALLS) + "!"):
        assert not accepts(grammar, text), text


@pytest.mark.parametrize("dialect", DIALECTS)
def test_whatever_comes_out_is_read_as_calls(dialect: str) -> None:
    """Random walks through the grammar: the scanner finds calls only, and they follow the schema."""
    random.seed(3)
    schemas = {tool.name: dict(tool.parameters or {"type": "object", "maxProperties": 0}) for tool in TOOLS}
    whole = 0
    for _ in range(30):
        text = walked(made(dialect))
        if text is None:
            continue
        whole += 1
        scanner = CallScanner([tool.name for tool in TOOLS])
        found = scanner.feed(text) + scanner.finish()
        assert found, text
        for call in found:
            assert isinstance(call, ToolCall), text
            jsonschema.validate(call.arguments, schemas[call.name])
    assert whole > 10


def walked(grammar: str, most: int = 400) -> str | None:
    """A random text of a grammar, leaning towards its end; None when it does not come to one."""
    matcher = llguidance.LLMatcher(VOCABULARY, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
    out = bytearray()
    for _ in range(most):
        if matcher.is_accepting() and random.random() < 0.5:
            # Halves of pairs are no calls, by design.
            return out.decode("utf-8", "replace") if b"\\u" not in out else None
        bits = matcher.compute_bitmask()
        allowed = [i for i in range(256) if bits[i // 8] >> (i % 8) & 1]
        closing = [i for i in allowed if i in b'"}])' and random.random() < 0.6]
        printable = [i for i in allowed if 32 <= i < 127] or allowed
        if not allowed:
            return out.decode() if matcher.is_accepting() else None
        token = random.choice(closing or printable)
        matcher.consume_token(token)
        out.append(token)
    return None


@pytest.mark.parametrize("dialect", DIALECTS)
def test_calls_or_a_form(dialect: str) -> None:
    tools = (ToolSpec("f", "", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}), NOW)
    form = {
        "type": "object",
        "properties": {"k": {"type": "integer"}},
        "required": ["k"],
        "additionalProperties": False,
    }
    grammar = calls_grammar(tools, dialect, options=JSON_OPTIONS, otherwise=form)
    written = DIALECTS[dialect].print
    for text in (
        '{"k": 3}',
        written([ToolCall("f", {"a": 1})]),
        written([ToolCall("f", {"a": 1}), ToolCall("now", {})]),
    ):
        assert accepts(grammar, text), text
    for text in ('{"k": "x"}', "text", '{"k": 3}; {"k": 3}'):
        assert not accepts(grammar, text), text


@pytest.mark.parametrize("dialect", DIALECTS)
def test_calls_or_text(dialect: str) -> None:
    grammar = made(dialect, text=True)
    written = DIALECTS[dialect].print
    for text in ("", "Hello.\n{ or [1]", " x", written(CALLS)):
        assert accepts(grammar, text), text
    for text in (written(WRONG[:1]), "{", " {", "[1]"):
        assert not accepts(grammar, text), text


def test_text_that_holds_a_call_later_is_text() -> None:
    scanner = CallScanner(["now"], leading_only=True)
    text = 'Look:\n{"name": "now", "parameters": {}}\n[now()]'
    assert "".join(map(str, scanner.feed(text) + scanner.finish())) == text
    scanner = CallScanner(["now"], leading_only=True)
    assert scanner.feed('{"name": "now", "parameters": {}}') + scanner.finish() == [ToolCall("now", {})]


@pytest.mark.parametrize(
    ("tool", "dialect", "said"),
    [
        (ToolSpec("f", "", {"type": "object", "properties": {"a b": {}}}), "pythonic", "a b"),
        (ToolSpec("f", "", {"type": "object", "properties": {"a": {}}, "anyOf": [{}]}), "pythonic", "anyOf"),
        (ToolSpec("f>g", "", None), "function_tag", "f>g"),
        (ToolSpec("f", "", {"type": "object", "properties": {"a": {"default": float("nan")}}}), "json", "JSON"),
    ],
)
def test_what_cannot_be_promised_is_refused(tool: ToolSpec, dialect: str, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        calls_grammar([tool], dialect)
    with pytest.raises(PromptError, match="no tools"):
        calls_grammar([], dialect)


def test_references_beside_a_form_are_refused_where_they_would_be_lost() -> None:
    with pytest.raises(PromptError, match="ref"):
        calls_grammar(TOOLS, "json", otherwise={"type": "object"})
