"""What a caller asks of an engine, one continuation of it on its way, and what comes back. Ids only, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from herd.chat.params import SamplingParams
from herd.engine.blocks import VIRTUAL
from herd.errors import ConfigError

__all__ = ["Finish", "Request", "Sequence", "Status", "TokenEvent"]

Status = Literal["waiting", "running", "finished"]
Finish = Literal["stop", "length", "context_full", "abort", "error"]
"""stop: a stop id or string. length: max_tokens. context_full: no position left. abort: the caller. error: see the event."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to continue it; immutable. Raises ConfigError when it has no id or no token.

    `stop_ids` are the model's own, added to those of `params`. Cached prefixes are shared only between requests with the same
    `adapter` and `salt`: a server gives each tenant its own salt, so that nobody learns from timing what others asked.
    Prompt logprobs begin with those after the prompt's `score_from`-th token: what stands before may come from the cache.
    With `logits`, events carry what their token was chosen from.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()
    adapter: str | None = None
    salt: str = ""
    score_from: int = 0
    logits: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        object.__setattr__(self, "stop_ids", frozenset(self.stop_ids))
        if not self.id:
            raise ConfigError("a request needs an id that is not empty")
        if not self.prompt:
            raise ConfigError(f"request {self.id!r}: the prompt has no tokens: give at least the beginning-of-text id")

    @property
    def width(self) -> int:
        """The most continuations that run at once: n, best_of or beams."""
        return max(self.params.candidates, self.params.beams)

    @property
    def stops(self) -> frozenset[int]:
        """Ids that end a continuation."""
        return frozenset() if self.params.ignore_stop_ids else self.stop_ids | self.params.stop_ids


class Sequence:
    """One continuation of a request, its `index`-th. Changed by the scheduler only, except `drafts`, `scored` and `state`.

    `tokens` are prompt and reply; the keys and values of the first `computed` lie in `blocks`. `drafts` are guesses of the next
    tokens: set before a plan, checked in that step, then gone. `first` is the position of the first token, behind the virtual
    ones of its adapter, which count nowhere else; `room` is the most tokens that it may have. `scored` counts the prompt tokens
    whose logits were seen, for requests that want prompt logprobs. `state` is the engine's (sampler, text).
    """

    __slots__ = (
        "blocks",
        "cached_tokens",
        "children",
        "computed",
        "digests",
        "drafts",
        "finish",
        "first",
        "index",
        "order",
        "preemptions",
        "request",
        "room",
        "scored",
        "state",
        "status",
        "tokens",
    )

    def __init__(self, request: Request, index: int, order: tuple[int, int], *, first: int = 0, room: int = 0) -> None:
        self.request = request
        self.index = index
        self.first, self.room = first, room
        self.order = order
        """Arrival: lower is older, and goes first."""
        self.tokens: list[int] = list(request.prompt)
        self.computed = 0
        self.blocks: list[int] = []
        self.digests: list[bytes] = []
        """Digests of the full blocks at the head of `blocks`, see `herd.engine.blocks`."""
        self.children: list[Sequence] = []
        """Continuations that begin with this one's blocks when its prompt is in the cache."""
        self.status: Status = "waiting"
        self.finish: Finish | None = None
        self.cached_tokens: int | None = None
        """Prompt tokens that were found in the cache; None before the first step."""
        self.preemptions = 0
        self.drafts: tuple[int, ...] = ()
        self.scored = 0
        self.state: object = None

    def __repr__(self) -> str:
        where = f"{self.computed}/{len(self.tokens)}"
        return f"Sequence({self.request.id!r}, {self.index}, {self.status}, {where} computed, blocks {self.blocks})"

    @property
    def position(self) -> int:
        """Where the next key and value go."""
        return self.first + self.computed

    def ids(self, start: int, stop: int) -> list[int]:
        """What stands at positions `start` .. `stop`: VIRTUAL before the first token."""
        first = self.first
        if not first:
            return self.tokens[start:stop]
        virtual = max(0, min(stop, first) - start)
        return [VIRTUAL] * virtual + self.tokens[max(0, start - first) : max(0, stop - first)]

    @property
    def made(self) -> int:
        """Tokens of the reply so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def reply(self) -> list[int]:
        """The reply so far."""
        return self.tokens[len(self.request.prompt) :]

    def ending(self) -> Finish | None:
        """Whether the last token of a reply ends it, and why."""
        params = self.request.params
        if self.tokens[-1] in self.request.stops and self.made > params.min_tokens:
            return "stop"
        if params.max_tokens is not None and self.made >= params.max_tokens:
            return "length"
        return "context_full" if len(self.tokens) >= self.room else None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token of one continuation, its end, or both. The stop id is told like any other token.

    `logprob` and `top_logprobs` (id -> log-probability) are there when asked for. `error` says what went wrong when `finish` is
    "error", `kind` is the name of its class. `cached_tokens` of the prompt were not computed. `prompt_logprobs` come with the
    first event when they were asked for: (id, log-probability, likeliest ones) of each prompt token from the second, or from
    where scoring began.
    `logits` [V] are a float32 array, when they were asked for.
    """

    request_id: str
    index: int
    token: int | None = None
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = field(default=None)
    finish: Finish | None = None
    error: str | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[tuple[int, float, dict[int, float]]] | None = None
    logits: Any = None
    kind: str | None = None

    @classmethod
    def end(cls, sequence: Sequence, error: str | None = None, kind: str | None = None) -> TokenEvent:
        """The last word of a continuation that has ended without another token."""
        cached = sequence.cached_tokens or 0
        return cls(
            sequence.request.id, sequence.index, finish=sequence.finish, error=error, cached_tokens=cached, kind=kind
        )
