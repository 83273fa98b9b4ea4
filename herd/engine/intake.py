"""From what callers give (texts, ids, conversations) to requests that the engine will take, checked before any work."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from herd.chat.base import BaseFormat
from herd.chat.format import ChatFormat, Delta, ToolSpec
from herd.chat.formats import detect
from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.chat.render import messages_from
from herd.checkpoint.store import GenerationDefaults
from herd.engine.reply import ReplyBuilder
from herd.engine.request import Request
from herd.engine.sinks import ReplySink
from herd.errors import ConfigError, PromptError
from herd.hub.created import Created
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Conversation", "Intake", "Prompt", "is_conversation"]

Prompt = str | Sequence[int]
"""A text to go on with (one BOS is put before it), or ids as they are."""
Conversation = Sequence[Message | Mapping[str, Any]]


class Intake:
    """Makes requests in the model's prompt format, or `format`, each with an id of its own.

    `defaults` are for requests without params; `check` raises when the engine cannot take a request. `made` is what
    conversations of a created model begin with, and `own` the adapter of requests that name none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        defaults: GenerationDefaults,
        format: ChatFormat | None,
        check: Callable[[Request], None],
        made: Created | None = None,
    ) -> None:
        self.tokenizer, self.defaults = tokenizer, defaults
        self.base = BaseFormat(tokenizer)
        self._format = format
        self._check, self._made = check, made
        self.own: str | None = None
        self._numbers = itertools.count()

    @property
    def format(self) -> ChatFormat:
        """The prompt format. Raises PromptError when the checkpoint has none (a base model)."""
        if self._format is None:
            self._format = detect(self.tokenizer)
        return self._format

    def requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | None,
    ) -> list[tuple[Request, str | None]]:
        """Checked requests with their texts, before any is queued."""
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            prompts = [prompts]  # type: ignore[list-item]
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.defaults.params()] * len(prompts)
        if len(params) != len(prompts):
            raise ConfigError(
                f"{len(params)} sampling parameters were given for {len(prompts)} prompts: give one, or as many"
            )
        out = []
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            text = prompt if isinstance(prompt, str) else None
            ids = self.base.complete(text).tokens if text is not None else prompt
            what = f"prompt {number}"
            if one.beams == 1:
                out.append((self.request(ids, one, self.base.stop_ids, what, adapter=adapter), text))
                continue
            if one.prompt_logprobs is not None:
                raise ConfigError(f"{what}: beam search tells no prompt_logprobs: leave them out, or beams")
            single = replace(one, beams=1, n=1, length_penalty=1.0)
            request = self.request(ids, single, self.base.stop_ids, what, adapter=adapter)
            out.append((replace(request, params=one), text))
        return out

    def request(
        self,
        ids: Any,
        params: SamplingParams,
        stop_ids: frozenset[int],
        what: str,
        *,
        adapter: str | None = None,
        score_from: int = 0,
    ) -> Request:
        """A request that the engine will take; errors call it `what`. Raises PromptError, ConfigError or ContextFullError."""
        if not isinstance(ids, Sequence) or not all(isinstance(i, int) for i in ids):
            raise PromptError(f"{what} is not a text or a list of token ids")
        request = Request(what, tuple(ids), params, stop_ids, adapter or self.own, score_from=score_from)
        self._check(request)
        return replace(request, id=f"{what} #{next(self._numbers)}")

    def reply(
        self,
        prompt: Any,
        params: SamplingParams | None,
        tools: Sequence[ToolSpec],
        what: str,
        adapter: str | None,
        put: Callable[[Delta | None], None] | None = None,
    ) -> tuple[Request, ReplySink]:
        """The request for one reply to a text, ids or a conversation, and where it is made; its deltas go to `put`, then None."""
        params = params or self.defaults.params()
        if params.candidates > 1 or params.beams > 1:
            raise ConfigError("a chat or stream has one reply: leave n, best_of and beams out, or use generate")
        if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int)):
            if tools:
                raise PromptError("plain text is continued as it is, without tools: give a list of messages instead")
            stop_ids, parser, notes = self.base.stop_ids, self.base.parser(), ()
            ids = self.base.complete(prompt).tokens if isinstance(prompt, str) else prompt
        else:
            rendered = self.format.render(self._begun(prompt), tools, generate=True)
            stop_ids, parser, notes = self.format.stop_ids, self.format.parser(tools), rendered.notes
            ids = rendered.tokens
        request = self.request(ids, params, stop_ids, what, adapter=adapter)
        return request, ReplySink(request, ReplyBuilder(parser, params, stop_ids), notes, put)

    def ids(self, prompt: Prompt | Conversation) -> Sequence[int]:
        """The ids of what prompts begin with: no turn of the model is opened after messages."""
        if isinstance(prompt, str):
            return self.base.complete(prompt).tokens
        if prompt and isinstance(prompt[0], int):
            return prompt  # type: ignore[return-value]
        return self.format.render(self._begun(prompt), generate=False).tokens

    def _begun(self, conversation: Any) -> tuple[Message, ...]:
        messages = messages_from(conversation)
        return messages if self._made is None else self._made.begun(messages)


def is_conversation(item: Any) -> bool:
    """Whether an item of a list is a conversation of its own, and not a message."""
    if isinstance(item, Mapping):
        return "messages" in item
    return isinstance(item, Sequence) and not isinstance(item, str | Message)
