"""A model and its tokenizer as a ChatModel: messages in, deltas out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from herd.chat.base import BaseFormat
from herd.chat.format import ChatFormat, Delta, Rendered, StreamParser, ToolSpec
from herd.chat.formats import detect, format_named
from herd.chat.infill import Infill, InfillOrder
from herd.chat.messages import Message
from herd.chat.model import FinishReason, Reply, Usage
from herd.chat.params import SamplingParams
from herd.chat.render import messages_from
from herd.chat.toolspec import tools_from
from herd.engine.paged_session import PagedSession, session_for
from herd.engine.reply import ReplyBuilder
from herd.engine.runner import Runner
from herd.engine.virtual import VirtualTokens
from herd.errors import PromptError
from herd.model.llama import Llama
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["LocalChat", "generate"]


AnyFormat = ChatFormat | str | tuple[str, Tokenizer]
"""A prompt format, its name, or a name with the tokenizer it is for."""


class LocalChat:
    """Chat with one model in this process, one conversation at a time; later turns reuse the cache of earlier ones.

    `format` is a prompt format, its name, or a name with the tokenizer it is for; None means the one the checkpoint was
    trained with, detected on first use. `max_len` limits the context. `runner` computes the steps, instead of the fastest one.
    `virtual` tokens stand before every conversation, and the context holds so many fewer.
    After a stream is exhausted or closed, `last` is its Reply (finish reason "length" when it was closed early); while it
    runs, `made` counts its tokens.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        *,
        format: AnyFormat | None = None,
        max_len: int | None = None,
        runner: Runner | None = None,
        virtual: VirtualTokens | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.session = (
            session_for(model, max_len=max_len)
            if runner is None and virtual is None
            else PagedSession(model, max_len=max_len, runner=runner, virtual=virtual)
        )
        self.last: Reply | None = None
        self.made = 0
        if isinstance(format, str):
            format = format, tokenizer
        self._format = format_named(*format) if isinstance(format, tuple) else format

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
        prompt = self.format.render(messages, tools, generate=True)
        return self._run(prompt, params, self.format.stop_ids, self.format.parser(tools), on_prefill)

    def complete(
        self,
        text: str,
        params: SamplingParams = SamplingParams(),
        *,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Delta]:
        """The continuation of plain `text` (after one BOS), as base models are used."""
        base = BaseFormat(self.tokenizer)
        return self._run(base.complete(text), params, base.stop_ids, base.parser(), on_prefill)

    def infill(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams = SamplingParams(),
        *,
        order: InfillOrder = "psm",
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Delta]:
        """The text between `prefix` and `suffix`, as Code Llama fills it in. `order` is that of the prompt's parts.

        Raises PromptError when the vocabulary or the model knows no infill tokens.
        """
        infill = Infill(self.tokenizer)
        prompt = infill.prompt(prefix, suffix, order)
        if max(infill.stop_ids) >= self.session.model.config.vocab_size:
            raise PromptError(
                "the vocabulary has fill-in-the-middle pieces, but this model has no embeddings for them: use Code Llama 7B, "
                "13B or 70B (base), or Instruct 7B or 13B"
            )
        return self._run(prompt, params, infill.stop_ids, infill.parser(), on_prefill)

    def _run(
        self,
        rendered: Rendered,
        params: SamplingParams,
        stop_ids: frozenset[int],
        parser: StreamParser,
        on_prefill: Callable[[int, int], None] | None,
    ) -> Iterator[Delta]:
        prompt, reply = rendered.tokens, ReplyBuilder(parser, params, stop_ids)
        self.made = 0
        started = first = time.perf_counter()
        cached = self._cached(prompt)
        ids = self.session.generate(prompt, params, stop_ids, on_prefill=on_prefill)
        try:
            for token in ids:
                if not self.made:
                    first = time.perf_counter()
                self.made += 1
                yield from reply.push(token)
                if reply.done:
                    break
            yield from reply.close()
        finally:
            ids.close()  # type: ignore[attr-defined]  # a generator: frees its logits at once
            now = time.perf_counter()
            usage = Usage(len(prompt), self.made, cached, first - started, now - first if self.made else 0.0)
            finish = self._finish(reply.ended, len(prompt) + self.made)
            self.last = Reply(reply.message(), reply.tokens, finish, usage, rendered.notes)

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
    format: AnyFormat | None = None,
    suffix: str | None = None,
    order: InfillOrder | None = None,
) -> Reply:
    """One reply. Messages are rendered in the checkpoint's prompt format, or in `format`; a string is continued as plain text.

    Messages may be plain dictionaries and tools Python functions, see `herd.render`. With `suffix` the reply is the text
    between the string and it, where the model can fill in; `order` is that of the prompt's parts (default "psm").

    `params` are Meta's defaults unless given: a model and a tokenizer do not carry what generation_config.json says, but
    `herd.checkpoint.load.open_checkpoint(path).defaults.params()` does.

    Raises PromptError, ContextFullError or ConfigError before any token is made.
    """
    chat = LocalChat(model, tokenizer, format=format)
    if order is not None and suffix is None:
        raise PromptError("order is about filling in the middle: give a suffix with it")
    if isinstance(prompt, str):
        if tools or format is not None:
            what = "tools" if tools else "a format"
            raise PromptError(f"plain text is continued as it is, without {what}: give a list of messages instead")
        if suffix is None:
            deltas = chat.complete(prompt, params)
        else:
            deltas = chat.infill(prompt, suffix, params, order=order or "psm")
    elif suffix is not None:
        raise PromptError("the middle is filled in between two texts: give a text and a suffix, not messages")
    else:
        deltas = chat.stream(messages_from(prompt), tools_from(tools), params)
    for _ in deltas:
        pass
    assert chat.last is not None
    return chat.last
