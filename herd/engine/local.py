"""A model and its tokenizer as a ChatModel: messages in, deltas out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from herd.chat.format import ChatFormat, Delta, StreamParser, ToolSpec
from herd.chat.formats import detect
from herd.chat.messages import Message
from herd.chat.model import FinishReason, Reply, Usage
from herd.chat.params import SamplingParams
from herd.chat.render import messages_from
from herd.chat.toolspec import tools_from
from herd.engine.session import Session
from herd.engine.stop import StopMatcher
from herd.model.llama import Llama
from herd.tokenizer.stream import Detokenizer
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["LocalChat", "TextParser", "generate"]


class TextParser:
    """The StreamParser of a plain text completion: every id is text, a stop id ends it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizer, self._stop = Detokenizer(tokenizer), tokenizer.special.stop
        self._text: list[str] = []
        self._done = False

    def push(self, id: int) -> list[Delta]:
        if id in self._stop:
            self._done = True
            return [*self._text_delta(self._detokenizer.flush()), Delta(stop_reason="end_of_turn")]
        return self._text_delta(self._detokenizer.push(id))

    def close(self) -> list[Delta]:
        rest = self._text_delta(self._detokenizer.flush())
        return rest if self._done else [*rest, Delta(stop_reason="out_of_tokens")]

    def message(self) -> Message:
        return Message("assistant", "".join(self._text))

    def _text_delta(self, text: str) -> list[Delta]:
        self._text.append(text)
        return [Delta(text=text)] if text else []


class LocalChat:
    """Chat with one model in this process, one conversation at a time; later turns reuse the cache of earlier ones.

    `format` None means the one the checkpoint was trained with, detected on first use. `max_len` limits the context.
    After a stream is exhausted or closed, `last` is its Reply (finish reason "length" when it was closed early); while it
    runs, `made` counts its tokens.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, *, format: ChatFormat | None = None, max_len: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.session = Session(model, max_len=max_len)
        self.last: Reply | None = None
        self.made = 0
        self._format = format

    @property
    def format(self) -> ChatFormat:
        """The prompt format. Raises PromptError when the checkpoint has none (a base model)."""
        if self._format is None:
            self._format = detect(self.tokenizer)
        return self._format

    @property
    def max_len(self) -> int:
        """Tokens the context holds, prompt and reply together."""
        return self.session.max_len

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation as it stands in the context."""
        return len(self.format.render(messages, generate=False).tokens)

    def stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        params: SamplingParams = SamplingParams(),
        *,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Delta]:
        """The assistant's reply to `messages` as it is made."""
        prompt = self.format.render(messages, tools, generate=True).tokens
        return self._run(prompt, params, self.format.stop_ids, self.format.parser(tools), on_prefill)

    def complete(
        self,
        text: str,
        params: SamplingParams = SamplingParams(),
        *,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Delta]:
        """The continuation of plain `text` (after one BOS), as base models are used."""
        prompt = self.tokenizer.encode(text, bos=True)
        return self._run(prompt, params, self.tokenizer.special.stop, TextParser(self.tokenizer), on_prefill)

    def _run(
        self,
        prompt: list[int],
        params: SamplingParams,
        stop_ids: frozenset[int],
        parser: StreamParser,
        on_prefill: Callable[[int, int], None] | None,
    ) -> Iterator[Delta]:
        matcher = StopMatcher(params.stop)
        # Ids that the parser must not see: stops that are ignored, and stops that only the caller knows.
        hidden = stop_ids | params.stop_ids if params.ignore_stop_ids else params.stop_ids - stop_ids
        tokens: list[int] = []
        self.made = 0
        shown: list[str] = []
        started = first = time.perf_counter()
        cached = self._cached(prompt)
        ended = False
        ids = self.session.generate(prompt, params, stop_ids, on_prefill=on_prefill)

        def pass_on(deltas: list[Delta]) -> Iterator[Delta]:
            nonlocal ended
            for delta in deltas:
                if delta.text is not None:
                    text = matcher.push(delta.text)
                    if text:
                        shown.append(text)
                        yield Delta(text=text)
                    if matcher.matched:
                        ended = True
                        return
                else:
                    if held := matcher.flush():
                        shown.append(held)
                        yield Delta(text=held)
                    if ended and delta.stop_reason == "out_of_tokens":  # a caller's stop id, unknown to the parser
                        delta = Delta(stop_reason="end_of_turn")
                    ended = ended or delta.stop_reason in ("end_of_turn", "end_of_message")
                    yield delta

        try:
            for token in ids:
                if not tokens:
                    first = time.perf_counter()
                tokens.append(token)
                self.made = len(tokens)
                if token in hidden:
                    ended = not params.ignore_stop_ids
                    continue
                yield from pass_on(parser.push(token))
                if matcher.matched:
                    break
            if matcher.matched:
                yield Delta(stop_reason="end_of_turn")
            else:
                yield from pass_on(parser.close())
        finally:
            ids.close()  # type: ignore[attr-defined]  # a generator: frees its logits at once
            now = time.perf_counter()
            usage = Usage(len(prompt), len(tokens), cached, first - started, now - first if tokens else 0.0)
            message = parser.message()
            if matcher.matched:
                message = Message("assistant", "".join(shown))
            elif ended and message.stop_reason == "out_of_tokens":
                message = replace(message, stop_reason="end_of_turn")
            self.last = Reply(message, tokens, self._finish(ended, len(prompt) + len(tokens)), usage)

    def _finish(self, ended: bool, total: int) -> FinishReason:
        if ended:
            return "stop"
        return "context_full" if total >= self.session.max_len else "length"

    def _cached(self, prompt: Sequence[int]) -> int:
        """How many tokens of `prompt` the session will not compute again."""
        same = 0
        for have, want in zip(self.session.tokens, prompt[:-1], strict=False):
            if have != want:
                break
            same += 1
        return same


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message | Mapping[str, Any]],
    params: SamplingParams = SamplingParams(),
    *,
    tools: Sequence[ToolSpec | Any] = (),
    format: ChatFormat | None = None,
) -> Reply:
    """One reply. Messages are rendered in the checkpoint's prompt format; a string is continued as plain text.

    Messages may be plain dictionaries and tools Python functions, see `herd.render`.

    Raises PromptError, ContextFullError or ConfigError before any token is made.
    """
    chat = LocalChat(model, tokenizer, format=format)
    if isinstance(prompt, str):
        deltas = chat.complete(prompt, params)
    else:
        deltas = chat.stream(messages_from(prompt), tools_from(tools), params)
    for _ in deltas:
        pass
    assert chat.last is not None
    return chat.last
