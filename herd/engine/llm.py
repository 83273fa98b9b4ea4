"""`herd.LLM`: a model opened for many prompts at once: texts, chats, streams and scores, from any thread or event loop."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import queue
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from herd.adapters.lora import LoraAdapter
from herd.chat.base import BaseFormat
from herd.chat.format import ChatFormat, Delta, ToolSpec
from herd.chat.formats import detect, format_named
from herd.chat.messages import Message
from herd.chat.model import Reply, Score
from herd.chat.params import SamplingParams
from herd.chat.render import messages_from
from herd.chat.toolspec import tools_from
from herd.checkpoint.load import Checkpoint, read_checkpoint
from herd.checkpoint.open import open_store
from herd.checkpoint.placement import device_named, dtype_named
from herd.checkpoint.resolve import resolve
from herd.checkpoint.store import GenerationDefaults
from herd.engine.adapters import LoadedAdapter
from herd.engine.beam import Beam, beam_search
from herd.engine.budget import Budget, budget_for, free_on
from herd.engine.completion import Collector, Completion, Output
from herd.engine.config import SMALL, EngineConfig
from herd.engine.draft_model import ModelDrafter, check_vocabularies
from herd.engine.engine import Engine, Stats
from herd.engine.grammar import Grammars
from herd.engine.loop import Loop
from herd.engine.ngram import NgramDrafter
from herd.engine.prompt_cache import fingerprint, load_prompt, save_prompt
from herd.engine.reply import ReplyBuilder
from herd.engine.request import Finish, Request
from herd.engine.sinks import CompletionSink, LogitsSink, ReplySink
from herd.engine.speculate import Drafter
from herd.errors import ConfigError, HerdError, PromptError
from herd.model.accounting import parameters
from herd.model.llama import Llama
from herd.quant.linear import QuantLinear
from herd.tokenizer.stream import Detokenizer
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["LLM", "AsyncReplyStream", "Pending", "ReplyStream"]

Prompt = str | Sequence[int]
"""A text to go on with (one BOS is put before it), or ids as they are."""
Conversation = Sequence[Message | Mapping[str, Any]]


class LLM:
    """One model for many requests at once: continuous batching over a paged cache that remembers what prompts begin with.

    `model` is a name, a folder or a file, or an opened checkpoint, or (model, tokenizer). `weights`, `dtype` and `device` say
    how one is loaded (see `herd.load`); `format` names a prompt format instead of the model's own. `kv` is the dtype of keys
    and values, `memory` their bytes (or a text such as "4 GiB"; default: a part of what is free, see `budget`), `max_len` the
    most tokens of one request, `max_seqs` the most replies that grow at once, `step_tokens` the most tokens computed in one
    step. `deterministic`: a request's tokens and numbers are the same bits alone and in any company. `seed` is where requests
    without one get theirs; None draws fresh ones. `draft` guesses tokens ahead, which changes the speed and no distribution:
    "lookup" looks in the text so far, any other name is a smaller model of the same vocabulary, or it is a drafter
    (`herd.engine.speculate`).

    `load_adapter` adds a LoRA adapter, which requests choose with `adapter=` (its name).

    Without `params`, requests use the sampling defaults of the checkpoint. Methods may be called from any thread, their
    `a...` twins from any event loop. Use it in a `with`, or `close` it: its thread ends then.

    Raises HerdError when the model cannot be opened or the limits do not fit.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Checkpoint | tuple[Llama, Tokenizer],
        *,
        weights: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device = "auto",
        format: str | ChatFormat | None = None,
        kv: str = "auto",
        max_len: int | None = None,
        memory: int | str | None = None,
        max_seqs: int = 16,
        step_tokens: int = 512,
        prefix_cache: bool = True,
        deterministic: bool = False,
        seed: int | None = 0,
        draft: str | os.PathLike[str] | Drafter | None = None,
        debug: bool = False,
    ) -> None:
        self.model, self.tokenizer, self._defaults = _opened(model, weights, dtype, device)
        self._format = format_named(format, self.tokenizer) if isinstance(format, str) else format
        self._base = BaseFormat(self.tokenizer)
        where = self.model.norm.weight.device
        self.budget: Budget = budget_for(
            self.model.config,
            kv=_kv_for(self.model) if kv == "auto" else kv,
            free=free_on(where),
            kind="cpu" if where.type == "cpu" else "gpu",
            max_len=max_len,
            max_seqs=max_seqs,
            max_tokens=step_tokens,
            memory=memory,
        )
        config = EngineConfig(
            blocks=self.budget.blocks,
            block_size=self.budget.block_size,
            kv=self.budget.kv,
            max_len=self.budget.max_len,
            max_seqs=max_seqs,
            max_tokens=max(step_tokens, max_seqs),
            prefix_cache=prefix_cache,
            deterministic=deterministic,
            seed=seed,
            debug=debug,
        )
        grammars = Grammars(self.tokenizer, vocab_size=self.model.config.vocab_size)
        self._engine = Engine(
            self.model, config, drafter=_drafter(draft, self.tokenizer, where, deterministic), grammars=grammars
        )
        self._loop = Loop(self._engine)
        self._numbers = itertools.count()
        self._searches = ThreadPoolExecutor(max_seqs, "herd-beams")
        self._given_up: set[str] = set()
        """Beam searches that nobody waits for any more."""
        # The thread knows the loop and not this object, so one that is dropped or outlives the program is closed, too.
        self._closed = weakref.finalize(self, self._loop.close)

    @property
    def format(self) -> ChatFormat:
        """The prompt format. Raises PromptError when the checkpoint has none (a base model)."""
        if self._format is None:
            self._format = detect(self.tokenizer)
        return self._format

    @property
    def max_len(self) -> int:
        """The most tokens of one request, prompt and reply together."""
        return self.budget.max_len

    def params(self, **chosen: Any) -> SamplingParams:
        """The checkpoint's own sampling defaults with `chosen` fields over them. Raises ConfigError."""
        return self._defaults.params(**chosen)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        errors: Literal["raise", "keep"] = "raise",
        on_done: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """Continue every prompt; completions in the order of the prompts. `params` are for all, or one for each.

        Prompts that can never fit are refused before any work. A request that fails later raises HerdError when all have
        ended, or with `errors="keep"` has the finish reason "error". `on_done` is called as each prompt is done, in the
        engine's thread. An interrupt ends all of them.
        """
        requests = self._requests(prompts, params, adapter)
        futures = self._submit(requests, on_done)
        try:
            done = [future.result() for future in futures]
        except BaseException:
            self._abort(requests)
            raise
        return _checked(done, errors)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        errors: Literal["raise", "keep"] = "raise",
    ) -> list[Completion]:
        """As `generate`. Cancelling ends the requests."""
        requests = self._requests(prompts, params, adapter)
        futures = self._submit(requests, None)
        try:
            done = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        except BaseException:
            self._abort(requests)
            raise
        return _checked(done, errors)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[ToolSpec | Any] = (),
        adapter: str | None = None,
    ) -> Any:
        """The reply to a conversation, or the replies to several, each in the model's prompt format.

        Messages may be plain dictionaries and tools Python functions, see `herd.render`. Raises PromptError or
        ContextFullError before any work, HerdError when a request failed.
        """
        several, streams = self._chats(messages, params, tools, adapter)
        try:
            replies = [stream.wait() for stream in streams]
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return replies if several else replies[0]

    async def achat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[ToolSpec | Any] = (),
        adapter: str | None = None,
    ) -> Any:
        """As `chat`. Cancelling ends the requests."""
        several, streams = self._chats(messages, params, tools, adapter)
        try:
            replies = await asyncio.gather(*(asyncio.wrap_future(stream.future) for stream in streams))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return replies if several else replies[0]

    def submit(
        self,
        prompt: Prompt | Conversation,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[ToolSpec | Any] = (),
        adapter: str | None = None,
    ) -> Pending:
        """Begin a reply and do not wait for it. A list of messages is a conversation; a text or ids are gone on with.

        Raises PromptError, ConfigError or ContextFullError before any work.
        """
        return self._start(*self._prepared(prompt, params, tools_from(tools), "the prompt", adapter))

    def stream(
        self,
        prompt: Prompt | Conversation,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[ToolSpec | Any] = (),
        adapter: str | None = None,
    ) -> ReplyStream:
        """The reply as it is made: an iterator of deltas, whose `reply` is the whole when it has ended.

        Leaving it early, or `close`, ends the request. Raises what `submit` raises.
        """
        found: queue.SimpleQueue[Delta | None] = queue.SimpleQueue()
        return ReplyStream(self._stream(prompt, params, tools, adapter, found.put), found)

    def astream(
        self,
        prompt: Prompt | Conversation,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[ToolSpec | Any] = (),
        adapter: str | None = None,
    ) -> AsyncReplyStream:
        """As `stream`, for `async for`; call it inside a running event loop."""
        loop = asyncio.get_running_loop()
        found: asyncio.Queue[Delta | None] = asyncio.Queue()

        def put(delta: Delta | None) -> None:
            loop.call_soon_threadsafe(found.put_nowait, delta)

        return AsyncReplyStream(self._stream(prompt, params, tools, adapter, put), found)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """How likely each continuation is after its context: sums of log-probabilities of (context, continuation) pairs.

        The pair is tokenized as one text, so white space between the two belongs to the continuation's tokens. Contexts that
        are the same are computed once. Raises ContextFullError when a pair does not fit, PromptError for an empty continuation.
        """
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        requests = []
        for number, (context, continuation) in enumerate(pairs):
            ids, start = self._joined(context, continuation, number)
            requests.append(self._request(ids, params, frozenset(), f"pair {number}", score_from=start - 1))
        found: dict[int, Completion] = {}
        for together in _rounds([context for context, _ in pairs], self.budget.seqs):
            chosen = [(requests[i], None) for i in together]
            futures = self._submit(chosen, None)
            try:
                found.update(zip(together, [future.result() for future in futures], strict=True))
            except BaseException:
                self._abort(chosen)
                raise
        return [_score(one) for one in _checked([found[i] for i in range(len(pairs))], "raise")]

    loglikelihood = score
    """The name of `herd.chat.model.Scorer`."""

    def load_adapter(self, name: str, source: str | os.PathLike[str] | LoraAdapter) -> LoadedAdapter:
        """Add a LoRA adapter (a PEFT folder or a GGUF file) while others run; requests choose it with `adapter=name`.

        Raises CheckpointError or ConfigError with the reason when it does not fit this model.
        """
        return self._engine.load_adapter(name, source)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises ConfigError when there is none, or requests with it have not ended."""
        self._engine.unload_adapter(name)

    @property
    def adapters(self) -> tuple[LoadedAdapter, ...]:
        """Those that requests can choose."""
        return self._engine.adapters.loaded

    def save_prompt(
        self, path: str | os.PathLike[str], prompt: Prompt | Conversation, *, overwrite: bool = False
    ) -> int:
        """Read `prompt` (what prompts begin with: a text, ids, or messages such as a long system prompt) and keep it in a file.

        `load_prompt` has it at once in another run. Returns how many of its tokens the file has: whole blocks only. Raises
        ConfigError when it is shorter than a block or the prefix cache is off, CheckpointError when `path` cannot be written.
        """
        if isinstance(prompt, str):
            ids: Sequence[int] = self._base.complete(prompt).tokens
        elif prompt and isinstance(prompt[0], int):
            ids = prompt  # type: ignore[assignment]
        else:
            ids = self.format.render(messages_from(prompt), generate=False).tokens  # type: ignore[arg-type]
        self.generate([ids], SamplingParams(temperature=0, max_tokens=1))
        cache, pool, mark = self._engine.cache, self._engine.pool, fingerprint(self.model)
        return self._loop.between(lambda: save_prompt(path, ids, cache, pool, mark, overwrite=overwrite))

    def load_prompt(self, path: str | os.PathLike[str]) -> int:
        """Put a prompt of `save_prompt` into the cache; requests that begin with it do not compute it. Returns its tokens.

        Raises CheckpointError for a file of another model, other weights or another dtype of keys and values.
        """
        cache, pool, mark = self._engine.cache, self._engine.pool, fingerprint(self.model)
        return len(self._loop.between(lambda: load_prompt(path, cache, pool, mark)))

    def stats(self) -> Stats:
        """What the engine does and has done: requests, blocks, prefix hits, tokens per second."""
        return self._engine.stats()

    def close(self) -> None:
        """End all requests and the engine's thread. Calling it again does nothing."""
        self._closed()
        self._searches.shutdown(wait=False, cancel_futures=True)

    def __repr__(self) -> str:
        return f"LLM({self.budget.sentence()})"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        adapter: str | None,
    ) -> list[tuple[Request, str | None]]:
        """Checked requests with their texts, before any is queued."""
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            prompts = [prompts]  # type: ignore[list-item]
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.params()] * len(prompts)
        if len(params) != len(prompts):
            raise ConfigError(
                f"{len(params)} sampling parameters were given for {len(prompts)} prompts: give one, or as many"
            )
        out = []
        for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            text = prompt if isinstance(prompt, str) else None
            ids = self._base.complete(text).tokens if text is not None else prompt
            what = f"prompt {number}"
            if one.beams == 1:
                out.append((self._request(ids, one, self._base.stop_ids, what, adapter=adapter), text))
                continue
            if one.prompt_logprobs is not None:
                raise ConfigError(f"{what}: beam search tells no prompt_logprobs: leave them out, or beams")
            single = replace(one, beams=1, n=1, length_penalty=1.0)
            request = self._request(ids, single, self._base.stop_ids, what, adapter=adapter)
            out.append((replace(request, params=one), text))
        return out

    def _request(
        self,
        ids: Any,
        params: SamplingParams,
        stop_ids: frozenset[int],
        what: str,
        *,
        adapter: str | None = None,
        score_from: int = 0,
    ) -> Request:
        """A request that the engine will take; errors call it `what`."""
        if not isinstance(ids, Sequence) or not all(isinstance(i, int) for i in ids):
            raise PromptError(f"{what} is not a text or a list of token ids")
        request = Request(what, tuple(ids), params, stop_ids, adapter, score_from=score_from)
        self._engine.check(request)
        return replace(request, id=f"{what} #{next(self._numbers)}")

    def _submit(
        self, requests: Sequence[tuple[Request, str | None]], on_done: Callable[[Completion], None] | None
    ) -> list[Future[Completion]]:
        futures = []
        try:
            for request, text in requests:
                if request.params.beams > 1:
                    futures.append(self._searches.submit(self._search, request, text, on_done))
                    continue
                sink = CompletionSink(Collector(request, self.tokenizer, text), on_done)
                self._loop.submit(request, sink)
                futures.append(sink.future)
        except BaseException:
            self._abort(requests)
            raise
        return futures

    def _abort(self, requests: Sequence[tuple[Request, str | None]]) -> None:
        for request, _ in requests:
            if request.params.beams > 1:
                self._given_up.add(request.id)
            else:
                self._loop.abort(request.id)

    def _search(self, request: Request, text: str | None, on_done: Callable[[Completion], None] | None) -> Completion:
        """A beam search: every step asks the engine for the likeliest next ids of all its prefixes, which it has cached."""
        params, room = request.params, self.max_len - len(request.prompt)
        one = SamplingParams(temperature=0, max_tokens=1, ignore_stop_ids=True)

        def step(prefixes: list[tuple[int, ...]]) -> NDArray[np.float32]:
            if request.id in self._given_up:
                raise HerdError("the search was given up")
            sinks = []
            for prefix in prefixes:
                id, prompt = f"{request.id}.{next(self._numbers)}", (*request.prompt, *prefix)
                sinks.append(LogitsSink())
                self._loop.submit(replace(request, id=id, prompt=prompt, params=one, logits=True), sinks[-1])
            return np.stack([sink.future.result() for sink in sinks])

        most = room if params.max_tokens is None else min(room, params.max_tokens)
        try:
            outputs = [
                Output(i, self._text(b.tokens), list(b.tokens), self._finish(b, params), None, b.logprob)
                for i, b in enumerate(beam_search(step, params, request.stops, most))
            ]
        except HerdError as error:
            outputs = [Output(0, "", [], "error", error=str(error))]
        finally:
            self._given_up.discard(request.id)
        completion = Completion(request.id, text, list(request.prompt), outputs)
        if on_done is not None:
            on_done(completion)
        return completion

    def _finish(self, beam: Beam, params: SamplingParams) -> Finish:
        if beam.finish == "stop":
            return "stop"
        return "length" if len(beam.tokens) == params.max_tokens else "context_full"

    def _text(self, tokens: Sequence[int]) -> str:
        detokenizer = Detokenizer(self.tokenizer, follows_text=True)
        return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()

    def _chats(
        self, messages: Any, params: SamplingParams | None, tools: Any, adapter: str | None
    ) -> tuple[bool, list[Pending]]:
        """Whether several conversations were given, and each of them begun."""
        several = len(messages) > 0 and not isinstance(messages, Mapping) and _is_conversation(messages[0])
        specs = tools_from(tools)
        prepared = [
            self._prepared(one, params, specs, f"conversation {i}" if several else "the conversation", adapter)
            for i, one in enumerate(messages if several else [messages])
        ]
        started: list[Pending] = []
        try:
            for request, sink in prepared:
                started.append(self._start(request, sink))
        except BaseException:
            for one in started:
                one.close()
            raise
        return several, started

    def _stream(
        self,
        prompt: Any,
        params: SamplingParams | None,
        tools: Any,
        adapter: str | None,
        put: Callable[[Delta | None], None],
    ) -> Pending:
        return self._start(*self._prepared(prompt, params, tools_from(tools), "the prompt", adapter, put))

    def _prepared(
        self,
        prompt: Any,
        params: SamplingParams | None,
        tools: Sequence[ToolSpec],
        what: str,
        adapter: str | None,
        put: Callable[[Delta | None], None] | None = None,
    ) -> tuple[Request, ReplySink]:
        """One reply to be made of a text, ids or a conversation."""
        params = params or self.params()
        if params.candidates > 1 or params.beams > 1:
            raise ConfigError("a chat or stream has one reply: leave n, best_of and beams out, or use generate")
        if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int)):
            if tools:
                raise PromptError("plain text is continued as it is, without tools: give a list of messages instead")
            stop_ids, parser, notes = self._base.stop_ids, self._base.parser(), ()
            ids = self._base.complete(prompt).tokens if isinstance(prompt, str) else prompt
        else:
            rendered = self.format.render(messages_from(prompt), tools, generate=True)
            stop_ids, parser, notes = self.format.stop_ids, self.format.parser(tools), rendered.notes
            ids = rendered.tokens
        request = self._request(ids, params, stop_ids, what, adapter=adapter)
        return request, ReplySink(request, ReplyBuilder(parser, params, stop_ids), notes, put)

    def _start(self, request: Request, sink: ReplySink) -> Pending:
        self._loop.submit(request, sink)
        return Pending(request.id, sink.future, self._loop)

    def _joined(self, context: str, continuation: str, number: int) -> tuple[list[int], int]:
        """Ids of both texts as one, and where the continuation begins."""
        whole = self._base.complete(context + continuation).tokens
        before = self._base.complete(context).tokens
        start = 0
        while start < min(len(before), len(whole)) and before[start] == whole[start]:
            start += 1
        if not continuation or start == len(whole):
            raise PromptError(f"pair {number}: the continuation is empty, so there is nothing to score")
        return whole, max(1, start)


class Pending:
    """A reply on its way: `future` gets it, `close` ends it early."""

    def __init__(self, id: str, future: Future[Reply], loop: Loop) -> None:
        self.id, self.future, self._loop = id, future, loop

    def wait(self) -> Reply:
        """The reply, when it is there."""
        return self.future.result()

    def close(self) -> None:
        """End it, if it has not ended."""
        if not self.future.done():
            self._loop.abort(self.id)


class ReplyStream:
    """Deltas of one reply; `reply` when they have ended. Also a context manager that ends the request when it is left."""

    def __init__(self, started: Pending, found: queue.SimpleQueue[Delta | None]) -> None:
        self._started, self._found = started, found
        self._over = False

    @property
    def reply(self) -> Reply:
        """The whole reply; waits for its end. Raises HerdError when the request failed."""
        return self._started.wait()

    def close(self) -> None:
        """End the request; `reply` then holds what there was."""
        self._started.close()

    def __iter__(self) -> ReplyStream:
        return self

    def __next__(self) -> Delta:
        if self._over:
            raise StopIteration
        delta = self._found.get()
        if delta is None:
            self._over = True
            self._started.wait()  # raises what went wrong
            raise StopIteration
        return delta

    def __enter__(self) -> ReplyStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncReplyStream:
    """The same for `async for`. `await stream.reply()` gives the whole; cancelling or `aclose` ends the request."""

    def __init__(self, started: Pending, found: asyncio.Queue[Delta | None]) -> None:
        self._started, self._found = started, found
        self._over = False

    async def reply(self) -> Reply:
        """The whole reply; waits for its end. Raises HerdError when the request failed."""
        return await asyncio.wrap_future(self._started.future)

    async def aclose(self) -> None:
        """End the request; `reply` then holds what there was."""
        self._started.close()

    def __aiter__(self) -> AsyncReplyStream:
        return self

    async def __anext__(self) -> Delta:
        if self._over:
            raise StopAsyncIteration
        try:
            delta = await self._found.get()
        except BaseException:
            self._started.close()
            raise
        if delta is None:
            self._over = True
            self._started.wait()  # there already: raises what went wrong
            raise StopAsyncIteration
        return delta

    async def __aenter__(self) -> AsyncReplyStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._started.close()

    def __del__(self) -> None:
        self._started.close()


def _opened(
    model: Any, weights: str | None, dtype: str | torch.dtype | None, device: str | torch.device
) -> tuple[Llama, Tokenizer, GenerationDefaults]:
    """The model, its tokenizer and its sampling defaults."""
    if isinstance(model, str | os.PathLike):
        where = device_named(device)
        path = resolve(model)
        store = open_store(path)  # headers only: how large the model is decides how it is loaded
        small = where.type == "cpu" and weights in (None, "auto") and parameters(store.config) <= SMALL
        wanted = dtype_named(dtype, torch.float32 if small else None)
        model = read_checkpoint(path, store, wanted, where, weights=weights or "auto")
    elif weights is not None or dtype is not None:
        raise ConfigError(
            "weights and dtype say how a model is loaded, and this one is: leave them out, or give its name"
        )
    if isinstance(model, Checkpoint):
        return model.model, model.tokenizer, model.defaults
    llama, tokenizer = model
    return llama, tokenizer, GenerationDefaults()


def _drafter(draft: Any, tokenizer: Tokenizer, device: torch.device, deterministic: bool) -> Drafter | None:
    """What guesses for a model of `tokenizer`. Raises ConfigError when a draft model has another vocabulary."""
    if draft == "lookup":
        return NgramDrafter()
    if draft is None or not isinstance(draft, str | os.PathLike):
        return draft
    model, other, _ = _opened(draft, None, None, device)
    check_vocabularies(tokenizer, other)
    return ModelDrafter(model, same_tokens=deterministic)


def _kv_for(model: Llama) -> str:
    """Keys and values like the activations; beside quantized weights in half of that, which nobody can tell."""
    dtype = model.norm.weight.dtype
    if model.norm.weight.device.type == "cpu" and any(isinstance(m, QuantLinear) for m in model.modules()):
        return "float16"
    return str(dtype).removeprefix("torch.")


def _is_conversation(item: Any) -> bool:
    """Whether an item of a list is a conversation of its own, and not a message."""
    if isinstance(item, Mapping):
        return "messages" in item
    return isinstance(item, Sequence) and not isinstance(item, str | Message)


def _checked(done: Sequence[Completion], errors: Literal["raise", "keep"]) -> list[Completion]:
    failed = next((one for one in done if one.error is not None), None)
    if failed is not None and errors == "raise":
        count = sum(one.error is not None for one in done)
        more = f" ({count} of {len(done)} requests failed)" if len(done) > 1 else ""
        raise HerdError(f"{failed.error}{more}")
    return list(done)


def _rounds(contexts: Sequence[str], width: int) -> Iterator[list[int]]:
    """Which pairs are scored at the same time: of each context the first, so that the others find it in the cache, then those.

    `width` contexts at a time, in their order: the cache must not have forgotten them by then.
    """
    groups: dict[str, list[int]] = {}
    for i, context in enumerate(contexts):
        groups.setdefault(context, []).append(i)
    if len(groups) == len(contexts):
        yield list(range(len(contexts)))
        return
    every = list(groups.values())
    for first in range(0, len(every), width):
        part = every[first : first + width]
        yield [group[0] for group in part]
        if rest := [i for group in part for i in group[1:]]:
            yield rest


def _score(completion: Completion) -> Score:
    """The sum over the continuation's tokens."""
    scored = [one for one in completion.prompt_logprobs or () if one is not None]
    greedy = all(next(iter(one.top)) == one.token for one in scored)
    return Score(math.fsum(one.logprob for one in scored), len(scored), greedy)
