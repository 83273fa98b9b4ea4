"""Forty and more ways in which a row of chat data goes wrong, each of which real files have shown."""

import copy
import gzip
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from herd.data.adapt import records
from herd.data.build import Build, Built
from herd.data.config import DataPart, SourcePart
from herd.data.kinds import Kind
from herd.data.lint import lint
from herd.data.open import DataReport, open_data
from herd.data.read import MAX_ROW, BadRows, DataError, RowReport
from herd.data.tokenworker import Encoder
from tests.data.corpus import chat_format, texts, tokenizer, write

TOOL = {
    "name": "find",
    "description": "Find.",
    "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"q": "cats"}'}}
ROW = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Find cats."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "three cats"},
        {"role": "assistant", "content": "There are three."},
    ],
    "tools": [{"type": "function", "function": TOOL}],
}


def _line(row: object) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _with(*path: object, value: object = None, drop: bool = False) -> bytes:
    """ROW with one thing in it changed, or taken away."""
    row: object = copy.deepcopy(ROW)
    at = row
    for key in path[:-1]:
        at = at[key]  # type: ignore[index]
    if drop:
        del at[path[-1]]  # type: ignore[attr-defined]
    else:
        at[path[-1]] = value  # type: ignore[index]
    return _line(row)


def _said(*messages: tuple[str, str]) -> bytes:
    return _line({"messages": [{"role": role, "content": text} for role, text in messages]})


GOOD = _line(ROW)
KINDS: dict[str, tuple[bytes, str]] = {
    # bytes and syntax
    "cut": (GOOD[:-20], "not JSON: "),
    "two rows in a line": (GOOD + GOOD, "not JSON: Extra data"),
    "single quotes": (GOOD.replace(b'"', b"'"), "not JSON: "),
    "trailing comma": (GOOD[:-1] + b",}", "not JSON: "),
    "a comment": (GOOD + b" // good", "not JSON: "),
    "byte order mark inside": (b"\xef\xbb\xbf" + GOOD, "not JSON: "),
    "not UTF-8": (GOOD.replace(b"kind", b"k\xefnd"), "not UTF-8 at byte"),
    "UTF-16": (GOOD.decode().encode("utf-16-le").replace(b"\n", b""), "not JSON: |not UTF-8"),
    "a string that never ends": (
        b'{"messages": [{"role": "user',
        "not JSON: Unterminated string starting at column 24",
    ),
    "NUL byte": (GOOD.replace(b"kind", b"k\0nd"), "not JSON: Invalid control character"),
    "NUL escape": (GOOD.replace(b"kind", b"k\\u0000nd"), "a string holds a NUL character"),
    "tab in a string": (GOOD.replace(b"kind", b"k\tnd"), "not JSON: Invalid control character at column"),
    "half a surrogate": (GOOD.replace(b"kind", b"k\\ud83dnd"), "half a surrogate pair"),
    "bad escape": (GOOD.replace(b"kind", b"k\\xnd"), "not JSON: Invalid"),
    "10 MB": (GOOD.replace(b"kind", b"k" * 10_000_000), f"10,000,\\d+ bytes, more than {MAX_ROW:,}"),
    "deep": (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "long number": (GOOD[:-1] + b', "n": ' + b"9" * 5000 + b"}", "a number of more than 4,300 digits"),
    "NaN": (GOOD[:-1] + b', "score": NaN}', "NaN is no number"),
    "infinity": (GOOD[:-1] + b', "score": 1e999}', "1e999 is no number"),
    "repeated key": (GOOD[:-1] + b', "messages": []}', "the key 'messages' is given twice"),
    "array row": (b"[" + GOOD + b"]", "an object was expected, found an array"),
    "string row": (b'"row"', "an object was expected, found a string"),
    "null row": (b"null", "an object was expected, found null"),
    # shape
    "no messages": (_with("messages", drop=True), "messages is missing"),
    "a name misspelt": (_line({"message": ROW["messages"]}), "messages is missing: rename 'message' if that is it"),
    "another kind": (
        _line({"text": "Once upon a time."}),
        "the row looks like text, not messages: messages is missing",
    ),
    "messages are text": (_with("messages", value="hi"), "messages is a string, expected a list"),
    "no message": (_with("messages", value=[]), "messages is an empty list"),
    "message is text": (_with("messages", 1, value="hi"), "message 1 is a str"),
    "no role": (_with("messages", 1, "role", drop=True), "message 1: role is None"),
    "unknown role": (_with("messages", 1, "role", value="narrator"), "message 1: role is 'narrator'"),
    "role is a number": (_with("messages", 1, "role", value=1), "message 1: role is 1"),
    "content is a number": (_with("messages", 1, "content", value=7), "message 1: content is a int"),
    "unknown field": (_with("messages", 4, "reasoning", value="hm"), "message 4: field 'reasoning' is not known"),
    "weight": (_with("messages", 4, "weight", value=0), "message 4: weight 0"),
    "an image": (
        _with(
            "messages", 1, "content", value=[{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
        ),
        "message 1 .user. holds an image",
    ),
    # order
    "empty question": (_with("messages", 1, "content", value=""), "message 1 .user. has no text"),
    "blank reply": (_with("messages", 4, "content", value=" \n"), "message 4 .assistant. has no text"),
    "null reply": (_with("messages", 4, "content", value=None), "message 4 .assistant. has no text"),
    "no reply": (_said(("user", "Hi.")), "ends with a user message"),
    "no reply to the last": (_said(("user", "a"), ("assistant", "b"), ("user", "c")), "ends with a user message"),
    "reply first": (
        _said(("assistant", "Hi."), ("user", "a"), ("assistant", "b")),
        "message 0 has role assistant at the",
    ),
    "two replies": (
        _said(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        "message 2 has role assistant after an",
    ),
    "two questions": (_said(("user", "a"), ("user", "b"), ("assistant", "c")), "message 1 has role user after a user"),
    "late system": (_said(("user", "a"), ("system", "b"), ("assistant", "c")), "message 1 is a system message"),
    "system alone": (_said(("system", "a")), "ends with a system message"),
    "result of nothing": (
        _said(("user", "a"), ("tool", "b"), ("assistant", "c")),
        "message 1 has role tool after a user",
    ),
    # tools
    "user calls": (
        _with("messages", 1, "tool_calls", value=[CALL]),
        "message 1: a user message cannot carry tool calls",
    ),
    "call without id": (
        _with("messages", 2, "tool_calls", 0, "id", drop=True),
        "message 3 answers call 'c1', and the calls",
    ),
    "result without id": (_with("messages", 3, "tool_call_id", drop=True), "message 3 is a tool result without"),
    "result of another": (
        _with("messages", 3, "tool_call_id", value="c2"),
        "message 3 answers call 'c2', which was not",
    ),
    "ids twice": (_with("messages", 2, "tool_calls", value=[CALL, CALL]), "two tool calls have the same id"),
    "no result": (_with("messages", 3, drop=True), "comes before the result of find"),
    "result twice": (_with("messages", 4, value=ROW["messages"][3]), "one tool result more"),  # type: ignore[index]
    "call without name": (_with("messages", 2, "tool_calls", 0, "function", "name", drop=True), "name is missing"),
    "arguments": (
        _with("messages", 2, "tool_calls", 0, "function", "arguments", value="{q:"),
        "arguments of find are not",
    ),
    "argument list": (_with("messages", 2, "tool_calls", 0, "function", "arguments", value="[1]"), "are a list"),
    "calls are an object": (_with("messages", 2, "tool_calls", value=CALL), "tool_calls is a dict"),
    "unknown tool": (
        _with("messages", 2, "tool_calls", 0, "function", "name", value="look"),
        "calls 'look', which is not",
    ),
    "tools are text": (_with("tools", value="find"), "tools is text that is not JSON"),
    "tool twice": (_with("tools", value=[TOOL, TOOL]), "the name is given twice"),
    "tool name": (_with("tools", value=[TOOL | {"name": "find cats"}]), "a name has 1 to 64 letters"),
    "parameters": (_with("tools", value=[TOOL | {"parameters": {"type": "string"}}]), "expected 'object'"),
}

FIRST = 25
"""Rows before the first bad one: more than those that decide the kind of a file."""


def test_there_are_forty_kinds() -> None:
    assert len(KINDS) >= 40


@pytest.mark.parametrize("name", KINDS)
def test_strict_stops_at_the_line_with_the_reason(name: str, tmp_path: Path) -> None:
    bad, reason = KINDS[name]
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, bad, GOOD]) + b"\n")
    rows = records(path, "messages")
    assert next(rows) == next(rows)
    with pytest.raises(DataError, match=rf"chats\.jsonl:3: .*({reason})"):
        next(rows)


@pytest.mark.parametrize("kind", [None, "messages"])
def test_skip_gives_exactly_the_good_rows_and_names_the_others(kind: str | None, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    kinds = {name: row for name, row in KINDS.items() if kind or name != "another kind"}
    every = (1001 - FIRST) // len(kinds)
    expected = {}
    lines = []
    for number in range(1, 1001):
        which, at = divmod(number - FIRST, every)
        if number >= FIRST and at == 0 and which < len(kinds):
            name = list(kinds)[which]
            expected[number] = name
            lines.append(kinds[name][0])
        else:
            lines.append(GOOD.replace(b"Find cats", b"Find cats %d" % number))
    assert set(expected.values()) == set(kinds)
    path.write_bytes(b"\n".join(lines) + b"\n")
    report = RowReport()
    found = list(records(path, kind, bad="skip", report=report))  # type: ignore[arg-type]
    assert [record.where for record in found] == [f"{path}:{n}" for n in range(1, 1001) if n not in expected]
    assert [bad.line for bad in report.bad] == list(expected)
    assert (report.good, report.bad_count) == (1000 - len(kinds), len(kinds))
    assert report.notes == ([f"{path}: read as messages"] if kind is None else [])


def test_rows_of_another_kind_end_the_reading_wherever_they_stand(tmp_path: Path) -> None:
    """Of a file whose kind was recognised; left out they would be a part of the data that nothing is wrong with."""
    path = tmp_path / "mixed.jsonl"
    other = _line({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]})
    path.write_bytes(b"\n".join([_said(("user", "a"), ("assistant", "b"))] * FIRST + [other] * FIRST) + b"\n")
    said = (
        rf"mixed\.jsonl:{FIRST + 1}: the row looks like sharegpt, not messages as before: a file holds rows of one kind"
    )

    def build(kind: Kind | None, bad: BadRows) -> Built:
        made = Build(tmp_path / "out", Encoder(tokenizer(), chat_format()), bad=bad, processes=1)
        return made([(path, kind)])[0]

    for bad in ("stop", "skip"):
        with pytest.raises(DataError, match=said):
            list(records(path, bad=bad))  # type: ignore[arg-type]
        with pytest.raises(DataError, match=said):
            build(None, bad)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=said):
        lint(path)
    # A kind that is named makes them bad rows like any other.
    report = RowReport()
    assert len(list(records(path, "messages", bad="skip", report=report))) == FIRST
    assert dict(report.reasons) == {"the row looks like sharegpt, not messages: messages is missing": FIRST}
    assert build("messages", "skip").report.bad == report.bad
    with pytest.raises(DataError, match=said):  # with the shards of that build there
        build(None, "skip")


def test_bad_rows_are_in_the_order_of_their_lines(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(b"\n".join([GOOD, KINDS["no reply"][0], GOOD, b"{", GOOD]))
    assert [(Path(row.path).name[0], row.line) for row in lint(tmp_path).report.bad] == [
        ("a", 2), ("a", 4), ("b", 2), ("b", 4),
    ]  # fmt: skip


def test_decisions_do_not_depend_on_who_reads_what_when(tmp_path: Path) -> None:
    paths = []
    for i in range(6):
        paths.append(tmp_path / f"chats-{i}.jsonl")
        bad = [line for line, _ in KINDS.values()][i::6]
        paths[-1].write_bytes(b"\n".join([GOOD, *bad, GOOD, *bad[::-1], GOOD]) + b"\n")

    def read(path: Path) -> tuple[list[str], RowReport]:
        report = RowReport()
        return [record.where for record in records(path, "messages", bad="skip", report=report)], report

    whole = RowReport()
    alone = [record.where for record in records(tmp_path, "messages", bad="skip", report=whole)]
    for workers in (1, 2, 4):
        with ThreadPoolExecutor(workers) as pool:
            parts = list(pool.map(read, paths))
        joined = RowReport()
        for _, report in parts:
            joined.add(report)
        assert [where for found, _ in parts for where in found] == alone
        assert (joined.good, joined.bad, joined.reasons) == (whole.good, whole.bad, whole.reasons)


EMPTY = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n",
    "none.json": b"[]",
    "empty.txt": b"",
    "lines.md": b"\n\n",
    "packed.jsonl.gz": gzip.compress(b""),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_file_without_a_row_is_a_bad_row_everywhere(name: str, tmp_path: Path) -> None:
    """Reading, recognising, linting and building give one answer: stop with the file's name, or leave out and count."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    path.write_bytes(EMPTY[name])
    write(tmp_path / "in/good.jsonl", texts(3))
    said = f"{path}:1: the file holds no row"
    with pytest.raises(DataError, match=re.escape(said)):
        list(records(tmp_path / "in"))
    report = RowReport()
    assert len(list(records(tmp_path / "in", bad="skip", report=report))) == 3
    assert [str(row) for row in report.bad] == [said]
    linted = lint(tmp_path / "in")
    assert linted.failed == ["bad rows: 1"]

    def build(bad: BadRows, *files: Path) -> list[Built]:
        return Build(tmp_path / "out", Encoder(tokenizer(), None), bad=bad, processes=1)(
            [(file, None) for file in files]
        )

    with pytest.raises(DataError, match=re.escape(said)):
        build("stop", path, tmp_path / "in/good.jsonl")
    built = build("skip", path, tmp_path / "in/good.jsonl")
    assert [one.documents for one in built] == [0, 3]
    assert [str(row) for one in built for row in one.report.bad] == [said]
    with pytest.raises(DataError, match="none of the rows can be used"):
        build("skip", path)

    # And a run: a file among others is told, a source that is nothing else is refused by name.
    def opened(*paths: Path) -> DataReport:
        sources = tuple(SourcePart(path=str(each)) for each in paths)
        part = DataPart(
            sources=sources, length=32, bad_rows="skip", shards=str(tmp_path / "out"), processes=1, workers=0
        )
        return open_data(part, tokenizer())[2]

    told = opened(tmp_path / "in")
    assert told.sources[0].kinds == ("text",)
    assert said in "\n".join(told.lines())
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: none of the rows can be used: .*holds no row"):
        opened(tmp_path / "in/good.jsonl", path)
