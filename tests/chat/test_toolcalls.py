"""The call scanner: every dialect, every split point, text that only looks like a call, broken and hostile text."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.chat.dialects import DIALECTS
from herd.chat.messages import ToolCall
from herd.chat.toolcalls import CallScanner, parse_calls

NAMES = ("get_weather", "get", "send-mail", "math.add", "brave_search")
Item = str | ToolCall


def scan(pieces: Iterable[str], names: Sequence[str] | None = NAMES) -> list[Item]:
    """Texts and calls in order, adjacent texts joined."""
    scanner = CallScanner(names)
    out: list[Item] = []
    for item in itertools.chain(*(scanner.feed(piece) for piece in pieces), scanner.finish()):
        if isinstance(item, str) and out and isinstance(out[-1], str):
            out[-1] += item
        else:
            out.append(item)
    return out


def call(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments)


PARIS = call("get_weather", city="Paris")
CASES: list[tuple[str, list[Item]]] = [
    # JSON
    ('{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
    ('{"name":"get_weather","arguments":{"city":"Paris"}}', [PARIS]),
    ('{"name":"get_weather","arguments":"{\\"city\\": \\"Paris\\"}"}', [PARIS]),
    ('{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
    ('{"type":"function","function":{"name":"get_weather","arguments":{"city":"Paris"}}}', [PARIS]),
    ('{"parameters": {"city": "Paris"}, "name": "get_weather"}', [PARIS]),
    ('{\n    "name": "get_weather",\n    "parameters": {\n        "city": "Paris"\n    }\n}', [PARIS]),
    ('{"name": "get"}', [call("get")]),
    ('[{"name": "get", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "Paris"}}]', [call("get"), PARIS]),
    ('{"name":"get","parameters":{}}; {"name":"get","parameters":{"a":1}}', [call("get"), call("get", a=1)]),
    ('{"name":"get","parameters":{}}\n{"name":"get","parameters":{"a":1}}', [call("get"), call("get", a=1)]),
    ('{"name":"get","parameters":{}}{"name":"get","parameters":{"a":1}}', [call("get"), call("get", a=1)]),
    ('{"name":"get","parameters":{}}, {"name":"get","parameters":{"a":1}}', [call("get"), call("get", a=1)]),
    ('\n\n  {"name":"get","parameters":{}}\n', [call("get")]),
    ('Sure.\n{"name":"get","parameters":{}}', ["Sure.\n", call("get")]),
    ('{"name":"get","parameters":{}}\n\nDone.', [call("get"), "\n\nDone."]),
    ('{"name":"get","parameters":{"a":"}] \\" {"}}', [call("get", a='}] " {')]),
    ('{"name":"get","parameters":{"a":"line\nline"}}', [call("get", a="line\nline")]),
    ('{"name":"get","parameters":{"a":"漢字 🙂 \\u00e9"}}', [call("get", a="漢字 🙂 é")]),
    # function tags
    ('<function=get_weather>{"city": "Paris"}</function>', [PARIS]),
    ('<function=get_weather>{"city": "Paris"}', [PARIS]),
    ('<function=get> {"a": {"b": 1}} </function>\n<function=get>{}</function>', [call("get", a={"b": 1}), call("get")]),
    ('I will call <function=get>{}</function> now', ["I will call ", call("get"), " now"]),
    ('<function=get>{}</function>.', [call("get"), "."]),
    ('<function=get>{} </functio', [call("get"), " </functio"]),
    # Python lists
    ("[get_weather(city='Paris')]", [PARIS]),
    ('[get_weather(city="Paris"), get()]', [PARIS, call("get")]),
    ("[get(a=[1, -2, {'k': None}], b=True, c='a, b) ]')]", [call("get", a=[1, -2, {"k": None}], b=True, c="a, b) ]")]),
    ("[get(a='''x'y\"z''', b='')]", [call("get", a="x'y\"z", b="")]),
    ("[get(a=\"\", b='')]", [call("get", a="", b="")]),
    ("[send-mail(from='a'), math.add(x=1)]", [ToolCall("send-mail", {"from": "a"}), ToolCall("math.add", {"x": 1})]),
    ("[ get ( a = 1 ) ]\n[get()]", [call("get", a=1), call("get")]),
    ("[get()][get()]", [call("get"), call("get")]),
    ("Here:\n[get(a='é🙂')]", ["Here:\n", call("get", a="é🙂")]),
    # built-in tools
    ('brave_search.call(query="gold")', [call("brave_search", query="gold")]),
    ('brave_search.call(query="a")\nbrave_search.call(query="b")', [call("brave_search", query=q) for q in "ab"]),
    ('ok\nbrave_search.call(query="gold")', ["ok\n", call("brave_search", query="gold")]),
]  # fmt: skip

# Text that must come out exactly as it went in.
TEXTS = [
    "", " ", "\n\n", "Hello, world!", "  indented", "a < b and <c>", "{", "[", "<", "<function", "{}", "[]", "[1, 2]",
    '{"name": "unknown_tool", "parameters": {}}', '{"name": "getter", "parameters": {}}', '{"name": "ge", "parameters": {}}',
    '{"city": "Paris"}', '{"name": "get", "age": 5}', '{"name": "get", "parameters": [1]}', '{"name": 5}',
    '{"name": "get", "parameters": {"a": 1}', '{"name": "get", "parameters": {"a": NaN}}', '{"name": "get" oops}',
    '{"name": "get", "parameters": {"a": 1e999}}', '{"name": "get", "parameters": {"a": "\\ud800"}}', '{"name": "get",}',
    '{"name": "get", "parameters": {}, "arguments": {}}', '{"type": "object", "name": "get"}', '{"type": "tool", "name": "get"}',
    '[{"name": "get"}, {"name": "other"}]', '[{"name": "get"}, 5]',
    "[unknown(a=1)]", "[get(a=b)]", "[get(1)]", "[get(a=1)", "[get(a='x)]", "[get]", "[getter(a=1)]", "[get(a=1}]", "[get (",
    "use [get(a=1)] like this", 'use {"name": "get", "parameters": {}} like this', ' \nx {"name": "get"}',
    "<function=unknown>{}</function>", "<function=get>[]</function>", "<function=get>{</function>", "<function=get>",
    "<function=get",
    "<function=get>hello</function>", '<function=get>{"a": }</function>',
    "brave_search", "brave_search.call", "brave_search.call(", 'brave_search.call("x")', 'brave_search(query="x")',
    "brave_search.call is a function", "- item\n- item\n\n```python\nprint([1])\n```\n", "def f():\n    return {'a': [1]}\n",
    "漢字🙂\n{漢字}\n[🙂]\n", "get\nget_weather\n", "</function>", "; , ;", "{\"name\": \"get\"\n\n\n",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_calls_of_every_dialect(text: str, expected: list[Item]) -> None:
    assert scan([text]) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_is_no_call_stays_as_it_is(text: str) -> None:
    assert scan([text]) == ([text] if text else [])
    assert scan(text) == ([text] if text else [])


@pytest.mark.parametrize("text", [text for text, _ in CASES])
def test_without_tools_everything_is_text(text: str) -> None:
    assert scan([text], names=()) == [text]


def test_other_tools_calls_are_text() -> None:
    for text, expected in CASES:
        if all(isinstance(item, ToolCall) for item in expected):
            assert scan([text], names=("something_else",)) == [text]


def test_every_split_point_gives_the_same() -> None:
    compared = 0
    for text in [text for text, _ in CASES] + TEXTS:
        whole = scan([text])
        assert scan(text) == whole  # one character at a time
        for i in range(1, len(text)):
            assert scan([text[:i], text[i:]]) == whole, (text, i)
        compared += len(text)
        if len(text) <= 48:
            for i, j in itertools.combinations(range(1, len(text)), 2):
                assert scan([text[:i], text[i:j], text[j:]]) == whole, (text, i, j)
            compared += len(text) ** 2 // 2
    assert compared > 10_000


def test_joined_cases_split_anywhere_give_the_same() -> None:
    rng = random.Random(7)
    pool = [text for text, _ in CASES] + TEXTS
    for _ in range(150):
        text = "\n".join(rng.sample(pool, rng.randint(2, 4)))
        whole = scan([text])
        assert scan(text) == whole
        for _ in range(20):
            cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(1, 6)))
            assert scan(text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])) == whole, (text, cuts)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="{}[]()<>=\"'\\,;: \n\tgetafunctio/=1é🙂", max_size=40), st.data())
def test_random_text_is_never_lost(text: str, data: st.DataObject) -> None:
    whole = scan([text])
    assert scan(text) == whole
    cut = data.draw(st.integers(0, len(text)))
    assert scan([text[:cut], text[cut:]]) == whole
    if all(isinstance(item, str) for item in whole):
        assert "".join(item for item in whole if isinstance(item, str)) == text


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4, alphabet="abé \"'"), inner, max_size=3)
    ),
    max_leaves=6,
)
CALLS = st.lists(
    st.builds(
        ToolCall, st.sampled_from(NAMES), st.dictionaries(st.sampled_from(["a", "b", "city"]), VALUES, max_size=3)
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(CALLS, st.sampled_from(sorted(DIALECTS)), st.sampled_from(["", "Let me see.\n"]))
def test_what_a_dialect_prints_is_read_back_at_every_split(calls: list[ToolCall], dialect: str, before: str) -> None:
    text = before + DIALECTS[dialect].print(calls)
    expected: list[Item] = [before, *calls] if before else [*calls]
    assert scan([text]) == expected
    assert scan(text) == expected
    for i in range(1, len(text), 3):
        assert scan([text[:i], text[i:]]) == expected


def test_text_is_passed_on_as_soon_as_it_cannot_be_a_call() -> None:
    scanner = CallScanner(NAMES)
    assert scanner.feed("Hello") == ["Hello"]
    assert scanner.feed(" <b") == [" <b"]
    assert scanner.feed("\n") == ["\n"]
    assert scanner.feed("{") == []
    assert scanner.feed('"na') == []
    assert scanner.feed('me": "x') == ['{"name": "x']
    assert scanner.feed("\n[ge") == ["\n"]
    assert scanner.feed("t_weather(city='P") == []
    assert scanner.feed("aris')]") == [PARIS]


def test_calls_come_as_soon_as_they_are_complete() -> None:
    scanner = CallScanner(NAMES)
    assert scanner.feed('{"name": "get", "parameters": {}') == []
    assert scanner.feed("}") == [call("get")]


@pytest.mark.parametrize(
    "text",
    [
        "{" + " " * 100_000,
        "[" + "\n" * 100_000,
        "\n" * 100_000,
        '{"name": "get", "parameters": {"a": ' + "[" * 100_000,
        "[get(a=" + "(" * 100_000,
        '{"name": "get"\n' * 7_000,
        "[get(a='" + "\\" * 33_001,
        "<function=get>" * 7_000,
        ('{"name": "get", "parameters": {"a": ' + "[" * 60 + "\n") * 700,
        "x\n" * 50_000,
    ],
)
def test_hostile_text_takes_linear_time_and_is_kept(text: str) -> None:
    start = time.process_time()  # the machine may be busy
    assert scan(text[i : i + 4] for i in range(0, len(text), 4)) == [text]
    assert time.process_time() - start < 1.6


def test_deeply_nested_arguments_are_text() -> None:
    deep = "[" * 80 + "]" * 80
    text = f'{{"name": "get", "parameters": {{"a": {deep}}}}}'
    assert scan([text]) == [text]
    text = f"[get(a={deep})]"
    assert scan([text]) == [text]


def test_whole_texts() -> None:
    assert parse_calls('{"name": "anything", "parameters": {"a": 1}}') == [call("anything", a=1)]
    assert parse_calls("print('hello')") is None
    assert parse_calls("") is None
    assert parse_calls(json.dumps({"a": 1})) is None
    assert parse_calls('x.call(query="q")') == [call("x", query="q")]
