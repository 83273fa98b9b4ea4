"""LocalChat and generate: messages in, deltas out, over a tiny model and over one that says what it is told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest

from herd.chat.format import ToolSpec
from herd.chat.formats import format_named
from herd.chat.messages import Message, ToolCall
from herd.chat.params import SamplingParams
from herd.engine.local import LocalChat
from herd.engine.session import Session
from herd.errors import ContextFullError, PromptError
from tests.build import build
from tests.cli.tiny import SPECIALS, infill_config, infill_tokenizer, tiny_config, tokenizer

HI = [Message("user", "Hi")]
GREEDY = SamplingParams(temperature=0, max_tokens=10)
EOT, EOM, END = (256 + SPECIALS.index(name) for name in ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"))


class ScriptedSession:
    """A session whose next reply is known: bytes of a text, and ids. It honours stop ids and the token budget."""

    def __init__(self, *script: str | int, max_len: int = 1000) -> None:
        self.script = [id for part in script for id in (part.encode() if isinstance(part, str) else [part])]
        self.max_len = max_len
        self.tokens: list[int] = []
        self.closed = False

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stop_ids: frozenset[int] = frozenset(),
        *,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[int]:
        stops = frozenset() if params.ignore_stop_ids else stop_ids | params.stop_ids
        budget = min(self.max_len - len(prompt), params.max_tokens or self.max_len)
        try:
            for id in itertools.islice(self.script, budget):
                yield id
                if id in stops:
                    return
        finally:
            self.closed = True


@pytest.fixture
def chat() -> LocalChat:
    return LocalChat(build(tiny_config()), tokenizer(), format=format_named("llama3.1", tokenizer()))


def scripted(chat: LocalChat, *script: str | int, max_len: int = 1000) -> LocalChat:
    chat.session = ScriptedSession(*script, max_len=max_len)  # type: ignore[assignment]
    return chat


def said(chat: LocalChat, params: SamplingParams = SamplingParams(), tools: Sequence[ToolSpec] = ()) -> str:
    return "".join(delta.text or "" for delta in chat.stream(HI, tools, params))


def test_a_reply_is_text_a_stop_reason_and_a_record(chat: LocalChat) -> None:
    deltas = list(scripted(chat, "Héllo", EOT, "unsaid").stream(HI))
    assert "".join(delta.text or "" for delta in deltas) == "Héllo"
    assert deltas[-1].stop_reason == "end_of_turn"
    assert chat.last is not None
    assert chat.last.text == "Héllo"
    assert chat.last.finish_reason == "stop"
    assert chat.last.tokens == [*"Héllo".encode(), EOT]
    assert chat.last.usage.completion_tokens == chat.made == 7
    assert chat.last.usage.prompt_tokens == len(chat.format.render(HI).tokens)


def test_no_half_character_is_ever_shown(chat: LocalChat) -> None:
    text = "ä羊🦙é"
    assert [delta.text for delta in scripted(chat, text, EOT).stream(HI) if delta.text] == list(text)


def test_a_reply_cut_inside_a_character_shows_that_it_is_broken(chat: LocalChat) -> None:
    assert said(scripted(chat, "a🦙"), SamplingParams(max_tokens=3)) == "a\ufffd"
    assert chat.last is not None
    assert chat.last.finish_reason == "length"
    assert chat.last.message.stop_reason == "out_of_tokens"


@pytest.mark.parametrize("script", [("one END two", EOT), ("one END",), ("one END", EOT)])
def test_a_stop_string_ends_the_reply_and_is_not_part_of_it(chat: LocalChat, script: tuple[str | int, ...]) -> None:
    deltas = list(scripted(chat, *script).stream(HI, (), SamplingParams(stop=("END", "unused"))))
    assert "".join(delta.text or "" for delta in deltas) == "one "
    assert deltas[-1].stop_reason == "end_of_turn"
    assert chat.last is not None
    assert chat.last.text == "one "
    assert chat.last.finish_reason == "stop"
    assert chat.session.closed  # type: ignore[attr-defined]


def test_the_beginning_of_a_stop_string_is_shown_when_it_was_none(chat: LocalChat) -> None:
    assert said(scripted(chat, "one EN", EOT), SamplingParams(stop=("END",))) == "one EN"
    assert chat.last is not None
    assert chat.last.text == "one EN"


def test_a_caller_can_stop_at_any_id(chat: LocalChat) -> None:
    params = SamplingParams(stop_ids=frozenset({ord("c"), EOT}))
    deltas = list(scripted(chat, "abcd", EOT).stream(HI, (), params))
    assert "".join(delta.text or "" for delta in deltas) == "ab"
    assert [delta.stop_reason for delta in deltas if delta.stop_reason] == ["end_of_turn"]
    assert chat.last is not None
    assert (chat.last.text, chat.last.finish_reason, chat.last.message.stop_reason) == ("ab", "stop", "end_of_turn")


def test_stop_ids_can_be_ignored(chat: LocalChat) -> None:
    params = SamplingParams(ignore_stop_ids=True, max_tokens=6)
    assert said(scripted(chat, "ab", EOT, "cdefg"), params) == "abcde"
    assert chat.last is not None
    assert chat.last.finish_reason == "length"
    assert len(chat.last.tokens) == 6


def test_length_and_a_full_context_are_told_apart(chat: LocalChat) -> None:
    prompt = len(chat.format.render(HI).tokens)
    said(scripted(chat, "abcdefgh", max_len=prompt + 5), SamplingParams(max_tokens=3))
    assert chat.last is not None
    assert chat.last.finish_reason == "length"
    said(scripted(chat, "abcdefgh", max_len=prompt + 5))
    assert chat.last.finish_reason == "context_full"
    said(scripted(chat, "abcd", EOT, max_len=prompt + 5))
    assert chat.last.finish_reason == "stop"


def test_tool_calls_come_as_deltas_and_in_the_message(chat: LocalChat) -> None:
    tool = ToolSpec("add", "Adds.", {"type": "object", "properties": {"a": {"type": "integer"}}})
    call = '{"name": "add", "parameters": {"a": 3}}'
    deltas = list(scripted(chat, call, EOT).stream(HI, [tool]))
    assert [delta.tool_call for delta in deltas if delta.tool_call] == [ToolCall("add", {"a": 3})]
    assert not any(delta.text for delta in deltas)
    assert chat.last is not None
    assert chat.last.message.tool_calls == (ToolCall("add", {"a": 3}),)
    assert said(scripted(chat, call, EOT)) == call  # without tools it is text


def test_a_closed_stream_leaves_a_record_of_what_was_said(chat: LocalChat) -> None:
    stream = scripted(chat, "one two", EOT).stream(HI)
    assert [next(stream).text for _ in range(3)] == ["o", "n", "e"]
    stream.close()  # type: ignore[attr-defined]
    assert chat.last is not None
    assert chat.last.text == "one"
    assert chat.session.closed  # type: ignore[attr-defined]


def test_a_second_turn_reuses_the_first(chat: LocalChat) -> None:
    list(chat.stream(HI, (), GREEDY))
    assert chat.last is not None
    first = chat.last
    assert first.usage.cached_tokens == 0
    talk = [*HI, first.message, Message("user", "And?")]
    computed = chat.session.tokens[:]
    list(chat.stream(talk, (), GREEDY))
    assert chat.last.usage.cached_tokens >= first.usage.prompt_tokens
    fresh = LocalChat(build(tiny_config()), tokenizer(), format=chat.format)
    list(fresh.stream(talk, (), GREEDY))
    assert fresh.last is not None
    assert fresh.last.tokens == chat.last.tokens
    assert fresh.last.usage.cached_tokens == 0
    assert computed[: chat.last.usage.cached_tokens] == chat.session.tokens[: chat.last.usage.cached_tokens]


def test_stopped_replies_do_not_spoil_the_next(chat: LocalChat) -> None:
    for taken in (0, 1, 4):
        stream = chat.stream(HI, (), GREEDY)
        for _ in range(taken):
            next(stream)
        stream.close()  # type: ignore[attr-defined]
    list(chat.stream(HI, (), GREEDY))
    fresh = LocalChat(build(tiny_config()), tokenizer(), format=chat.format)
    list(fresh.stream(HI, (), GREEDY))
    assert chat.last is not None
    assert fresh.last is not None
    assert chat.last.tokens == fresh.last.tokens


def test_a_conversation_longer_than_the_context_is_refused(chat: LocalChat) -> None:
    with pytest.raises(ContextFullError):
        list(chat.stream([Message("user", "x" * 500)]))
    assert said(chat, GREEDY) is not None


def test_the_context_can_be_limited() -> None:
    chat = LocalChat(build(tiny_config()), tokenizer(), max_len=50)
    assert chat.max_len == 50
    list(chat.stream(HI, (), SamplingParams(temperature=0, ignore_stop_ids=True)))
    assert chat.last is not None
    assert chat.last.finish_reason == "context_full"
    assert len(chat.last.tokens) + chat.last.usage.prompt_tokens == 50


def test_count_is_what_a_conversation_takes(chat: LocalChat) -> None:
    talk = [*HI, Message("assistant", "Hello")]
    assert chat.count(talk) == len(chat.format.render(talk, generate=False).tokens)


def test_the_format_is_that_of_the_checkpoint() -> None:
    found = tokenizer()
    assert LocalChat(build(tiny_config()), found).format.name == "llama3"
    found.chat_format = None
    with pytest.raises(PromptError, match="base model"):
        LocalChat(build(tiny_config()), found).stream(HI)


def test_plain_text_is_continued_after_one_bos(chat: LocalChat) -> None:
    text = "".join(delta.text or "" for delta in chat.complete("Once upon", GREEDY))
    ids = tokenizer().encode("Once upon", bos=True)
    assert ids[0] == tokenizer().special.bos
    made = list(Session(build(tiny_config())).generate(ids, GREEDY, tokenizer().special.stop))
    assert chat.last is not None
    assert (chat.last.tokens, chat.last.text) == (made, text)
    assert text == tokenizer().decode(made)


def test_plain_text_ends_at_a_stop_id(chat: LocalChat) -> None:
    deltas = list(scripted(chat, "a time", END, "x").complete("Once upon"))
    assert "".join(delta.text or "" for delta in deltas) == "a time"
    assert deltas[-1].stop_reason == "end_of_turn"
    assert chat.last is not None
    assert chat.last.finish_reason == "stop"


def test_a_text_goes_on_with_the_space_that_the_model_wrote() -> None:
    found = infill_tokenizer()
    chat = LocalChat(build(infill_config()), found)
    script = [found.model.pieces.index(piece) for piece in ("▁a", "b", "▁c")]
    said = [delta.text for delta in scripted(chat, *script, found.special.eos).complete("abc") if delta.text]
    assert "".join(said) == " ab c"
