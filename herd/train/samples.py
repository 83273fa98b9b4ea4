"""What is looked at while a model trains: held-out loss, bits per byte, and texts that it writes.

Bits per byte are comparable between vocabularies and between runs: nats of all held-out labels over ln 2 and the UTF-8 bytes that
these labels cover. Texts are written greedily, so that two evaluations differ by the model alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from herd.adapters.prefix import PrefixTuned, PromptTuned
from herd.chat.base import BaseFormat
from herd.chat.format import ChatFormat
from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.data.batch import TokenBatch
from herd.engine.session import Session
from herd.errors import ContextFullError
from herd.model.attend import packed
from herd.model.llama import Llama
from herd.parallel.prepare import Spread
from herd.tokenizer.tokenizer import Tokenizer
from herd.train.objective import Objective, at_the_end
from herd.train.precision import computed_in

__all__ = ["Evaluation", "HeldOut", "continuation"]


class HeldOut(Protocol):
    """Rows that are never trained on: the same ones in the same order every time."""

    @property
    def size(self) -> int:
        """UTF-8 bytes that the labels cover."""
        ...

    def __len__(self) -> int:
        """Rows."""
        ...

    def batches(self) -> Iterator[TokenBatch]: ...


class Evaluation:
    """Figures of a model (`loss`, `perplexity`, `bits_per_byte`; none without held-out rows) and samples (`texts`).

    `prompts` are questions for a chat format and beginnings for a base model. What does not fit the context is said in its reply.
    With several ranks `spread` is what `herd.parallel.prepare` made of the model; all of them call, and all get the same.
    """

    def __init__(
        self,
        objective: Objective,
        held_out: HeldOut | None,
        tokenizer: Tokenizer,
        format: ChatFormat,
        prompts: Sequence[str] = (),
        max_tokens: int = 64,
        spread: Spread | None = None,
    ) -> None:
        self.spread = spread
        self.objective, self.held_out, self.tokenizer, self.format = objective, held_out, tokenizer, format
        self.prompts, self.max_tokens = tuple(prompts), max_tokens
        self._tick: Callable[[int, int], None] = lambda done, total: None

    @property
    def measures(self) -> bool:
        """Whether there is anything to evaluate."""
        return self.held_out is not None or bool(self.prompts)

    def follow(self, tick: Callable[[int, int], None]) -> None:
        """Tell `tick` from now on how many held-out rows are done, of how many."""
        self._tick = tick

    @torch.no_grad()
    def __call__(self, model: Llama) -> dict[str, float]:
        if self.held_out is None:
            return {}
        nats, count, done = 0.0, 0, 0
        for batch in self.held_out.batches():
            self._tick(done, len(self.held_out))
            total, learned = self._measure(model, batch)
            nats += total
            count += learned
            done += len(batch.tokens)
        self._tick(done, done)
        mean = nats / max(1, count)
        figures = {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
        if self.held_out.size:
            figures["bits_per_byte"] = nats / math.log(2) / self.held_out.size
        return figures

    def _measure(self, model: Llama, batch: TokenBatch) -> tuple[float, int]:
        """(nats, labels) of one batch, which all ranks have."""
        spread = self.spread
        if spread is None:
            device = model.norm.weight.device
            loss = self.objective(model, _moved(batch, lambda part: part.to(device)))
            return float(loss.total), loss.supervised
        mesh = spread.mesh
        here = _moved(batch, lambda part: mesh.cut(part).to(mesh.device))
        if spread.pipeline is None:
            total = self.objective(model, here).total.detach().double()
        else:
            end = spread.pipeline.forward(here.tokens, here.positions)
            total = torch.zeros((), dtype=torch.float64, device=mesh.device)
            if end is not None:
                total = at_the_end(self.objective)(cast(Llama, end), here).total.detach().double()
            total = spread.pipeline.whole(total)
        return float(mesh.of_sequences(total)), self.objective.count(batch)

    @torch.no_grad()
    def texts(self, model: Llama) -> Iterator[tuple[str, str]]:
        """(prompt, reply) of every prompt."""
        for prompt in self.prompts:
            try:
                ids = list(continuation(model, self._ids(prompt), self._stop(), self.max_tokens, self.spread))
                yield prompt, self.tokenizer.decode(ids)
            except ContextFullError as error:
                yield prompt, f"({error})"

    def _ids(self, prompt: str) -> list[int]:
        if isinstance(self.format, BaseFormat):
            return self.tokenizer.encode(prompt, bos=True)
        return self.format.render([Message("user", prompt)]).tokens

    def _stop(self) -> frozenset[int]:
        return self.format.stop_ids | self.tokenizer.special.stop


def continuation(
    model: Llama, prompt: Sequence[int], stop: frozenset[int], max_tokens: int, spread: Spread | None = None
) -> Iterator[int]:
    """The most likely ids after `prompt`, without a stop id at the end. Nothing is compiled for it."""
    with torch.compiler.set_stance("force_eager"):
        shared = spread is not None and spread.mesh.part.tp * spread.mesh.part.pp > 1
        if shared or isinstance(model, PrefixTuned | PromptTuned):
            yield from _recomputed(model, prompt, stop, max_tokens, spread)
            return
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        for id in Session(model, dtype=computed_in(model)).generate(prompt, params, stop):
            if id not in stop:
                yield id


def _recomputed(
    model: Llama, prompt: Sequence[int], stop: frozenset[int], max_tokens: int, spread: Spread | None
) -> Iterator[int]:
    """Without a cache, every token from the start: for models that a cache does not know (virtual tokens, parts of models)."""
    ids, limit = list(prompt), model.config.max_seq_len
    if len(ids) >= limit:
        raise ContextFullError(
            f"the prompt has {len(ids)} tokens and the context holds {limit}, so there is no room for a reply",
            needed=len(ids) + 1,
            available=limit,
        )
    for _ in range(min(max_tokens, limit - len(ids))):
        id = _next(model, ids, spread)
        if id in stop:
            return
        ids.append(id)
        yield id


def _next(model: Llama, ids: Sequence[int], spread: Spread | None) -> int:
    """The most likely id after `ids`; all ranks get the same."""
    tp = 1 if spread is None else spread.mesh.part.tp
    rows = torch.tensor([[*ids, *[0] * (-len(ids) % tp)]])  # what stands behind is not seen
    pipeline = None if spread is None else spread.pipeline
    if pipeline is not None:
        mesh = pipeline.mesh
        rows = rows.to(mesh.device)
        end = pipeline.forward(rows, torch.arange(rows.shape[1], device=mesh.device)[None], packed)
        found = torch.zeros((), dtype=torch.int64, device=mesh.device)
        if end is not None:
            found = _best(end.output, end.embed(rows)[0, len(ids) - 1])
        return int(pipeline.whole(found))
    rows = rows.to(model.norm.weight.device)
    positions = torch.arange(rows.shape[1], device=rows.device)[None]
    hidden = model.hidden(model.embed(rows), positions, packed(model.config, positions))
    return int(_best(model.output, hidden[0, len(ids) - 1]))


def _best(output: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
    logits = output(state[None])[0]
    return (logits.full_tensor() if isinstance(logits, DTensor) else logits).argmax()


def _moved(batch: TokenBatch, to: Callable[[Tensor], Tensor]) -> TokenBatch:
    return TokenBatch(to(batch.tokens), to(batch.labels), to(batch.positions))
