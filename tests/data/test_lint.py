import json
from pathlib import Path

import pytest

from herd.chat.formats import format_named
from herd.chat.messages import Message
from herd.checkpoint.resolve import resolve
from herd.checkpoint.vocabulary import tokenizer_at
from herd.data.encode import FormatError
from herd.data.leakage import Evaluation
from herd.data.lint import lint
from herd.data.preview import preview
from herd.data.records import ChatRecord, CompletionRecord, PreferenceRecord

CHAT = {"messages": [{"role": "user", "content": "Name a cat."}, {"role": "assistant", "content": "Tom is a cat."}]}
LONG = "if a train leaves at nine and drives for three hours how far does it go then"


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_at(resolve("nano"))


@pytest.fixture(scope="module")
def format(tokenizer):
    return format_named("llama3", tokenizer)


def _file(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def _asked(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}, CHAT["messages"][1]]}


def test_a_good_file_has_nothing_against_it(tmp_path, tokenizer, format):
    path = _file(tmp_path, CHAT, _asked("Who is Tom?"))
    found = lint(path, tokenizer=tokenizer, format=format)
    assert found.failed == []
    assert (found.report.good, dict(found.kinds), found.whole) == (2, {"chat": 2}, True)
    rendered = [
        format.render((Message("user", q), Message("assistant", "Tom is a cat.")))
        for q in ("Name a cat.", "Who is Tom?")
    ]
    # What a server renders ends with a header that opens a reply; training has none.
    whole = [
        format.render((Message("user", q), Message("assistant", "Tom is a cat.")), generate=False)
        for q in ("Name a cat.", "Who is Tom?")
    ]
    assert list(found.lengths) == [len(one.tokens) for one in whole]
    assert found.learned == sum(sum(one.loss_mask) for one in whole)
    assert all(len(a.tokens) > len(b.tokens) for a, b in zip(rendered, whole, strict=True))


def test_every_finding_is_named(tmp_path, tokenizer, format):
    eval_path = tmp_path / "eval.jsonl"
    eval_path.write_text(json.dumps({"question": LONG}) + "\n")
    path = _file(tmp_path, CHAT, "{", _asked("word " * 300), CHAT, _asked(f"Say: {LONG}!"))
    found = lint(path, tokenizer=tokenizer, format=format, length=100, against=Evaluation([eval_path]))
    assert str(found.report.bad[0]).startswith(f"{path}:2: not JSON")
    assert [where for where, size in found.too_long if size > 100] == [f"{path}:3"]
    assert [(d.where, d.of, d.exact) for d in found.duplicates.values()] == [(f"{path}:4", f"{path}:1", True)]
    assert [(where, leak.where) for where, leak in found.leaks] == [(f"{path}:5", f"{eval_path}:1")]
    assert found.leaked_rows == {0}
    assert found.failed == ["bad rows: 1", "rows that hold evaluation data: 1"]


def test_what_a_format_cannot_express_is_a_bad_row(tmp_path, tokenizer, format):
    called = {
        "messages": [CHAT["messages"][0], {"role": "assistant", "tool_calls": [{"name": "find", "arguments": {}}]}]
    }
    path = _file(tmp_path, CHAT, called)
    found = lint(path, tokenizer=tokenizer, format=format)
    assert found.report.good == 1
    assert found.report.bad[0].line == 2
    with pytest.raises(FormatError, match=r"rows\.jsonl:1: .*prompt format"):
        lint(path, tokenizer=tokenizer)
    assert lint(path).report.good == 2  # without a tokenizer nothing is rendered
    assert lint(path).unit == "words"


def test_rows_that_teach_nothing_are_an_error(tmp_path, tokenizer, format, monkeypatch):
    import herd.data.encode as encode

    plain = encode.from_mask
    monkeypatch.setattr(encode, "from_mask", lambda tokens, mask: plain(tokens, [False] * len(mask)))
    found = lint(_file(tmp_path, CHAT), tokenizer=tokenizer, format=format)
    assert found.unlearned == [f"{tmp_path}/rows.jsonl:1"]
    assert "rows in which nothing is learned: 1" in found.failed


def test_a_limit_is_told(tmp_path):
    path = _file(tmp_path, *[_asked(f"Question {n}?") for n in range(30)])
    assert not lint(path, limit=10).whole
    assert len(lint(path, limit=10).lengths) == 10
    assert lint(path, limit=31).whole


def test_a_preview_shows_what_is_learned(tokenizer, format):
    record = ChatRecord.pairs("Hi.", "Hello, ü!", "Bye.", "See you.")
    spans = preview(record, tokenizer, format)
    assert [span.text for span in spans if span.learned and not span.special] == ["Hello, ü!", "See you."]
    assert [span.text for span in spans if span.learned and span.special] == ["<|eot_id|>"] * 2
    assert "".join(span.text for span in spans).startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>")
    later = ChatRecord(record.messages, given=3)
    assert [span.text for span in preview(later, tokenizer, format) if span.learned and not span.special] == [
        "See you."
    ]
    assert [span.text for span in preview(later) if span.learned] == ["See you."]
    completion = CompletionRecord("1 + 1 =", " 2")
    assert [span.text for span in preview(completion, tokenizer) if span.learned and not span.special] == [" 2"]
    words = "".join(span.text for span in preview(PreferenceRecord("q", "a", "b")))
    assert words == "prompt: q\nchosen: a\nrejected: b\n"


def test_marks_of_prompt_formats_inside_texts_are_named(tmp_path, tokenizer, format):
    rendered = {"text": "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"}
    found = lint(
        _file(tmp_path, {"text": "a <| b |> c <br>"}, rendered, {"text": "[INST] Hi [/INST]"}), tokenizer=tokenizer
    )
    assert found.spelled == {
        "<|start_header_id|>": 1,
        "<|end_header_id|>": 1,
        "<|eot_id|>": 1,
        "[INST]": 1,
        "[/INST]": 1,
    }
    assert (found.spelled_count, [where.rpartition(":")[2] for where in found.spelled_rows]) == (2, ["2", "3"])
    assert found.failed == []  # texts about prompt formats are texts
    assert lint(_file(tmp_path, _asked("Say <|im_end|>.")), tokenizer=tokenizer, format=format).spelled == {
        "<|im_end|>": 1
    }
    assert not lint(_file(tmp_path, CHAT), tokenizer=tokenizer, format=format).spelled


def test_a_limit_that_was_not_reached_is_not_told(tmp_path):
    """Bad rows are none of the rows that a limit counts."""
    path = _file(tmp_path, "no row", CHAT, "none", "none", _asked("Who is Tom?"))
    for limit, whole in ((2, False), (3, True), (4, True), (5, True), (6, True)):
        found = lint(path, limit=limit)
        assert (found.report.good, found.whole) == (2, whole), limit
