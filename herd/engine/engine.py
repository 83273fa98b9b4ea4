"""Requests in, tokens out, many at once: plan, forward, sample, commit, and nobody harms anybody else.

One step: the scheduler says which positions of which sequences are computed; `pack` lays them side by side; the runner gives the
logits of those that are asked for; the sampler chooses; the scheduler takes the tokens in. What fails for one request (an
exception, logits that are not finite) ends that request alone.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from herd.adapters.lora import LoraAdapter
from herd.adapters.prefix import Virtual
from herd.checkpoint.adapter import read_adapter
from herd.engine.adapters import AdapterRunner, AdapterSet, LoadedAdapter
from herd.engine.blocks import BlockPool
from herd.engine.choosing import Found, Row, choose, row_of
from herd.engine.config import EngineConfig
from herd.engine.grammar import Grammar, Grammars
from herd.engine.pack import pack
from herd.engine.paged import PagedCache
from herd.engine.request import Request, Sequence, TokenEvent
from herd.engine.resident import Residents
from herd.engine.runner import Runner
from herd.engine.runners import fastest_runner, steps_ahead
from herd.engine.sampler import RowState, Sampler
from herd.engine.scheduler import Chunk, Progress, Scheduler, StepPlan
from herd.engine.speculate import Drafter, Speculation
from herd.engine.stats import Stats
from herd.errors import ConfigError, HerdError, RanksError
from herd.model.llama import Llama

if TYPE_CHECKING:
    from herd.engine.graphs import Flight

__all__ = ["Engine", "Stats"]


class Engine:
    """One model, one KV cache, any number of requests. `add` and `abort` from any thread, `step` from one at a time.

    `runner` computes logits (default: the fastest one that fits the model and the cache), `drafter` guesses tokens ahead
    (`herd.engine.speculate`), `grammars` compiles what replies must be; without it such requests are refused. Raises
    ConfigError for limits that do not fit.
    """

    def __init__(
        self,
        model: Llama,
        config: EngineConfig,
        *,
        runner: Runner | None = None,
        drafter: Drafter | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.model, self.config, self.grammars = model, config, grammars
        self.pool = BlockPool(config.blocks, config.block_size, prefix_cache=config.prefix_cache)
        self.scheduler = Scheduler(
            self.pool, max_seqs=config.max_seqs, max_tokens=config.max_tokens, max_len=config.max_len
        )
        self.adapters = AdapterSet(model)
        self.runner = fastest_runner(model, config) if runner is None else runner
        self._adapted = AdapterRunner(self.runner, self.adapters, deterministic=config.deterministic)
        self.sampler = Sampler()
        if config.deterministic and not getattr(drafter, "same_tokens", True):
            raise ConfigError(
                "a draft model that follows the standard rule changes which reply a seed gives, and deterministic promises "
                "that nothing does: make it with ModelDrafter(..., same_tokens=True)"
            )
        self.speculation = None if drafter is None else Speculation(drafter, model.config)
        self.device = model.norm.weight.device
        self.cache = getattr(self.runner, "cache", PagedCache)(  # a runner over several ranks has a part on each
            model.config,
            blocks=config.blocks,
            block_size=config.block_size,
            dtype=getattr(torch, config.kv),
            device=self.device,
            spare=getattr(self.runner, "records", False),
        )
        self._residents = Residents(self.adapters, self.scheduler, self.cache)
        self._ahead = steps_ahead(self.runner, self.cache)
        self._flying: tuple[StepPlan, Flight] | None = None
        """A step that was begun and whose tokens nobody has read."""
        self._inbox: deque[tuple[Request, Grammar | None] | tuple[str, int | None]] = deque()
        self._seeds = random.Random(config.seed)
        self._lock = threading.Lock()
        self._known: dict[str, str | None] = {}
        """Ids of requests that were added and have not ended, those in the inbox included, and their adapters."""
        self._stale: list[str] = []
        """Adapters that were unloaded: what they left in the cache is to be forgotten."""
        self._stats = Stats(blocks_total=config.blocks)
        self._recent: deque[tuple[float, int]] = deque(maxlen=64)

    @property
    def busy(self) -> bool:
        """Whether a step would have anything to do."""
        return bool(self._inbox) or not self.scheduler.idle

    def add(self, request: Request) -> None:
        """Queue a request; it begins with one of the next steps. From any thread.

        Raises ContextFullError with the counts when it can never fit, ConfigError for what cannot be done, before any work.
        """
        self.check(request)
        grammar = self._grammar(request)
        with self._lock:
            if request.id in self._known:
                raise ConfigError(f"request {request.id!r} is already running: give every request an id of its own")
            if request.adapter is not None:
                self.adapters.check(request.adapter)  # again: it may have been unloaded
            self._known[request.id] = request.adapter
            self._inbox.append((request, grammar))

    def abort(self, request_id: str) -> None:
        """End a request, whatever it is doing, before the next step. From any thread; unknown and finished ids are fine."""
        with self._lock:
            if request_id in self._known:
                self._inbox.append((request_id, None))

    def stop(self, request_id: str, index: int) -> None:
        """End one continuation as complete before the next step: its reader has met a stop string. From any thread."""
        with self._lock:
            if request_id in self._known:
                self._inbox.append((request_id, index))

    def load_adapter(self, name: str, source: str | os.PathLike[str] | LoraAdapter | Virtual) -> LoadedAdapter:
        """Make an adapter available to requests: the one at `source` (a PEFT folder, a GGUF file), or opened.

        LoRA from any thread, while others run (`AdapterSet.load`); virtual tokens only between two steps, for they get blocks of
        the cache, and others have fewer (`Scheduler.pin`). Raises CheckpointError or ConfigError with the reason.
        """
        opened = isinstance(source, LoraAdapter | Virtual)
        adapter = source if opened else read_adapter(source, self.model.config)
        if not isinstance(adapter, Virtual):
            return self.adapters.load(name, adapter)
        if hasattr(self.runner, "cache"):
            raise ConfigError("a model over several ranks serves no virtual tokens: run it in one process")
        return self._residents.load(name, adapter)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. From any thread; one of virtual tokens only between two steps.

        Raises ConfigError when there is none, or requests with it have not ended.
        """
        with self._lock:
            users = sum(adapter == name for adapter in self._known.values())
            if users:
                raise ConfigError(f"adapter {name!r} has {users} unfinished requests: wait for them, or abort them")
            virtual = name in self.adapters.virtual
            self.adapters.unload(name)
            self._stale.append(name)
            if virtual:
                self._residents.unload(name)

    def room(self, adapter: str | None = None) -> int:
        """The most tokens of a request with `adapter`, prompt and reply together. From any thread.

        Raises ConfigError when there is no such adapter.
        """
        if adapter is not None:
            self.adapters.check(adapter)
        return self.scheduler.room(adapter)

    def step(self) -> list[TokenEvent]:
        """Compute one step; what it gave. Every continuation of every request ends in exactly one event with `finish`."""
        began = time.perf_counter()
        events = self._take_inbox()
        if self._flying is not None:
            return events + self._land(began)
        if self.speculation is not None:
            self.speculation.propose(self.scheduler.running, _sampling)
        plan = self.scheduler.plan()
        if self.config.debug:
            self.scheduler.check()
        if plan.rows:  # an interrupt from here on: nothing of the plan has happened, and its copies stay due
            if self._begin_ahead(plan):
                return events
            events += self._run(plan)
            self._count(plan, events, time.perf_counter() - began)
        self._check_idle()
        return events

    def _check_idle(self) -> None:
        if self.config.debug:
            self.scheduler.check()
        if self.scheduler.idle:
            counts = self.pool.counts
            idle = counts["free"] + counts["cached"] + counts["pinned"]
            assert idle == counts["total"], f"blocks are lost at idle: {counts}"

    def stats(self) -> Stats:
        """What the engine does and has done."""
        counts = self.pool.counts
        recent = list(self._recent)
        seconds = sum(time for time, _ in recent)
        return replace(
            self._stats,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + sum(isinstance(item, Request) for item, _ in list(self._inbox)),
            blocks_used=counts["used"],
            blocks_cached=counts["cached"],
            blocks_pinned=counts["pinned"],
            tokens_per_second=sum(tokens for _, tokens in recent) / seconds if seconds else 0.0,
        )

    def check(self, request: Request) -> None:
        """Raise what `add` would raise for a request that can never run. From any thread."""
        vocab = self.model.config.vocab_size
        bad = next((t for t in request.prompt if not 0 <= t < vocab), None)
        if bad is not None:
            raise ConfigError(f"request {request.id!r}: token id {bad} is outside the model's vocabulary of {vocab}")
        if request.adapter is not None:
            self.adapters.check(request.adapter)
        if request.params.beams > 1:
            raise ConfigError(
                "an engine runs single sequences: herd.LLM.generate searches with beams, chats and streams do not"
            )
        if any(i >= vocab for i in dict(request.params.logit_bias)):
            raise ConfigError(f"request {request.id!r}: logit_bias names ids outside the model's vocabulary of {vocab}")
        if request.score_from and not 0 <= request.score_from < len(request.prompt):
            raise ConfigError(
                f"request {request.id!r}: score_from {request.score_from} is not a position of its prompt"
            )
        self.scheduler.admissible(request)
        self._grammar(request)

    def _grammar(self, request: Request) -> Grammar | None:
        """What the reply must be, compiled. Raises ConfigError when that cannot be enforced."""
        constraint = request.params.constraint
        if constraint is None:
            return None
        if self.grammars is None:
            raise ConfigError(f"{constraint.kind} is not enforced by an engine without a tokenizer: leave it out")
        grammar = self.grammars.compile(constraint)
        grammar.state(request.stops)
        return grammar

    def _take_inbox(self) -> list[TokenEvent]:
        """Begin and end what callers asked for since the last step, in their order."""
        with self._lock:
            items, self._inbox = self._inbox, deque()
            stale, self._stale = self._stale, []
        for name in stale:  # before requests with another adapter of that name begin
            self.pool.clear(name)
        events: list[TokenEvent] = []
        for what, detail in items:
            if isinstance(what, Request):
                assert not isinstance(detail, int)
                events += self._begin(what, detail)
                continue
            request_id, index = what, detail
            if index is None:
                events += [TokenEvent.end(sequence) for sequence in self.scheduler.abort(request_id)]
            else:
                for sequence in self.scheduler.sequences(request_id):
                    if sequence.index == index and self.scheduler.finish(sequence, "stop"):
                        events.append(TokenEvent.end(sequence))
            self._forget(request_id)
        return events

    def _begin(self, request: Request, grammar: Grammar | None) -> list[TokenEvent]:
        try:
            sequences = self.scheduler.add(request)
            seed = request.params.seed
            seed = self._seeds.getrandbits(63) if seed is None else seed
            for sequence in sequences:
                sequence.scored = request.score_from
                sequence.state = Row(
                    RowState(
                        request.params,
                        request.prompt,
                        vocab_size=self.model.config.vocab_size,
                        index=sequence.index,
                        stop_ids=request.stops,
                        seed=seed,
                        mask=None if grammar is None else grammar.state(request.stops),
                    ),
                    grammar,
                )
        except Exception as error:  # what `add` could not know
            return self._fail(request.id, error) or [
                TokenEvent(request.id, i, finish="error", error=_said(error), kind=type(error).__name__)
                for i in range(request.params.candidates)
            ]
        self._stats.requests += 1
        return []

    def warm_up(self, tell: Callable[[int, int], None] = lambda done, total: None) -> float:
        """Record all decode steps of a GPU now, before anybody waits for them; seconds it took. Between steps only."""
        return 0.0 if self._ahead is None else self._ahead.warm_up(tell)

    def weights_changed(self) -> None:
        """The model's weights are other ones now: forget what was computed with the old ones. Only while nothing runs."""
        assert self.scheduler.idle, "requests run"
        if (refresh := getattr(self.runner, "refresh", None)) is not None:
            refresh()
        self.pool.clear()
        self._residents.renew()

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> list[TokenEvent]:
        """A plan from its positions to its events."""
        try:
            flight = None if self._ahead is None else self._ahead.launch(plan)
            outcomes = None if self._ahead is None or flight is None else self._ahead.land(plan, flight)
        except Exception:  # row by row, to find out whose fault it is
            outcomes = None
        if outcomes is None:
            outcomes = self._choose(plan)
        return self._commit(plan, outcomes)

    def _choose(self, plan: StepPlan) -> list[Found | Exception]:
        """Compute a plan and choose on the host."""
        deterministic = self.config.deterministic
        return choose(self.sampler, plan.rows, self._forward(plan), self.speculation, deterministic=deterministic)

    def _begin_ahead(self, plan: StepPlan) -> bool:
        """Begin a step and leave it to the next call to read its tokens, where steps may overlap."""
        if self._ahead is None or not self.config.overlap or self.speculation is not None:
            return False
        if self.scheduler.ahead(plan) is None:  # there would be nothing to begin meanwhile
            return False
        try:
            flight = self._ahead.launch(plan)
        except Exception:
            return False
        if flight is not None:
            self._flying = plan, flight
        return flight is not None

    def _land(self, began: float) -> list[TokenEvent]:
        """Begin the next step, if its sequences are those of the one under way, then read that one's tokens."""
        assert self._flying is not None
        assert self._ahead is not None
        (plan, flight), self._flying = self._flying, None
        done = False
        try:
            following = None
            if (next_plan := self.scheduler.ahead(plan)) is not None:
                self.scheduler.extend(next_plan)
                try:
                    following = self._ahead.launch(next_plan, plan)
                except Exception:
                    following = None  # it is planned again, with its tokens known
            try:
                outcomes = self._ahead.land(plan, flight)
                if following is not None and next_plan is not None:
                    self._flying = next_plan, following
            except Exception:  # what was begun after it has tokens of nobody
                outcomes = self._choose(plan)
            events = self._commit(plan, outcomes)
            done = True
        finally:
            if not done:
                self._flying = None
        self._count(plan, events, time.perf_counter() - began)
        self._check_idle()
        return events

    def _commit(self, plan: StepPlan, outcomes: list[Found | Exception]) -> list[TokenEvent]:
        """The scheduler and the requests take in what a plan gave."""
        good = [(chunk, found) for chunk, found in zip(plan.rows, outcomes, strict=True) if isinstance(found, Found)]
        running = [(chunk, found) for chunk, found in good if chunk.sequence.status == "running"]
        kept = StepPlan([chunk for chunk, _ in running], plan.copies)
        progress = self.scheduler.commit(kept, [[one.token for one in found.sampled] for _, found in running])
        events: list[TokenEvent] = []
        for made, (_, found) in zip(progress, running, strict=True):
            events += self._take_in(made, found)
        for chunk, found in zip(plan.rows, outcomes, strict=True):
            if not isinstance(found, Found) and chunk.sequence.status == "running":
                events += self._fail(chunk.sequence.request.id, found)
        return events

    def _forward(self, plan: StepPlan) -> list[Tensor | Exception]:
        """The logits [chunk.logits, V] of every chunk; where a forward of all fails, of each alone, or what is wrong."""
        try:
            plan.copy(self.cache.copy)
        except RanksError:  # not one request's affair: nothing can be computed any more
            raise
        except Exception as error:  # rows would read what is not there
            return [error] * len(plan.rows)
        try:
            return self._logits(plan.rows)
        except RanksError:
            raise
        except Exception as error:
            if len(plan.rows) == 1:
                return [error]
        found: list[Tensor | Exception] = []
        for chunk in plan.rows:  # rows write to their own blocks only, so doing it twice does no harm
            try:
                found += self._logits([chunk])
            except Exception as error:
                found.append(error)
        return found

    def _logits(self, chunks: list[Chunk]) -> list[Tensor | Exception]:
        batch = pack(StepPlan(chunks), self.config.block_size, self.device)
        runner = self.runner if batch.adapters is None else self._adapted
        logits = runner.logits(batch, self.cache)
        return list(logits.split([chunk.logits for chunk in chunks]))

    def _take_in(self, made: Progress, found: Found) -> list[TokenEvent]:
        """The events of what one sequence gained; its sampling state goes on."""
        sequence = made.sequence
        row = row_of(sequence)
        events = []
        if sequence.index == 0 and sequence.made == len(made.tokens) > 0:
            self._stats.prompt_tokens += len(sequence.request.prompt)
            self._stats.cached_tokens += sequence.cached_tokens or 0
        for i, one in enumerate(found.sampled[: len(made.tokens)]):
            last = i == len(made.tokens) - 1
            if not (last and made.finish):
                row.sampling.append(one.token)
            broken = self._broken(sequence, row) if last and made.finish == "stop" else None
            scored, row.scored = row.scored, []
            events.append(
                TokenEvent(
                    sequence.request.id,
                    sequence.index,
                    one.token,
                    one.logprob,
                    one.top,
                    "error" if broken else made.finish if last else None,
                    broken,
                    cached_tokens=sequence.cached_tokens or 0,
                    prompt_logprobs=scored or None,
                    logits=one.logits,
                )
            )
        if made.finish is not None:
            self._stats.preemptions += sequence.preemptions
            self._forget(sequence.request.id)
        return events

    def _broken(self, sequence: Sequence, row: Row) -> str | None:
        """What is wrong with a complete reply that was to have a form: a last check of the masks it was made with."""
        if row.grammar is None or self.grammars is None:
            return None
        try:
            said = b"".join(self.grammars.tokenizer.bytes_of(token) for token in sequence.reply[:-1])
            wrong = row.grammar.check(said)
        except Exception as error:  # it has ended: nobody else may hear of it
            return _said(error)
        return None if wrong is None else f"the reply is not what was asked for: {wrong}"

    def _fail(self, request_id: str, error: Exception) -> list[TokenEvent]:
        """End a request with an error; nothing of it is found in the prefix cache afterwards."""
        said = _said(error)
        events = []
        for sequence in self.scheduler.sequences(request_id):
            for block in sequence.blocks:
                self.pool.forget(block)
            sequence.children = []
            self.scheduler.finish(sequence, "error")
            events.append(TokenEvent.end(sequence, said, type(error).__name__))
        self._stats.errors += bool(events)
        self._forget(request_id)
        return events

    def _forget(self, request_id: str) -> None:
        """The id is free again when all of its continuations have ended."""
        if not self.scheduler.sequences(request_id):
            with self._lock:
                self._known.pop(request_id, None)

    def _count(self, plan: StepPlan, events: list[TokenEvent], seconds: float) -> None:
        made = sum(event.token is not None for event in events)
        if self.speculation is not None:
            self.speculation.settle(plan, made)
        self._recent.append((seconds, made))
        stats = self._stats
        stats.steps += 1
        stats.busy_seconds += seconds
        stats.generated_tokens += made


def _sampling(sequence: Sequence) -> RowState:
    return row_of(sequence).sampling


def _said(error: Exception) -> str:
    """An error for the one who asked: its text; for what is a bug, also its kind."""
    return str(error) if isinstance(error, HerdError) else f"{type(error).__name__}: {error}"
