"""Slash commands, and conversations in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd.chat.messages import Message, ToolCall
from herd.chat.params import SamplingParams
from herd.cli import transcript
from herd.cli.commands import CommandError, Commands
from herd.cli.conversation import Conversation
from herd.cli.transcript import Transcript, TranscriptError
from herd.errors import ConfigError
from tests.cli.doubles import ScriptedTalker

ABOUT = {"model": "nano", "parameters": "1M"}


@pytest.fixture
def talk() -> Conversation:
    talk = Conversation(ScriptedTalker(["Hello", " you"]), SamplingParams(temperature=0.3, stop=("END",)), "Be kind.")
    list(talk.say("Hi"))
    return talk


@pytest.fixture
def commands(talk: Conversation) -> Commands:
    return Commands(talk, ABOUT)


@pytest.mark.parametrize("line", ["/?", "/help", "/ ?"])
def test_help_lists_every_command(commands: Commands, line: str) -> None:
    text = commands.run(line).text
    for name in ("/system", "/set", "/show", "/save", "/load", "/clear", "/undo", "/retry", "/bye", '"""', "Ctrl-C"):
        assert name in text


@pytest.mark.parametrize("line", ["/bye", "/exit", "/quit"])
def test_leaving(commands: Commands, line: str) -> None:
    assert commands.run(line).leave


@pytest.mark.parametrize(("line", "words"), [("/sytem x", "did you mean /system"), ("/xyzzy", "lists them"), ("/", "")])
def test_an_unknown_command_is_an_error_with_the_nearest_name(commands: Commands, line: str, words: str) -> None:
    with pytest.raises(CommandError) as caught:
        commands.run(line)
    assert words in str(caught.value)


def test_system(commands: Commands, talk: Conversation) -> None:
    assert commands.run("/system").text == "Be kind."
    commands.run("/system You are a pirate.")
    assert talk.messages[0] == Message("system", "You are a pirate.")
    commands.run("/set system Be a cat.")
    assert talk.system == "Be a cat."
    assert "removed" in commands.run('/system ""').text
    assert talk.messages[0].role == "user"
    assert commands.run("/system").text == "no system prompt"


def test_set(commands: Commands, talk: Conversation) -> None:
    assert commands.run("/set temperature 0.5").text == "temperature is 0.5"
    assert commands.run("/set parameter num_predict 9").text == "max_tokens is 9"
    assert (talk.params.temperature, talk.params.max_tokens) == (0.5, 9)
    shown = commands.run("/set").text
    assert "temperature         0.5" in shown
    assert "'END'" in shown
    with pytest.raises(CommandError, match="needs a value"):
        commands.run("/set seed")
    with pytest.raises(ConfigError, match="top_p is 3"):
        commands.run("/set top_p 3")
    commands.run("/set quiet")
    assert not commands.show_rates
    commands.run("/set verbose")
    assert commands.show_rates


def test_show_says_how_full_the_context_is(commands: Commands) -> None:
    text = commands.run("/show").text
    assert "5 of 100 tokens used, 95 left, 2 messages" in text
    assert "nano" in text
    assert "Be kind." in text


def test_undo_and_retry(commands: Commands, talk: Conversation) -> None:
    assert commands.run("/retry").say == "Hi"
    assert talk.turns == []
    for line in ("/retry", "/undo"):
        with pytest.raises(CommandError, match="nothing"):
            commands.run(line)
    list(talk.say("x" * 100))
    assert commands.run("/undo").text == f"took back: {'x' * 60}..."


def test_save_then_load_is_the_same_conversation(commands: Commands, talk: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "a talk.json"
    assert commands.run(f"/save {path}").text == f"wrote {path}, 2 messages"
    turns, system, params = list(talk.turns), talk.system, talk.params
    talk.clear()
    talk.set("system", "")
    talk.set("temperature", "1")
    assert commands.run(f'/load "{path}"').text == f"read {path}, 2 messages"
    assert (talk.turns, talk.system, talk.params) == (turns, system, params)


def test_save_does_not_replace_a_file_unless_told_to(commands: Commands, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text("precious")
    with pytest.raises(TranscriptError, match="exists: /save -f"):
        commands.run(f"/save {path}")
    assert path.read_text() == "precious"
    assert commands.run(f"/save -f {path}").text == f"replaced {path}, 2 messages"
    assert json.loads(path.read_text())["version"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]


def test_a_conversation_of_another_model_is_said(commands: Commands, talk: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    transcript.save(path, Transcript("llama-3-8b", tuple(talk.turns)))
    assert "held with llama-3-8b, and goes on with nano" in commands.run(f"/load {path}").text


@pytest.mark.parametrize("line", ["/save", "/load", "/save -f ", '/load ""'])
def test_a_file_name_is_needed(commands: Commands, line: str) -> None:
    with pytest.raises((CommandError, TranscriptError)):
        commands.run(line)


def test_every_kind_of_message_comes_back(tmp_path: Path) -> None:
    messages = (
        Message("user", "caf\u00e9 \U0001f999\n"),
        Message("assistant", "", (ToolCall("f", {"x": [1, {"y": None}]}, "id-1"),), "end_of_message"),
        Message("tool", "3", name="f", tool_call_id="id-1"),
        Message("assistant", "cut", stop_reason="out_of_tokens"),
    )
    written = Transcript("nano", messages, "s", SamplingParams(seed=3, stop=("a", "b"), max_tokens=4))
    transcript.save(tmp_path / "t", written)
    assert transcript.load(tmp_path / "t") == written


def saved(**changes: object) -> str:
    good = {"kind": "herd.chat", "version": 1, "model": "m", "system": "", "params": {}, "messages": []}
    return json.dumps(good | changes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not JSON"),
        ("hello", "not JSON"),
        ("[1", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a conversation saved by herd"),
        ("{}", "not a conversation saved by herd"),
        (saved(version=2), "has version 2, and this herd reads version 1"),
        (saved(version=None), "has version None"),
        (saved(messages=None), "messages is missing"),
        (saved(messages={}), "messages is missing"),
        (saved(messages=["x"]), "message 0"),
        (saved(messages=[{"role": "king", "content": "x"}]), "role is 'king'"),
        (saved(messages=[{"role": "user", "content": 3}]), "content is a int"),
        (saved(messages=[{"role": "user", "content": "", "tool_calls": [{"name": "f"}]}]), "only assistant messages"),
        (saved(params={"temperature": -1}), "temperature is -1"),
        (saved(params={"magic": 1}), "params must be an object"),
        (saved(params=[]), "params must be an object"),
        (saved(system=3), "must be text"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(content)
    with pytest.raises(TranscriptError) as caught:
        transcript.load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_places_that_cannot_be_read_or_written(commands: Commands, talk: Conversation, tmp_path: Path) -> None:
    before = list(talk.turns)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for line, words in [
        (f"/load {tmp_path}/none.json", "No such file"),
        (f"/load {tmp_path}", "is not a file"),
        ("/load /dev/zero", "is not a file"),
        (f"/load {binary}", "not JSON"),
        (f"/save {tmp_path}/none/talk.json", "No such file"),
        (f"/save -f {tmp_path}", "cannot write"),
    ]:
        with pytest.raises(TranscriptError, match=words):
            commands.run(line)
    assert talk.turns == before
