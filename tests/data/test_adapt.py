import json
from pathlib import Path

import pytest

from herd.chat.messages import Message, ToolCall
from herd.data.adapt import kind_of, recognise, records, rows_with_records
from herd.data.read import DataError, Row, RowReport
from herd.data.records import ChatRecord, CompletionRecord, PreferenceRecord, PromptRecord, Record, TextRecord
from tests.conftest import shared_path

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
CHAT = (Message("user", "hi"), Message("assistant", "hello"))
SYSTEM = Message("system", "Be kind.")


def _read(tmp_path: Path, row: dict, kind=None, report: RowReport | None = None) -> Record:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (record,) = records(path, kind, report=report)
    return record


ALPACA = {"instruction": "hi", "input": "", "output": "hello", "text": "Below is an instruction ..."}


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("text", {"text": "Once.", "title": "A", "source": "b"}, TextRecord("Once.", "A", "b")),
        ("messages", {"messages": [USER, REPLY], "source": "here"}, ChatRecord(CHAT, source="here")),
        ("messages", {"messages": [USER, REPLY], "prompt": "hi", "prompt_id": "x"}, ChatRecord(CHAT)),
        (
            "messages",
            {"messages": [{"role": "developer", "content": "Be kind."}, USER, REPLY]},
            ChatRecord((SYSTEM, *CHAT)),
        ),
        ("messages", {"messages": [USER | {"content": [{"type": "text", "text": "hi"}]}, REPLY]}, None),
        ("alpaca", ALPACA, ChatRecord(CHAT)),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be kind.", "history": [["hi", "hello"]]},
            ChatRecord((SYSTEM, *CHAT, Message("user", "Add.\n\n1 2"), Message("assistant", "3"))),
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello", "weight": None}]},
            ChatRecord(CHAT),
        ),
        ("sharegpt", {"conversations": [USER, REPLY], "system": "Be kind."}, ChatRecord((SYSTEM, *CHAT))),
        ("completion", {"prompt": "1 + 1 =", "completion": " 2"}, CompletionRecord("1 + 1 =", " 2")),
        ("completion", {"prompt": "", "completion": "Once."}, CompletionRecord("", "Once.")),
        ("completion", {"prompt": [USER], "completion": [REPLY]}, ChatRecord(CHAT, given=1)),
        (
            "completion",
            {"prompt": [USER, REPLY, USER], "completion": [REPLY]},
            ChatRecord((*CHAT, *CHAT), given=3),
        ),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, PreferenceRecord("a", "b", "c")),
        ("preference", {"chosen": "b", "rejected": "c"}, PreferenceRecord("", "b", "c")),
        (
            "preference",
            {"prompt": [USER], "chosen": "hello", "rejected": [{"role": "assistant", "content": "go"}]},
            PreferenceRecord(CHAT[:1], CHAT[1:], (Message("assistant", "go"),)),
        ),
        (
            "preference",  # TRL's implicit prompt, and UltraFeedback's, which says it twice
            {"prompt": "hi", "chosen": [USER, REPLY], "rejected": [USER, {"role": "assistant", "content": "go"}]},
            PreferenceRecord(CHAT[:1], CHAT[1:], (Message("assistant", "go"),)),
        ),
        ("prompt", {"prompt": "hi", "answer": "4"}, PromptRecord("hi", answer="4")),
        ("prompt", {"prompt": [USER]}, PromptRecord(CHAT[:1])),
    ],
)
def test_every_shape_is_recognised_and_becomes_its_record(tmp_path, kind, row, expected):
    record = _read(tmp_path, row)
    if expected is not None:
        assert record == expected
    assert kind_of(tmp_path / "rows.jsonl") == kind
    assert record.where == f"{tmp_path}/rows.jsonl:1"
    assert _read(tmp_path, row, kind) == record


def test_tools_calls_and_results(tmp_path):
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    row = {
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "find", "arguments": {"q": 1}}, {"name": "find"}],
            },
            {"role": "tool", "content": "one"},
            {"role": "tool", "name": "find", "content": ""},
            REPLY,
        ],
        "tools": [tool],
    }
    record = _read(tmp_path, row)
    assert isinstance(record, ChatRecord)
    assert record.messages[1].tool_calls == (ToolCall("find", {"q": 1}), ToolCall("find"))
    assert [spec.name for spec in record.tools] == ["find"]
    assert _read(tmp_path, row | {"tools": json.dumps([tool])}) == record
    older = [USER, {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": "{}"}}]
    report = RowReport()
    older += [{"role": "function", "name": "find", "content": "one"}, REPLY]
    record = _read(tmp_path, {"messages": older}, report=report)
    assert [message.role for message in record.messages] == ["user", "assistant", "tool", "assistant"]  # type: ignore[union-attr]
    assert report.changed == {"calls tools that the row does not describe": 1}


def test_sharegpt_calls(tmp_path):
    said = [
        ("human", "hi"),
        ("function_call", '{"name": "find", "arguments": {"q": 1}}'),
        ("observation", "x"),
        ("gpt", "ok"),
    ]
    row = {"conversations": [{"from": who, "value": text} for who, text in said], "tools": '[{"name": "find"}]'}
    record = _read(tmp_path, row)
    assert record.messages[1].tool_calls == (ToolCall("find", {"q": 1}),)  # type: ignore[union-attr]
    for at, value, reason in ((1, "{", "function call is not JSON"), (0, None, "value is missing")):
        broken = json.loads(json.dumps(row))
        broken["conversations"][at]["value"] = value
        with pytest.raises(DataError, match=f"rows.jsonl:1: message {at}.*{reason}"):
            _read(tmp_path, broken)
    broken["conversations"][0] = {"from": "narrator", "value": "x"}
    with pytest.raises(DataError, match="message 0 is from 'narrator'"):
        _read(tmp_path, broken)


def test_an_empty_system_message_is_left_out_and_counted(tmp_path):
    report = RowReport()
    record = _read(tmp_path, {"messages": [{"role": "system", "content": ""}, USER, REPLY]}, report=report)
    assert record == ChatRecord(CHAT)
    assert report.changed == {"an empty system message was left out": 1}


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"messages": [USER, REPLY], "conversations": []}], "rows.jsonl:1: .* fit messages and sharegpt"),
        ([{"text": "a", "prompt": "b"}], "fit text and prompt"),
        ([{"chosen": "a", "rejected": "b", "messages": []}], "fit messages and preference"),
        ([{"text": "a"}, {"x": 1}, ALPACA], "rows.jsonl:1 looks like text and .*rows.jsonl:3 like alpaca"),
        ([{"question": "a", "reply": "b"}], "'question', 'reply' are of no kind"),
        ([{}], r"fields \(none\)"),
        ([{"messages": [USER, REPLY], "label": True}], "unpaired preferences"),
        ([{"prompt": "a", "completion": "b", "label": False}], "unpaired preferences"),
        ([{"prompt": "a", "completions": ["b"], "labels": [True]}], "a verdict on each step"),
        ([{"prompt": "a", "response": "b"}], "'prompt', 'response' .*rename .*completion"),
    ],
)
def test_contradictions_are_refused(tmp_path, rows, reason):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for bad in ("stop", "skip"):
        with pytest.raises(DataError, match=reason):
            list(records(path, bad=bad))  # type: ignore[arg-type]


def test_a_named_kind_settles_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(map(json.dumps, [{"text": "a", "prompt": "b"}, {"text": ""}, {"text": 3}, {"text": "c"}]))
    )
    report = RowReport()
    assert list(records(path, "text", bad="skip", report=report)) == [TextRecord("a"), TextRecord("c")]
    assert [str(bad).rpartition("rows.jsonl")[2] for bad in report.bad] == [
        ":2: text is empty",
        ":3: text is a number, expected text",
    ]
    with pytest.raises(DataError, match="there is no kind of rows 'chat'"):
        list(records(path, "chat"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [USER], "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "other", "chosen": [USER, REPLY], "rejected": [USER]}, "prompt is not among"),
        ({"chosen": [USER, REPLY], "rejected": [USER]}, "nothing but the prompt"),
        ({"chosen": [USER, REPLY], "rejected": [REPLY]}, "there is no prompt"),
        ({"prompt": [USER, REPLY], "chosen": "a", "rejected": "b"}, "the prompt ends with a assistant"),
        ({"prompt": [USER], "completion": [USER]}, "message 1 has role user"),
        ({"prompt": [USER], "completion": ""}, "completion is empty"),
        ({"prompt": 3, "completion": "a"}, "prompt is a number"),
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({"instruction": "a", "output": "b", "history": [["q"]]}, r"history\[0\] is no pair"),
        ({"prompt": [REPLY]}, "message 0 has role assistant"),
        ({"messages": [USER, REPLY], "images": ["a.png"]}, "images beside the messages: training reads text only"),
        ({"prompt": [USER], "completion": [REPLY], "image": {"bytes": None, "path": "a.png"}}, "image beside the mess"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b", "videos": ["a.mp4"]}, "videos beside the messages"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "a", "weight": 0}]}, "weight 0"),
    ],
)
def test_rows_that_no_record_can_be_made_of(tmp_path, row, reason):
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{reason}"):
        _read(tmp_path, row)


def test_each_file_of_a_folder_has_its_own_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, REPLY]}))
    (tmp_path / "b.txt").write_text("Once.")
    report = RowReport()
    found = list(rows_with_records(tmp_path, report=report))
    assert [(Path(row.path).name, row.line, type(record)) for row, record in found] == [
        ("a.jsonl", 1, ChatRecord),
        ("b.txt", 1, TextRecord),
    ]
    assert report.notes == [f"{tmp_path}/a.jsonl: read as messages", f"{tmp_path}/b.txt: read as text"]


def test_recognition_passes_over_rows_without_a_shape():
    rows = [Row("f", 1, {"meta": 1}), Row("f", 2, {"text": "a"})]
    assert recognise(rows) == "text"


def test_parquet_of_conversations(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "name": "find", "arguments": '{"q": 1}'}]}
    messages = [USER, call, {"role": "tool", "content": "x", "tool_call_id": "c"}, REPLY]
    pq.write_table(
        pyarrow.Table.from_pylist([{"messages": messages, "tools": '[{"name": "find"}]'}]), tmp_path / "a.parquet"
    )
    (record,) = records(tmp_path / "a.parquet")
    assert record.messages[1].tool_calls == (ToolCall("find", {"q": 1}, "c"),)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "rows", "bad"),
    [("sft/tools_sgd_train", 3500, 0), ("sft/gsm8k_train", 7466, 0), ("preference/hh_helpful_eval", 293, 1)],
)
def test_real_files(name, rows, bad):
    report = RowReport()
    found = sum(1 for _ in records(shared_path(f"data/{name}.jsonl.gz"), bad="skip", report=report))
    assert (found, report.bad_count) == (rows, bad)
