import pytest

from herd.data.read import DataError
from herd.data.records import ChatRecord, TextRecord, Turn

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def test_a_chat_row_becomes_turns():
    record = ChatRecord.from_row({"messages": [USER, REPLY], "source": "here"})
    assert record == ChatRecord((Turn("user", "hi"), Turn("assistant", "hello")), "here")
    assert record == ChatRecord.pairs("hi", "hello", source="here")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "messages is missing"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": ["hi", REPLY]}, "message 0 is not an object"),
        ({"messages": [{"role": "tool", "content": "x"}, REPLY]}, "message 0 has role 'tool'"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "has no text"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "has no text"),
    ],
)
def test_a_bad_chat_row_says_what_is_wrong(row, message):
    with pytest.raises(DataError, match=message):
        ChatRecord.from_row({"id": "r1", **row})


def test_text_rows():
    assert TextRecord.from_row({"text": "x", "title": None}) == TextRecord("x")
    with pytest.raises(DataError, match="row r2: text is missing or empty"):
        TextRecord.from_row({"id": "r2", "text": "\n"})


def test_pairs_need_a_reply():
    with pytest.raises(DataError):
        ChatRecord.pairs("hi")
