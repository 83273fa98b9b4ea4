"""The loop of a chat over a scripted model: what goes where, and Ctrl-C at every moment."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import pytest

from herd.chat.messages import Message
from herd.cli.commands import Commands
from herd.cli.conversation import Conversation
from herd.cli.lines import PlainLines
from herd.cli.repl import Repl
from herd.errors import HerdError
from tests.cli.doubles import INTERRUPT, ListedLines, ScriptedTalker


def chat(model: ScriptedTalker, *lines: str, system: str = "") -> tuple[Conversation, int]:
    talk = Conversation(model, system=system)
    repl = Repl(talk, Commands(talk, {"model": "nano", "parameters": "1M"}), ListedLines(*lines), live=False)
    return talk, repl.loop()


def test_replies_go_to_stdout_and_everything_else_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    _, failures = chat(ScriptedTalker(["Hello", " you"], ["Bye\n"]), "Hi", "/show", "", "   ", "Bye", "/bye", "unread")
    out, err = capsys.readouterr()
    assert out == "Hello you\nBye\n"
    assert "2 tokens, 2.0 tokens/s; context 3 of 100 used, 97 left" in err
    assert "messages" in err
    assert failures == 0


def test_a_command_that_fails_is_one_line_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    _, failures = chat(ScriptedTalker(["fine"]), "/sytem x", "/set top_p 7", "Hi")
    out, err = capsys.readouterr()
    assert out == "fine\n"
    assert [line for line in err.splitlines() if line.startswith("herd:")] == [
        "herd: no command is called /sytem: did you mean /system? (a space before the slash sends the line as text)",
        "herd: top_p is 7.0: expected a number above 0 and at most 1",
    ]
    assert failures == 2


def test_a_space_before_the_slash_sends_the_line() -> None:
    model = ScriptedTalker()
    chat(model, " /usr/bin/env is what?")
    assert model.asked[0] == [Message("user", "/usr/bin/env is what?")]


def test_retry_asks_the_same_again() -> None:
    model = ScriptedTalker(["bad"], ["good"])
    talk, _ = chat(model, "Hi", "/retry")
    assert [m.text for m in talk.turns] == ["Hi", "good"]
    assert model.asked[0] == model.asked[1]


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "failed"])
def test_a_retry_without_a_new_reply_keeps_the_old_one(stopped: bool) -> None:
    model = ScriptedTalker(["old"], [INTERRUPT, "never"])
    talk, _ = chat(model, "Hi")
    if not stopped:
        model.fails = HerdError("broken")
    Repl(talk, Commands(talk, {"model": "nano"}), ListedLines("/retry"), live=False).loop()
    assert [m.text for m in talk.turns] == ["Hi", "old"]


def test_ctrl_c_during_a_reply_stops_it_and_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    talk, failures = chat(ScriptedTalker(["one", " two", INTERRUPT, " three", " four"], ["more"]), "count", "go on")
    out, err = capsys.readouterr()
    assert out == "one two three\nmore\n"  # the piece that was being made is still shown
    assert "[stopped]" in err
    assert talk.turns[1] == Message("assistant", "one two three", stop_reason="out_of_tokens")
    assert failures == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_the_prompt_is_read_takes_the_message_back(capsys: pytest.CaptureFixture[str]) -> None:
    talk, _ = chat(ScriptedTalker([INTERRUPT, "never"], ["ok"]), "long", "short")
    assert capsys.readouterr().out == "ok\n"
    assert [m.text for m in talk.turns] == ["short", "ok"]


def test_a_second_ctrl_c_does_not_wait_for_the_next_piece(capsys: pytest.CaptureFixture[str]) -> None:
    talk, _ = chat(ScriptedTalker(["one", INTERRUPT, INTERRUPT, "never"], ["ok"]), "a", "b")
    assert capsys.readouterr().out == "one\nok\n"
    assert [m.text for m in talk.turns] == ["a", "one", "b", "ok"]


def test_ctrl_c_at_the_prompt_does_not_leave(capsys: pytest.CaptureFixture[str]) -> None:
    chat(ScriptedTalker(["ok"]), INTERRUPT, "Hi")
    out, err = capsys.readouterr()
    assert out == "ok\n"
    assert "Ctrl-D" in err


def test_a_full_context_is_said_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    talk, failures = chat(ScriptedTalker(["w " * 3], max_len=6), "one", "a b c d", "/clear", "ok?")
    out, err = capsys.readouterr()
    assert "needs 9 tokens, and there are 6. /undo takes back the last exchange, /clear starts over" in err
    assert failures == 1
    assert out.endswith("ok\n")
    assert [m.text for m in talk.turns] == ["ok?", "ok"]


@pytest.mark.parametrize(("finish", "words"), [("length", "/set max_tokens"), ("context_full", "the context is full")])
def test_a_reply_that_was_cut_says_so(finish, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    chat(ScriptedTalker(["a"], finish=finish), "Hi")
    assert words in capsys.readouterr().err


def test_a_model_that_fails_does_not_end_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    model = ScriptedTalker(["ok"])
    model.fails = HerdError("the model gave\nnumbers that are not finite")
    _, failures = chat(model, "a", "b")
    out, err = capsys.readouterr()
    assert out == "ok\n"
    assert "herd: the model gave numbers that are not finite\n" in err
    assert failures == 1


def test_save_and_load_in_a_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "talk.json"
    chat(ScriptedTalker(["Hello"]), "Hi", f"/save {path}")
    model = ScriptedTalker(["again"])
    talk, failures = chat(model, f"/load {path}", "And?")
    assert failures == 0
    assert [m.text for m in talk.turns] == ["Hi", "Hello", "And?", "again"]
    assert [m.text for m in model.asked[0]] == ["Hi", "Hello", "And?"]


def lines_of(text: str) -> list[str | None]:
    lines = PlainLines(io.StringIO(text))
    read = []
    while (line := lines.read()) is not None:
        read.append(line)
    return read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("one\ntwo", ["one", "two"]),
        ("one\r\n\r\ntwo\r\n", ["one", "", "two"]),
        ('"""one\ntwo"""\nthree', ["one\ntwo", "three"]),
        ('"""\none\n\n  two\n"""\nthree', ["one\n\n  two", "three"]),
        ('"""one line"""', ["one line"]),
        ('"""never closed\nat all', ["never closed\nat all"]),
        ('say """this"""', ['say """this"""']),
        ('"""hello""" world', ['"""hello""" world']),
        ('"""two\nlines""" and more\nnext', ['"""two\nlines""" and more', "next"]),
        ('"""a"""b"""', ['"""a"""b"""']),
    ],
)
def test_lines_from_a_pipe(text: str, expected: list[str]) -> None:
    assert lines_of(text) == expected


def test_input_that_is_not_text_is_an_error() -> None:
    lines = PlainLines(io.TextIOWrapper(io.BytesIO(b"ok\n\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(HerdError, match="not UTF-8"):
        while lines.read() is not None:
            pass


def test_closed_input_is_the_end() -> None:
    assert PlainLines(None).read() is None
