"""Several replies to one prompt on their way to a reader: deltas, tokens and ends of each choice, step by step. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from herd.chat.format import Delta
from herd.chat.model import FinishReason, Usage
from herd.engine.completion import TokenLogprob
from herd.engine.reply import ReplyBuilder
from herd.engine.request import Request, TokenEvent
from herd.errors import kind_named

__all__ = ["ChoiceReader", "ChoiceStep", "ChoicesSink"]


@dataclass(frozen=True, slots=True)
class ChoiceStep:
    """What choice `index` gained: deltas, and with logprobs its tokens so far that no step has told (stop ids are not told).

    With `finish` it has ended: `made` tokens, stop ids included; `stop` is the stop string that was met.
    """

    index: int
    deltas: tuple[Delta, ...] = ()
    tokens: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    stop: str | None = None
    made: int = 0


class ChoiceReader(Protocol):
    """Who hears of it, in the engine's thread: be quick, and wait for nobody."""

    def scored(self, tokens: Sequence[TokenLogprob | None]) -> None:
        """The prompt's log-probabilities, before the first step; None for its first token."""
        ...

    def step(self, step: ChoiceStep) -> None:
        """More of a choice."""
        ...

    def finished(self, usage: Usage) -> None:
        """Every choice has ended. The last call."""
        ...

    def failed(self, error: BaseException) -> None:
        """The request came to nothing. The last call."""
        ...


class ChoicesSink:
    """A `herd.engine.loop.Sink` over one builder for each continuation.

    With `best_of`, nothing is told before all have ended; then the n likeliest by mean log-probability, as choices 0 to n - 1.
    `bytes_of` gives the bytes of an id: tokens behind a stop string are not told.
    """

    def __init__(
        self,
        request: Request,
        builders: Sequence[ReplyBuilder],
        reader: ChoiceReader,
        bytes_of: Callable[[int], bytes],
    ) -> None:
        assert len(builders) == request.width
        self._request, self._reader = request, reader
        wanted = request.params.logprobs is not None
        self._choices = [_Choice(i, builder, wanted, bytes_of) for i, builder in enumerate(builders)]
        self._keep = request.params.n if request.params.candidates > request.params.n else None
        self._left = len(builders)
        self._over = self._scored = False
        self._began = time.perf_counter()
        self._first: float | None = None
        self._cached = 0

    def push(self, event: TokenEvent) -> bool:
        """As `Sink.push`."""
        if self._over:
            return False
        choice = self._choices[event.index]
        if event.index == 0:
            self._cached = max(self._cached, event.cached_tokens)
        if event.prompt_logprobs is not None and not self._scored:
            self._scored = True
            self._reader.scored([None, *(TokenLogprob(*one) for one in event.prompt_logprobs)])
        if event.token is not None and not choice.done:
            if self._first is None:
                self._first = time.perf_counter()
            self._tell(choice, choice.push(event, self._request.stops))
        if event.finish is not None and not choice.over:
            if event.finish == "error":
                self.fail(kind_named(event.kind)(event.error or "the request failed"))
                return False
            self._tell(choice, choice.end(event.finish))
            self._left -= 1
            if not self._left:
                self._end()
        return choice.done

    def fail(self, error: BaseException) -> None:
        """As `Sink.fail`."""
        if not self._over:
            self._over = True
            self._reader.failed(error)

    def _tell(self, choice: _Choice, step: ChoiceStep | None) -> None:
        if step is None:
            return
        if self._keep is None:
            self._reader.step(step)
        else:
            choice.held.append(step)

    def _end(self) -> None:
        self._over = True
        if self._keep is not None:
            best = sorted(self._choices, key=lambda one: -one.mean)[: self._keep]
            for index, choice in enumerate(best):
                for s in choice.held:
                    self._reader.step(ChoiceStep(index, s.deltas, s.tokens, s.finish, s.stop, s.made))
        now = time.perf_counter()
        first = now if self._first is None else self._first
        made = sum(len(choice.builder.tokens) for choice in self._choices)
        prompt = len(self._request.prompt)
        self._reader.finished(Usage(prompt, made, self._cached, first - self._began, now - first if made else 0.0))


class _Choice:
    """One continuation while it grows."""

    def __init__(self, index: int, builder: ReplyBuilder, wanted: bool, bytes_of: Callable[[int], bytes]) -> None:
        self.index, self.builder = index, builder
        self.over = False
        self.held: list[ChoiceStep] = []
        self._wanted, self._bytes_of = wanted, bytes_of
        self._untold: list[tuple[int, TokenLogprob]] = []
        """Tokens that no step has told, and how many bytes of the text were before them."""
        self._written = self._shown = 0
        self._sum = 0.0

    @property
    def done(self) -> bool:
        return self.builder.done

    @property
    def mean(self) -> float:
        """Mean log-probability of its tokens."""
        return self._sum / max(1, len(self.builder.tokens))

    def push(self, event: TokenEvent, stops: frozenset[int]) -> ChoiceStep | None:
        assert event.token is not None
        if event.logprob is not None:
            self._sum += event.logprob
            if self._wanted and event.token not in stops:
                self._untold.append((self._written, TokenLogprob(event.token, event.logprob, event.top_logprobs or {})))
                self._written += len(self._bytes_of(event.token))
        deltas = tuple(self.builder.push(event.token))
        return self._step(deltas) if deltas or self.done else None

    def end(self, finish: str) -> ChoiceStep:
        builder = self.builder
        deltas = tuple(builder.close())
        self.over = True
        step = self._step(deltas)
        reason = "stop" if builder.ended else finish
        assert reason in ("stop", "length", "context_full", "abort")
        return ChoiceStep(self.index, step.deltas, step.tokens, reason, builder.stop, len(builder.tokens))

    def _step(self, deltas: tuple[Delta, ...]) -> ChoiceStep:
        self._shown += sum(len(delta.text.encode()) for delta in deltas if delta.text is not None)
        cut = self.builder.stop is not None
        told = [token for at, token in self._untold if not cut or at < self._shown]
        self._untold = []
        return ChoiceStep(self.index, deltas, tuple(told))
