"""All that upper floors see of a model: two small protocols, met alike by an engine, a remote server and a test double."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from herd.chat.format import Delta, ToolSpec
from herd.chat.messages import Message
from herd.chat.params import SamplingParams

__all__ = ["ChatModel", "FinishReason", "Reply", "Score", "Scorer", "Usage"]

FinishReason = Literal["stop", "length", "context_full", "abort"]
"""stop: the model ended its turn or met a stop string. length: max_tokens. context_full: no position left. abort: the caller
ended it early."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one reply in tokens, and its times in seconds. `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first one; 0 when there is none."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished reply. `tokens` are the generated ids, the stop id included; `notes` are those of the rendered prompt."""

    message: Message
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The reply's text."""
        return self.message.text


class ChatModel(Protocol):
    """Messages in, deltas out."""

    def stream(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: SamplingParams = ...
    ) -> Iterator[Delta]: ...


@dataclass(frozen=True, slots=True)
class Score:
    """Sum of log probabilities (nats) of a continuation, its token count, and whether greedy decoding would give it."""

    logprob: float
    num_tokens: int
    is_greedy: bool


class Scorer(Protocol):
    """(context, continuation) pairs in, scores out."""

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Score]: ...
