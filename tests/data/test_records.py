import pytest

from herd.chat.messages import Message, ToolCall
from herd.data.records import ChatRecord, CompletionRecord, PreferenceRecord, PromptRecord, TextRecord, text_of
from herd.errors import DataError


def test_pairs_alternate_and_need_a_reply():
    record = ChatRecord.pairs("hi", "hello", source="here")
    assert record == ChatRecord((Message("user", "hi"), Message("assistant", "hello")), source="here")
    with pytest.raises(DataError):
        ChatRecord.pairs("hi")


def test_the_place_of_a_record_is_no_part_of_what_it_is():
    assert TextRecord("a", where="x:1") == TextRecord("a", where="y:2")


def test_everything_that_is_read_is_in_the_text():
    call = Message("assistant", "", (ToolCall("find", {"b": 1, "a": "ü"}),))
    chat = ChatRecord((Message("user", "hi"), call, Message("tool", "42"), Message("assistant", "It is 42.")))
    assert text_of(chat) == 'hi\nfind {"a": "ü", "b": 1}\n42\nIt is 42.'
    assert text_of(TextRecord("a")) == "a"
    assert text_of(CompletionRecord("a ", "b")) == "a b"
    assert text_of(PromptRecord("a", answer="b")) == "a"
    prompt, good, poor = (Message("user", "q"),), (Message("assistant", "yes"),), (Message("assistant", "no"),)
    assert text_of(PreferenceRecord(prompt, good, poor)) == "q\nyes\nno"
