"""A model run straight from its files, one layer in memory at a time.

The layers are the model's own `Block`s, filled in float32, run on every prompt, and dropped; keys and values lie in the
engine's `StaticCache`. So a 70B checkpoint can be run where only one of its layers fits, and there is no second definition of
the model. Everything is computed in float32 from tensors of the same layout, whatever the file holds, so that two files with
the same numbers give the same bits.

Letters: S positions, D dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from herd.checkpoint.fill import without_storage
from herd.checkpoint.mapped import slices
from herd.checkpoint.store import ReadsInto, Releases, TensorStore
from herd.convert.weights import weights_of
from herd.engine.cache import StaticCache
from herd.model.attend import Attend, uncached
from herd.model.config import ModelConfig
from herd.model.llama import Block
from herd.model.norm import RMSNorm
from herd.model.rope import Rope

__all__ = ["Streamed", "Weights", "greedy", "logits", "of_store"]

Tick = Callable[[int], None]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Weights:
    """The numbers of one model: `put(name, out)` copies the canonical tensor into `out`, float32 of its shape."""

    config: ModelConfig
    put: Callable[[str, Tensor], None]


def of_store(store: TensorStore, config: ModelConfig | None = None, tick: Tick = lambda _: None) -> Weights:
    """The weights of an open checkpoint, run as `config` says (default: its own). `tick` is told the bytes that were read."""
    held = weights_of(store)

    def put(name: str, out: Tensor) -> None:
        stored = held[name]
        if isinstance(store, ReadsInto):
            store.read_into(stored, out)
        else:
            source = store.read(stored)
            for rows in slices(out):
                out[rows].copy_(source[rows])
                if isinstance(store, Releases):
                    store.release(stored)
        if isinstance(store, Releases):
            store.release(stored)
        tick(store.info(stored).nbytes)

    return Weights(config or store.config, put)


@torch.inference_mode()
def logits(weights: Weights, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [S, V] float32 at every position of each prompt; the weights are read once."""
    run = Streamed(weights)
    tokens = [torch.tensor(prompt) for prompt in prompts]
    positions = [torch.arange(len(prompt)) for prompt in prompts]
    return run.step(tokens, positions, [uncached(weights.config.n_layers)] * len(prompts))


@torch.inference_mode()
def greedy(weights: Weights, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The `count` most likely next ids of each prompt, one after the other; the weights are read `count` times.

    Of equal logits the lowest id wins.
    """
    run, config = Streamed(weights), weights.config
    caches = [StaticCache(config, max_len=len(prompt) + count) for prompt in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    fresh = [list(prompt) for prompt in prompts]
    for step in range(count):
        starts = [0 if step == 0 else len(p) + step - 1 for p in prompts]
        positions = [torch.arange(start, start + len(ids)) for start, ids in zip(starts, fresh, strict=True)]
        attends = [
            cache.bind(p, kv_len=int(p[-1]) + 1) for cache, p in zip(caches, positions, strict=True)
        ]  # fmt: skip
        tokens = [torch.tensor(ids) for ids in fresh]
        found = run.step(tokens, positions, attends, last_only=True)
        for i, row in enumerate(found):
            made[i].append(int(row[-1].argmax()))
            fresh[i] = [made[i][-1]]
    return made


class Streamed:
    """One pass after another through the layers of `weights`, several prompts side by side."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.config = weights, weights.config
        self.rope = Rope(weights.config)

    def step(
        self,
        tokens: Sequence[Tensor],
        positions: Sequence[Tensor],
        attends: Sequence[Sequence[Attend]],
        *,
        last_only: bool = False,
    ) -> list[Tensor]:
        """Logits [S, V] (or of the last position, [1, V]) of each prompt's `tokens` [S] at its `positions` [S]."""
        states = self.embed(tokens)
        rotaries = [self.rope(p) for p in positions]
        for i in range(self.config.n_layers):
            block = self.block(i)
            for n, attend in enumerate(attends):
                states[n] = block(states[n], rotaries[n], attend[i])
            del block
        norm = self.norm()
        return self._output([norm(x[0, -1:] if last_only else x[0]) for x in states])

    def embed(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """tokens [S] each -> [1, S, D] each: with a batch dimension, as caches want it."""
        table = torch.empty(self.config.vocab_size, self.config.dim)
        self.weights.put("tok_embeddings.weight", table)
        return [table[ids].unsqueeze(0) for ids in tokens]

    def block(self, layer: int) -> Block:
        """Layer number `layer`, filled: the caller drops it before taking the next."""
        return self._filled(lambda: Block(self.config, self.config.layers[layer]), f"layers.{layer}.")

    def norm(self) -> RMSNorm:
        """The norm before the output matrix."""
        return self._filled(lambda: RMSNorm(self.config.dim, self.config.norm_eps), "norm.")

    def _output(self, states: list[Tensor]) -> list[Tensor]:
        table = torch.empty(self.config.vocab_size, self.config.dim)
        self.weights.put("output.weight", table)
        return [x @ table.T for x in states]

    def _filled(self, make: Callable[[], M], prefix: str) -> M:
        with without_storage():
            module = make()
        for name, weight in list(module.named_parameters()):
            values = torch.empty(weight.shape, dtype=torch.float32)
            self.weights.put(prefix + name, values)
            home, _, field = name.rpartition(".")
            module.get_submodule(home).register_parameter(field, nn.Parameter(values, requires_grad=False))
        return module.eval()
