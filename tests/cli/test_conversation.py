"""The conversation without a terminal: what stays in it, whatever happens to a reply."""

from __future__ import annotations

import pytest

from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.cli.conversation import Conversation
from herd.errors import ConfigError, ContextFullError, HerdError
from tests.cli.doubles import ScriptedTalker


def say(talk: Conversation, text: str) -> str:
    return "".join(delta.text or "" for delta in talk.say(text))


def test_turns_accumulate_behind_the_system_prompt() -> None:
    model = ScriptedTalker(["Hello", " you"], ["Fine"])
    talk = Conversation(model, system="Be kind.")
    assert say(talk, "Hi") == "Hello you"
    assert say(talk, "How are you?") == "Fine"
    assert model.asked[1] == [
        Message("system", "Be kind."),
        Message("user", "Hi"),
        Message("assistant", "Hello you"),
        Message("user", "How are you?"),
    ]
    assert talk.outcome is not None
    assert (talk.outcome.used, talk.outcome.kept, talk.outcome.stopped) == (9, True, False)
    assert talk.used == 9


def test_without_a_system_prompt_there_is_no_system_message() -> None:
    model = ScriptedTalker()
    say(Conversation(model), "Hi")
    assert [m.role for m in model.asked[0]] == ["user"]


def test_a_stopped_reply_stays_and_is_marked() -> None:
    talk = Conversation(ScriptedTalker(["one", " two", " three"], ["next"]))
    reply = talk.say("count")
    assert [next(reply).text, next(reply).text] == ["one", " two"]
    reply.close()
    assert talk.turns == [Message("user", "count"), Message("assistant", "one two", stop_reason="out_of_tokens")]
    assert talk.outcome is not None
    assert talk.outcome.stopped
    assert say(talk, "go on") == "next"


def test_a_reply_stopped_before_its_first_character_leaves_nothing() -> None:
    def stop_reading(done: int, total: int) -> None:
        raise KeyboardInterrupt

    talk = Conversation(ScriptedTalker(["one"]))
    with pytest.raises(KeyboardInterrupt):
        next(talk.say("count", stop_reading))
    assert talk.turns == []
    assert talk.outcome is not None
    assert talk.outcome.stopped
    assert not talk.outcome.kept


@pytest.mark.parametrize("error", [ContextFullError("full", needed=3, available=2), HerdError("not finite")])
def test_a_failed_turn_leaves_the_conversation_as_it_was(error: HerdError) -> None:
    model = ScriptedTalker(["a"], ["b"])
    talk = Conversation(model)
    say(talk, "first")
    before = list(talk.turns)
    model.fails = error
    with pytest.raises(type(error)):
        say(talk, "second")
    assert talk.turns == before
    assert talk.outcome is None
    assert say(talk, "third") == "b"
    assert len(talk.turns) == 4


def test_a_full_context_is_an_error_and_undo_makes_room() -> None:
    talk = Conversation(ScriptedTalker(["w "] * 6, max_len=10))
    say(talk, "a b c")
    with pytest.raises(ContextFullError):
        say(talk, "d e f")
    assert talk.undo() == "a b c"
    assert say(talk, "d e f") == "ok"


def test_undo_takes_back_one_exchange_at_a_time() -> None:
    talk = Conversation(ScriptedTalker())
    say(talk, "one")
    say(talk, "two")
    assert talk.undo() == "two"
    assert [m.text for m in talk.turns] == ["one", "ok"]
    assert talk.undo() == "one"
    assert talk.undo() is None


def test_clear_keeps_settings_and_system_prompt() -> None:
    talk = Conversation(ScriptedTalker(), SamplingParams(temperature=0.1), system="Be brief.")
    say(talk, "one")
    talk.clear()
    assert talk.messages == [Message("system", "Be brief.")]
    assert talk.params.temperature == 0.1


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("temperature", "0", "temperature", 0.0),
        ("temp", "1.5", "temperature", 1.5),
        ("TOP_P", "0.5", "top_p", 0.5),
        ("top_k", "40", "top_k", 40),
        ("min_p", "0.05", "min_p", 0.05),
        ("repeat_penalty", "1.1", "repetition_penalty", 1.1),
        ("num_predict", "12", "max_tokens", 12),
        ("max_tokens", "none", "max_tokens", None),
        ("seed", "7", "seed", 7),
        ("seed", "none", "seed", None),
        ("stop", "END", "stop", ("END",)),
        ("stop", r"\n\n", "stop", ("\n\n",)),
        ("stop", '["a", "b c"]', "stop", ("a", "b c")),
        ("stop", "none", "stop", ()),
    ],
)
def test_settings_are_read_from_text_and_reach_the_model(name: str, text: str, field: str, value: object) -> None:
    model = ScriptedTalker()
    talk = Conversation(model, SamplingParams(max_tokens=5, seed=1, stop=("x",)))
    assert talk.set(name, text) == field
    say(talk, "Hi")
    assert getattr(model.params[0], field) == value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("temperature", "hot", "temperature is 'hot': expected a number"),
        ("temperature", "-1", "temperature is -1.0: expected a number at least 0"),
        ("temperature", "nan", "temperature is nan"),
        ("top_p", "2", "top_p is 2.0"),
        ("top_k", "1.5", "top_k is '1.5': expected an integer"),
        ("max_tokens", "0", "max_tokens is 0"),
        ("seed", "-1", "seed is -1"),
        ("stop", "[1]", "stop strings"),
        ("stop", "[", "JSON list"),
        ("temprature", "1", "did you mean temperature?"),
        ("zzz", "1", "there are system, temperature"),
    ],
)
def test_an_impossible_setting_is_refused_and_changes_nothing(name: str, text: str, words: str) -> None:
    talk = Conversation(ScriptedTalker())
    before = talk.params
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        talk.set(name, text)
    assert talk.params == before
