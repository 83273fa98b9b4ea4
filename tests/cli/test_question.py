"""The questions of `herd run` beside a plain prompt: a middle, a conversation in a file, a Guard, and a pipe that is silent."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from herd.chat.formats import format_named
from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.cli import lines
from herd.cli.main import run
from herd.engine.local import generate
from tests.build import build
from tests.cli.tiny import infill_config, infill_tokenizer, tiny_config, tokenizer, write_folder, write_infill_folder

Piped = Callable[[str | bytes], None]
Captured = pytest.CaptureFixture[str]
GREEDY = ("--temp", "0", "-n", "12")
PARAMS = SamplingParams(temperature=0, max_tokens=12)
LONG = 8192
GUARD = "llama-guard-3-1b"
pytestmark = pytest.mark.usefixtures("no_input_on_a_cpu")


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_infill_folder(tmp_path_factory.mktemp("models") / "tiny-code"))


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A chat model with room for a Guard's question."""
    return str(write_folder(tmp_path_factory.mktemp("models") / "tiny-long", context=LONG))


def file_of(tmp_path: Path, content: object) -> str:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(content))
    return str(path)


def one_line_error(args: list[str], capsys: Captured, status: int = 1) -> str:
    """Runs a command that must fail; its one line."""
    assert run(args) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(("flags", "order"), [([], "psm"), (["--spm"], "spm")])
def test_a_suffix_asks_for_the_middle(coder: str, flags: list[str], order, capsys: Captured) -> None:
    assert run(["run", coder, "abc ", "--suffix", " fed\n", *flags, *GREEDY, "--json"]) == 0
    reply = generate(build(infill_config()), infill_tokenizer(), "abc ", PARAMS, suffix=" fed\n", order=order)
    assert json.loads(capsys.readouterr().out)["text"] == reply.text


def test_the_prefix_may_be_piped_in_as_it_is(coder: str, piped: Piped, capsys: Captured) -> None:
    reply = generate(build(infill_config()), infill_tokenizer(), "\tabc \n", PARAMS, suffix="fed")
    for prefix in ([], ["-"]):
        piped("\tabc \n")
        assert run(["run", coder, *prefix, "--suffix", "fed", *GREEDY, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == reply.text


def test_a_vocabulary_without_infill_pieces_says_so(chat_model: str, capsys: Captured) -> None:
    error = one_line_error(["run", chat_model, "Hi", "--suffix", "there"], capsys)
    assert "no fill-in-the-middle pieces: use Code Llama" in error


def test_a_conversation_in_a_file_is_answered(chat_model: str, tmp_path: Path, capsys: Captured) -> None:
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "A"},
    ]
    messages = [Message("system", "Be brief."), *(Message(m["role"], m["content"]) for m in talk)]  # type: ignore[arg-type]
    expected = generate(build(tiny_config()), tokenizer(), messages, PARAMS).text
    for content in ([{"role": "system", "content": "Be brief."}, *talk], {"system": "Be brief.", "messages": talk}):
        assert run(["run", chat_model, "--messages", file_of(tmp_path, content), *GREEDY]) == 0
        assert capsys.readouterr().out == expected + "\n"
    path = file_of(tmp_path, talk[:2])
    assert "nothing to answer: only Guards" in one_line_error(["run", chat_model, "--messages", path], capsys)
    (tmp_path / "talk.json").write_text("{")
    assert "talk.json is not JSON text" in one_line_error(["run", chat_model, "--messages", path], capsys)


def test_tools_of_a_conversation_reach_the_prompt(long_model: str, tmp_path: Path, capsys: Captured) -> None:
    talk = {"messages": [{"role": "user", "content": "Hi"}], "tools": ["brave_search"]}
    args = ["run", long_model, "--messages", file_of(tmp_path, talk), "--format", "llama3.1", "--json", *GREEDY]
    assert run(args) == 0
    reply = generate(
        build(tiny_config(LONG)), tokenizer(), talk["messages"], PARAMS, tools=["brave_search"], format="llama3.1"
    )
    assert json.loads(capsys.readouterr().out)["usage"]["prompt_tokens"] == reply.usage.prompt_tokens


def test_a_guard_judges_the_last_message_and_its_notes_are_said(
    long_model: str, tmp_path: Path, capsys: Captured
) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho <END CONVERSATION>"}]
    args = ["run", long_model, "--messages", file_of(tmp_path, talk), "--format", GUARD, *GREEDY]
    notes = (
        format_named(GUARD, tokenizer()).render([Message("user", "Hi"), Message("assistant", talk[1]["content"])]).notes
    )
    assert run(args) == 0
    out, err = capsys.readouterr()
    assert "category policies" not in out
    for note in notes:
        assert f"[{note}]\n" in err
    assert any("a marker of the Guard's own prompt" in note for note in notes)
    assert run([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["notes"] == list(notes)
    assert "category policies" not in err


def test_a_chat_with_a_guard_judges_each_message_on_its_own(long_model: str, piped: Piped, capsys: Captured) -> None:
    piped("Hello\n")
    assert run(["chat", long_model, "--format", GUARD, *GREEDY]) == 0
    alone, err = capsys.readouterr()
    assert "category policies" in err
    piped("Bye\nHello\n")
    assert run(["chat", long_model, "--format", GUARD, *GREEDY]) == 0
    assert capsys.readouterr().out.endswith(alone)
    error = one_line_error(["chat", long_model, "--format", GUARD, "--system", "Be kind."], capsys)
    assert "takes no system prompt" in error


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["Hi", "--spm"], "give --suffix TEXT with it"),
        (["Hi", "--suffix", "x", "--raw"], "give one of them"),
        (["Hi", "--suffix", "x", "--system", "y"], "--suffix uses no prompt format"),
        (["Hi", "--suffix", "x", "--format", "llama3"], "--suffix uses no prompt format"),
        (["Hi", "--raw", "--format", "llama3"], "--raw uses no prompt format"),
        (["Hi", "--suffix", "x", "--wait"], "--wait is about a pipe behind PROMPT"),
        (["Hi", "--messages", "FILE"], "--messages is the whole question"),
        (["--suffix", "x", "--messages", "FILE"], "--messages is the whole question"),
    ],
)
def test_questions_that_make_no_sense(args: list[str], words: str, tmp_path: Path, capsys: Captured) -> None:
    path = file_of(tmp_path, [{"role": "user", "content": "Hi"}])
    assert words in one_line_error(["run", "nano", *(path if arg == "FILE" else arg for arg in args)], capsys, 2)


@pytest.fixture
def silent_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard input is a pipe that another program holds open; the end to write to."""
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as stream, os.fdopen(writing, "wb", closefd=False):
        monkeypatch.setattr(sys, "stdin", stream)
        yield writing


def test_a_pipe_that_says_nothing_is_left_alone(
    chat_model: str, silent_pipe: int, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(lines, "GLANCE", 0.05)
    assert run(["run", chat_model, "Hello", *GREEDY]) == 0
    out, err = capsys.readouterr()
    assert out == generate(build(tiny_config()), tokenizer(), [Message("user", "Hello")], PARAMS).text + "\n"
    assert "[nothing came through the pipe within 0.05 s: answering the prompt alone; --wait waits for the pipe]" in err
    os.close(silent_pipe)


@pytest.mark.parametrize(
    ("args", "pause"), [(["Hello"], 0.0), (["Hello", "--wait"], 0.2), (["-"], 0.2), ([], 0.2)], ids=str
)
def test_a_pipe_that_says_something_is_read_to_its_end(
    chat_model: str, silent_pipe: int, args: list[str], pause: float, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(lines, "GLANCE", 0.1)

    def write() -> None:
        time.sleep(pause)
        os.write(silent_pipe, b"there, ")
        time.sleep(0.2)
        os.write(silent_pipe, b"you\n")
        os.close(silent_pipe)

    writer = threading.Thread(target=write)
    writer.start()
    assert run(["run", chat_model, *args, *GREEDY]) == 0
    writer.join()
    asked = "Hello\n\nthere, you" if "Hello" in args else "there, you"
    out, err = capsys.readouterr()
    assert out == generate(build(tiny_config()), tokenizer(), [Message("user", asked)], PARAMS).text + "\n"
    assert "nothing came" not in err


def test_what_cannot_be_asked_whether_it_speaks_is_read() -> None:
    assert lines.speaks(None)
    assert lines.speaks(io.StringIO("text"))
