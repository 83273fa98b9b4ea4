"""What came of a prompt: texts, ids and log-probabilities, collected from the events of an engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from herd.chat.params import SamplingParams
from herd.engine.request import Finish, Request, TokenEvent
from herd.engine.stop import StopMatcher
from herd.tokenizer.stream import Detokenizer
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Collector", "Completion", "Output", "TokenLogprob"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token, its log-probability (nats) under the model alone, and those of the likeliest ones (id -> nats)."""

    token: int
    logprob: float
    top: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Output:
    """One continuation. `tokens` hold the stop id, `text` does not; it ends before a stop string.

    `logprobs` and `cumulative_logprob` are there when they were asked for; `error` says why when `finish_reason` is "error".
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: Finish
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its continuations. `prompt` is None when ids were given; `prompt_logprobs` has None for the first id.

    `cached_tokens` of the prompt were found in the prefix cache.
    """

    id: str
    prompt: str | None
    prompt_tokens: list[int]
    outputs: list[Output]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The text of the first (with `best_of` or `beams`: the best) continuation."""
        return self.outputs[0].text

    @property
    def error(self) -> str | None:
        """Why this prompt was not continued, if it was not."""
        return next((output.error for output in self.outputs if output.error is not None), None)


class Collector:
    """Events of one request in, its Completion out.

    `push` says whether a continuation is complete although the engine does not know it: a stop string was met.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, prompt: str | None) -> None:
        self.request, self.prompt = request, prompt
        self._parts = [_Part(tokenizer, request.params) for _ in range(request.width)]
        self._left = request.width
        self._cached = 0
        self._prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def done(self) -> bool:
        """Whether every continuation has ended."""
        return self._left == 0

    def push(self, event: TokenEvent) -> bool:
        """Take one event of this request, in order."""
        part = self._parts[event.index]
        if event.index == 0:
            self._cached = event.cached_tokens
        if event.prompt_logprobs is not None:
            self._prompt_logprobs = [None, *(TokenLogprob(*one) for one in event.prompt_logprobs)]
        if event.token is not None and part.finish is None:
            part.push(event)
        if event.finish is not None and not part.ended:
            part.close(event.finish, event.error)
            self._left -= 1
        return part.matched and not part.ended

    def completion(self) -> Completion:
        """What there is; the n best by mean log-probability when there are more than n."""
        params = self.request.params
        outputs = [part.output(index, params.logprobs is not None) for index, part in enumerate(self._parts)]
        if params.candidates > params.n:
            outputs.sort(key=lambda one: -(one.cumulative_logprob or 0.0) / max(1, len(one.tokens)))
            outputs = outputs[: params.n]
        return Completion(
            self.request.id,
            self.prompt,
            list(self.request.prompt),
            outputs,
            self._prompt_logprobs,
            self._cached,
        )


class _Part:
    """One continuation while it grows."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.ended = False
        self._detokenizer = Detokenizer(tokenizer, follows_text=True)
        self._matcher = StopMatcher(params.stop)
        self._free = params.min_tokens
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._error: str | None = None

    @property
    def matched(self) -> bool:
        return self._matcher.matched

    def push(self, event: TokenEvent) -> None:
        assert event.token is not None
        if self.matched:
            return
        self.tokens.append(event.token)
        if event.logprob is not None:
            self._logprobs.append(TokenLogprob(event.token, event.logprob, event.top_logprobs or {}))
        text = self._detokenizer.push(event.token)
        self._text.append(text if len(self.tokens) <= self._free else self._matcher.push(text))

    def close(self, finish: Finish, error: str | None) -> None:
        self.ended, self.finish, self._error = True, finish, error
        if not self.matched:
            self._text += [self._matcher.push(self._detokenizer.flush()), self._matcher.flush()]
        if self.matched and finish in ("length", "context_full"):
            self.finish = "stop"

    def output(self, index: int, with_logprobs: bool) -> Output:
        assert self.finish is not None
        total = sum(one.logprob for one in self._logprobs) if self._logprobs else None
        logprobs = list(self._logprobs) if with_logprobs else None
        return Output(index, "".join(self._text), self.tokens, self.finish, logprobs, total, self._error)
