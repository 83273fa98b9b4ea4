"""What is looked at while a model trains: held-out loss, bits per byte, and texts that it writes.

Bits per byte are comparable between vocabularies and between runs: nats of all held-out labels over ln 2 and the UTF-8 bytes that
these labels cover. Texts are written greedily, so that two evaluations differ by the model alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from herd.adapters.prefix import PrefixTuned, PromptTuned
from herd.chat.base import BaseFormat
from herd.chat.format import ChatFormat
from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.data.batch import TokenBatch
from herd.engine.session import Session
from herd.errors import ContextFullError
from herd.model.llama import Llama
from herd.tokenizer.tokenizer import Tokenizer
from herd.train.objective import Objective

__all__ = ["Evaluation", "HeldOut", "continuation"]


class HeldOut(Protocol):
    """Rows that are never trained on: the same ones in the same order every time."""

    @property
    def size(self) -> int:
        """UTF-8 bytes that the labels cover."""
        ...

    def batches(self) -> Iterator[TokenBatch]: ...


class Evaluation:
    """Figures of a model (`loss`, `perplexity`, `bits_per_byte`; none without held-out rows) and samples (`texts`).

    `prompts` are questions for a chat format and beginnings for a base model. What does not fit the context is said in its reply.
    """

    def __init__(
        self,
        objective: Objective,
        held_out: HeldOut | None,
        tokenizer: Tokenizer,
        format: ChatFormat,
        prompts: Sequence[str] = (),
        max_tokens: int = 64,
    ) -> None:
        self.objective, self.held_out, self.tokenizer, self.format = objective, held_out, tokenizer, format
        self.prompts, self.max_tokens = tuple(prompts), max_tokens

    @property
    def measures(self) -> bool:
        """Whether there is anything to evaluate."""
        return self.held_out is not None or bool(self.prompts)

    @torch.no_grad()
    def __call__(self, model: Llama) -> dict[str, float]:
        if self.held_out is None:
            return {}
        device = model.norm.weight.device
        nats, count = 0.0, 0
        for batch in self.held_out.batches():
            here = TokenBatch(batch.tokens.to(device), batch.labels.to(device), batch.positions.to(device))
            loss = self.objective(model, here)
            nats += float(loss.total)
            count += loss.supervised
        mean = nats / max(1, count)
        figures = {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}
        if self.held_out.size:
            figures["bits_per_byte"] = nats / math.log(2) / self.held_out.size
        return figures

    @torch.no_grad()
    def texts(self, model: Llama) -> Iterator[tuple[str, str]]:
        """(prompt, reply) of every prompt."""
        for prompt in self.prompts:
            try:
                ids = list(continuation(model, self._ids(prompt), self._stop(), self.max_tokens))
                yield prompt, self.tokenizer.decode(ids)
            except ContextFullError as error:
                yield prompt, f"({error})"

    def _ids(self, prompt: str) -> list[int]:
        if isinstance(self.format, BaseFormat):
            return self.tokenizer.encode(prompt, bos=True)
        return self.format.render([Message("user", prompt)]).tokens

    def _stop(self) -> frozenset[int]:
        return self.format.stop_ids | self.tokenizer.special.stop


def continuation(model: Llama, prompt: Sequence[int], stop: frozenset[int], max_tokens: int) -> Iterator[int]:
    """The most likely ids after `prompt`, without a stop id at the end. Nothing is compiled for it."""
    with torch.compiler.set_stance("force_eager"):
        if isinstance(model, PrefixTuned | PromptTuned):
            yield from _recomputed(model, prompt, stop, max_tokens)
            return
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        for id in Session(model).generate(prompt, params, stop):
            if id not in stop:
                yield id


def _recomputed(model: Llama, prompt: Sequence[int], stop: frozenset[int], max_tokens: int) -> Iterator[int]:
    """Without a cache, every token from the start: for models that a cache does not know (virtual tokens)."""
    ids = list(prompt)
    for _ in range(max_tokens):
        logits = model(torch.tensor([ids], device=model.norm.weight.device))[0, -1]
        id = int(logits.argmax())
        if id in stop:
            return
        ids.append(id)
        yield id
