"""`herd.LLM`: a model opened for many prompts at once: texts, chats, streams and scores, from any thread or event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

from herd.adapters.lora import LoraAdapter
from herd.adapters.prefix import Virtual
from herd.chat.format import ChatFormat, Delta, ToolSpec
from herd.chat.formats import format_named
from herd.chat.model import Score
from herd.chat.params import Constraint, SamplingParams
from herd.checkpoint.adapter import read_adapter
from herd.checkpoint.load import Checkpoint
from herd.engine.adapted import Rows
from herd.engine.adapters import LoadedAdapter
from herd.engine.budget import Budget
from herd.engine.calls import Calls, checked
from herd.engine.completion import Completion
from herd.engine.config import EngineConfig
from herd.engine.embed import Pooling, check_lengths, embed, shortened
from herd.engine.engine import Engine, Stats
from herd.engine.grammar import Grammars
from herd.engine.intake import Conversation, Intake, Prompt
from herd.engine.loop import Loop, Sink
from herd.engine.opening import budget_of, drafter_for, made_of, opened, ranks_for
from herd.engine.prompt_cache import fingerprint, load_prompt, save_prompt
from herd.engine.ranks import Ranks
from herd.engine.request import Request
from herd.engine.scoring import joined, rounds, score_of
from herd.engine.searches import Searches
from herd.engine.speculate import Drafter
from herd.engine.streams import AsyncReplyStream, Pending, ReplyStream
from herd.errors import ConfigError
from herd.model.config import ModelConfig
from herd.model.llama import Llama
from herd.quant.apply import held
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["LLM", "AsyncReplyStream", "Pending", "ReplyStream"]

STEP_TOKENS = {"cpu": 512, "gpu": 2048}
"""The most tokens of a step where nobody says: a GPU is not filled by fewer."""


class LLM:
    """One model for many requests at once: continuous batching over a paged cache that remembers what prompts begin with.

    `model` is a name, a folder or a file, or an opened checkpoint, or (model, tokenizer). `weights`, `dtype` and `device` say
    how one is loaded (see `herd.load`); `format` names a prompt format instead of the model's own. `kv` is the dtype of keys
    and values, `memory` their bytes (or a text such as "4 GiB"; default: a part of what is free, see `budget`), `max_len` the
    most tokens of one request, `max_seqs` the most replies that grow at once, `step_tokens` the most tokens computed in one
    step (512; on a GPU 2,048). `deterministic`: a request's tokens and numbers are the same bits alone and in any company.
    `seed` is where requests without one get theirs; None draws fresh ones. `draft` guesses tokens ahead, which changes the
    speed and no distribution: "lookup" looks in the text so far, any other name is a smaller model of the same vocabulary, or
    it is a drafter (`herd.engine.speculate`). `tick(done, total)` hears of the bytes read.

    What `herd create` said of a model holds here, too: its parameters, format and context where none are given, its system prompt
    and turns before conversations, its adapter (by the model's name) for requests that name none. `created=False` leaves all
    but the parameters to the caller.

    `tensor_parallel` processes share the model: each has a part of every matrix, and the keys and values of its heads
    (docs/engine.md). This one has the scheduler and starts the others; on a CPU they divide cores and memory, on GPUs each has
    one. A process that dies ends the model: RanksError, see `lost`.

    On a GPU decode steps are recorded when they are first needed, or by `warm_up`, and replayed; `graphs=False` runs every step
    as it is (docs/gpu.md).

    `load_adapter` adds an adapter (LoRA, DoRA, prefix or prompt tuning), which requests choose with `adapter=` (its name).

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
        step_tokens: int | None = None,
        prefix_cache: bool = True,
        deterministic: bool = False,
        seed: int | None = 0,
        draft: str | os.PathLike[str] | Drafter | None = None,
        graphs: bool = True,
        debug: bool = False,
        tensor_parallel: int = 1,
        created: bool = True,
        tick: Callable[[int, int], None] | None = None,
    ) -> None:
        made = made_of(model, tensor_parallel) if created else None
        if made is not None:
            format, max_len = format or made.format, max_len or made.context
        self._ranks = ranks = ranks_for(tensor_parallel, model, device)
        with contextlib.ExitStack() as undo:
            if ranks is not None:
                undo.callback(ranks.close)
                device, graphs = ranks.device, False  # recordings have not been tried across GPUs
            self.model, self.tokenizer, self._defaults = opened(model, weights, dtype, device, tick, ranks)
            chosen = format_named(format, self.tokenizer) if isinstance(format, str) else format
            where = self.model.norm.weight.device
            if step_tokens is None:
                step_tokens = STEP_TOKENS["gpu" if where.type == "cuda" else "cpu"]
            self.budget: Budget = budget_of(
                self.model, ranks, kv, memory, max_len=max_len, max_seqs=max_seqs, max_tokens=step_tokens
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
                graphs=graphs,
                overlap=graphs,
            )
            grammars = Grammars(self.tokenizer, vocab_size=self.model.config.vocab_size)
            self._engine = Engine(
                self.model,
                config,
                runner=None if ranks is None else ranks.runner(self.model, config),
                drafter=drafter_for(draft, self.tokenizer, where, deterministic),
                grammars=grammars,
            )
            self._loop = Loop(self._engine)
            self._intake = Intake(self.tokenizer, self._defaults, chosen, self._engine.check, made)
            searches = Searches(self._loop, self.tokenizer, self._engine.room, max_seqs)
            self._calls = Calls(self._loop, self._intake, searches)
            # The thread knows the loop and not this object, so one that is dropped or outlives the program is closed, too.
            self._closed = weakref.finalize(self, _close, self._loop, ranks)
            undo.callback(self.close)
            if made is not None and made.adapter is not None:
                self._intake.own = self.load_adapter(made.name, made.adapter).name
            undo.pop_all()

    @property
    def format(self) -> ChatFormat:
        """The prompt format. Raises PromptError when the checkpoint has none (a base model)."""
        return self._intake.format

    @property
    def max_len(self) -> int:
        """The most tokens of one request without an adapter, prompt and reply together."""
        return self._engine.room()

    def room(self, adapter: str | None = None) -> int:
        """The most tokens of one request with `adapter` (or the model's own): its virtual tokens take the place of as many.

        Raises ConfigError when there is no such adapter.
        """
        return self._engine.room(adapter or self._intake.own)

    @property
    def config(self) -> ModelConfig:
        """The model's geometry. With `tensor_parallel`, `model` is this process's part of it."""
        whole = None if self._ranks is None else self._ranks.whole
        return self.model.config if whole is None else whole

    @property
    def lost(self) -> str | None:
        """With `tensor_parallel`, why there is no model any more: which process is gone, and how; None while all is well."""
        return None if self._ranks is None else self._ranks.lost

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of the weights in this process's memory by type: {"Q8_0": 1313251328, "float32": 270336}."""
        return held(self.model)

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
        requests = self._intake.requests(prompts, params, adapter)
        return checked(self._calls.completions(requests, on_done), errors)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        errors: Literal["raise", "keep"] = "raise",
    ) -> list[Completion]:
        """As `generate`. Cancelling ends the requests."""
        requests = self._intake.requests(prompts, params, adapter)
        return checked(await self._calls.acompletions(requests), errors)

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
        return self._calls.replies(messages, params, tools, adapter)

    async def achat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[ToolSpec | Any] = (),
        adapter: str | None = None,
    ) -> Any:
        """As `chat`. Cancelling ends the requests."""
        return await self._calls.areplies(messages, params, tools, adapter)

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
        return self._calls.pending(prompt, params, tools, adapter)

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
        return ReplyStream(self._calls.pending(prompt, params, tools, adapter, found.put), found)

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

        return AsyncReplyStream(self._calls.pending(prompt, params, tools, adapter, put), found)

    def begin(self, request: Request, sink: Sink) -> None:
        """Queue a request of one's own making, whose events go to `sink` in the engine's thread: what a server builds on.

        Raises ConfigError or ContextFullError when it can never run.
        """
        self._loop.submit(request, sink)

    def abort(self, request_id: str) -> None:
        """End a request, whatever it is doing. Unknown and finished ids are fine."""
        self._loop.abort(request_id)

    def after_steps(self, call: Callable[[], None]) -> None:
        """Have `call` called in the engine's thread after each step's events: what sinks gathered can go out together then.

        The engine's thread begins here, with the priority of this one, and not with the first request.
        """
        self._loop.after = call
        self._loop.start()

    def compile(self, constraint: Constraint) -> None:
        """Raise ConfigError when replies cannot be held to `constraint`. Compiled ones are kept for requests to come."""
        assert self._engine.grammars is not None
        self._engine.grammars.compile(constraint)

    def score(self, pairs: Sequence[tuple[str, str]], *, adapter: str | None = None) -> list[Score]:
        """How likely each continuation is after its context: sums of log-probabilities of (context, continuation) pairs.

        The pair is tokenized as one text, so white space between the two belongs to the continuation's tokens. Contexts that
        are the same are computed once. Raises ContextFullError when a pair does not fit, PromptError for an empty continuation.
        """
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        requests = []
        for number, (context, continuation) in enumerate(pairs):
            ids, start = joined(self._intake.base, context, continuation, number)
            requests.append(
                self._intake.request(ids, params, frozenset(), f"pair {number}", adapter=adapter, score_from=start - 1)
            )
        found: dict[int, Completion] = {}
        for together in rounds([context for context, _ in pairs], self.budget.seqs):
            done = self._calls.completions([(requests[i], None) for i in together])
            found.update(zip(together, done, strict=True))
        return [score_of(one) for one in checked([found[i] for i in range(len(pairs))], "raise")]

    def embed(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        pooling: Pooling = "mean",
        dimensions: int | None = None,
        normalize: bool = True,
        adapter: str | None = None,
    ) -> torch.Tensor:
        """A vector for each text (or list of ids): the final states, pooled, [len(prompts), dim] float32 on the CPU.

        They have length 1 unless `normalize` is False; `dimensions` keeps the first ones only. Forwards come between the steps of
        requests that run. Raises ContextFullError or PromptError naming the prompt, ConfigError for what cannot be done.
        """
        self._alone("embeddings are")
        adapter = adapter or self._intake.own
        if pooling not in get_args(Pooling):
            raise ConfigError(f"pooling is {pooling!r}: choose one of {', '.join(get_args(Pooling))}")
        if dimensions is not None and not 1 <= dimensions <= self.model.config.dim:
            raise ConfigError(f"dimensions is {dimensions:,}: this model's vectors have {self.model.config.dim:,}")
        room = self._engine.room(adapter)
        every = [list(self._intake.base.complete(p).tokens) if isinstance(p, str) else list(p) for p in prompts]
        check_lengths(every, room)
        virtual = None if adapter is None else self._engine.adapters.virtual.get(adapter)

        def run(task: Callable[[Llama], Any]) -> Any:
            return self._loop.between(lambda: self._with(adapter, task))

        found = embed(every, run, pooling=pooling, alone=self._engine.config.deterministic, virtual=virtual)
        return shortened(found, dimensions, normalize=normalize)

    def _with(self, adapter: str | None, task: Callable[[Llama], Any]) -> Any:
        """What `task` makes of the model, with an adapter in every row. In the engine's thread."""
        if adapter is None:
            return task(self.model)
        self._engine.adapters.check(adapter)  # again: it may have been unloaded
        if adapter in self._engine.adapters.virtual:
            return task(self.model)
        with self._engine.adapters.bound(Rows(((adapter, None),)), Rows()) as model:
            return task(model)

    loglikelihood = score
    """The name of `herd.chat.model.Scorer`."""

    def load_adapter(self, name: str, source: str | os.PathLike[str] | LoraAdapter | Virtual) -> LoadedAdapter:
        """Add an adapter (a PEFT folder or a GGUF file) while others run; requests choose it with `adapter=name`.

        Virtual tokens of prefix and prompt tuning take blocks of the cache, and `room(name)` is what they leave. Raises
        CheckpointError or ConfigError with the reason when it does not fit this model.
        """
        self._alone("adapters are", ": merge a LoRA adapter first (herd merge); virtual tokens need one process")
        adapter = source if isinstance(source, LoraAdapter | Virtual) else read_adapter(source, self.model.config)
        if isinstance(adapter, LoraAdapter):
            return self._engine.load_adapter(name, adapter)
        return self._loop.between(lambda: self._engine.load_adapter(name, adapter))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises ConfigError when there is none, or requests with it have not ended. After a created model's
        own, requests that name none have none."""
        if name in self._engine.adapters.virtual:
            self._loop.between(lambda: self._engine.unload_adapter(name))
        else:
            self._engine.unload_adapter(name)
        if name == self._intake.own:
            self._intake.own = None

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
        self._alone("prompt files are")
        ids = self._intake.ids(prompt)
        self.generate([ids], SamplingParams(temperature=0, max_tokens=1))
        cache, pool, mark = self._engine.cache, self._engine.pool, fingerprint(self.model)
        return self._loop.between(lambda: save_prompt(path, ids, cache, pool, mark, overwrite=overwrite))

    def load_prompt(self, path: str | os.PathLike[str]) -> int:
        """Put a prompt of `save_prompt` into the cache; requests that begin with it do not compute it. Returns its tokens.

        Raises CheckpointError for a file of another model, other weights or another dtype of keys and values.
        """
        self._alone("prompt files are")
        cache, pool, mark = self._engine.cache, self._engine.pool, fingerprint(self.model)
        return len(self._loop.between(lambda: load_prompt(path, cache, pool, mark)))

    def warm_up(self, tell: Callable[[int, int], None] = lambda done, total: None) -> float:
        """Record all decode steps of a GPU before anybody waits for them; seconds it took, 0 where nothing is recorded.

        `tell(done, total)` hears of each, in the engine's thread.
        """
        return self._loop.between(lambda: self._engine.warm_up(tell))

    def stats(self) -> Stats:
        """What the engine does and has done: requests, blocks, prefix hits, tokens per second."""
        return self._engine.stats()

    def close(self) -> None:
        """End all requests and the engine's thread. Calling it again does nothing."""
        self._closed()
        self._calls.close()

    def __repr__(self) -> str:
        return f"LLM({self.budget.sentence()})"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _alone(self, what: str, advice: str = "") -> None:
        """Refuse what works on one process's model alone. Raises ConfigError."""
        if self._ranks is not None:
            raise ConfigError(f"{what} not possible with tensor_parallel={self._ranks.count}{advice}")


def _close(loop: Loop, ranks: Ranks | None) -> None:
    """End the engine's thread, then the other processes."""
    loop.close()
    if ranks is not None:
        ranks.close()
