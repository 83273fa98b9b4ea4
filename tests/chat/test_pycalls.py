"""The reader of Python calls: literals as ast.literal_eval reads them, nothing else, nothing evaluated."""

from __future__ import annotations

import ast
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.chat.messages import ToolCall
from herd.chat.pycalls import MAX_DEPTH, parse_dotted_call, parse_python_calls, print_dotted_call, print_python_calls
from herd.errors import PromptError

CHARACTERS = st.characters(exclude_categories=["Cs"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(CHARACTERS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(CHARACTERS, max_size=5), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.from_regex(r"\A[a-z_][a-z0-9_]{0,8}\Z")


def _argument(literal: str) -> Any:
    calls = parse_python_calls(f"[f(a={literal})]")
    assert calls is not None, literal
    return calls[0][1]["a"]


@settings(max_examples=120, deadline=None)
@given(VALUES)
def test_reads_what_repr_writes(value: Any) -> None:
    assert _argument(repr(value)) == value


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3))
def test_reads_what_it_prints(calls: list[tuple[str, dict[str, Any]]]) -> None:
    text = print_python_calls([ToolCall(name, arguments) for name, arguments in calls])
    assert parse_python_calls(text) == calls


LITERALS = [
    "1", "-1", "+2", "0", "1_000", "0x1F", "1.5", "-2.5e3", ".5", "5.", "1e-7", "True", "False", "None",
    "'a'", '"a"', "'it\\'s'", '"say \\"hi\\""', "'''a'b''c'''", '"""line\nline"""', "'\\n\\t\\\\'", "'\\x41\\u00e9\\U0001F642'",
    "'\\101'", "r'\\d+'", 'R"\\d"', "'a' 'b'", "[]", "[1, 2,]", "{}", "{'a': [1, {'b': None}]}", "(1)", "'\\d'",
    "'漢字 🙂'", "''", '""', "'a\\\nb'",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")
@pytest.mark.parametrize("literal", LITERALS)
def test_literals_as_python_reads_them(literal: str) -> None:
    assert _argument(literal) == ast.literal_eval(literal)


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("true", True),
        ("false", False),
        ("null", None),
        ("(1, 2)", [1, 2]),
        ("(1,)", [1]),
        ("()", []),
        ("'a\nb'", "a\nb"),  # a raw line end inside quotes: models write it
        ('"\\ud83d\\ude42"', "🙂"),  # JSON's way to write a character
    ],
)
def test_what_models_write_beyond_python(literal: str, value: Any) -> None:
    assert _argument(literal) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "[1]", "f(a=1)", "[f(1)]", "[f(a=1) g()]", "[f(a=1)", "[f(a=1)] x", "[f(a=b)]", "[f(a=g())]", "[f(*x)]",
        "[f(**{'a': 1})]", "[f(a=1+1)]", "[f(a=__import__('os'))]", "[f(a=f'{x}')]", "[f(a=b'x')]", "[f(a={1, 2})]",
        "[f(a={1: 2})]", "[f(a=1, a=2)]", "[f(a=1j)]", "[f(a=...)]", "[f(a=lambda: 0)]", "[f(a='x)]", "[f.(a=1)]", "[f(a=)]",
        "[f(a=01x)]", "[f(a=1e999)]", "[f(a='\\ud800')]", "[f(a=nan)]", "[f(a=inf)]",
        "[f(a='\\x4')]", "[f(a=1__0)]", "[f(a=-)]", "[f(a=[1 2])]", "[f()[0]]", "[f().g()]", "[(f)()]",
        f"[f(a={'9' * 5000})]",
    ],
)  # fmt: skip
def test_anything_else_is_not_a_call(text: str) -> None:
    assert parse_python_calls(text) is None


def test_names_that_python_refuses() -> None:
    calls = parse_python_calls("[book-trip(from='A', to='B'), math.add(class=1)]")
    assert calls == [("book-trip", {"from": "A", "to": "B"}), ("math.add", {"class": 1})]


def test_deep_nesting_is_refused_quickly() -> None:
    assert _argument("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    start = time.perf_counter()
    assert parse_python_calls("[f(a=" + "[" * 100_000 + "]" * 100_000 + ")]") is None
    assert parse_python_calls("[f(a=" + "(" * 100_000) is None
    assert time.perf_counter() - start < 1


def test_dotted_calls() -> None:
    assert parse_dotted_call('brave_search.call(query="gold price")') == ("brave_search", {"query": "gold price"})
    assert parse_dotted_call("brave_search(query='x')") is None
    assert parse_dotted_call('brave_search.call(query="x") and more') is None
    call = ToolCall("brave_search", {"query": 'say "hi"\n'})
    assert print_dotted_call(call) == 'brave_search.call(query="say \\"hi\\"\\n")'
    assert parse_dotted_call(print_dotted_call(call)) == (call.name, call.arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (ToolCall("too fast"), "too fast"),
        (ToolCall("f", {"a b": 1}), "a b"),
        (ToolCall("f", {"a": float("nan")}), "JSON values"),
        (ToolCall("f", {"a": {1}}), "JSON values"),
    ],
)
def test_what_cannot_be_printed_is_said(call: ToolCall, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        print_python_calls([call])
