"""Embeddings: the final normalised states of a text, pooled to one vector.

Short prompts are packed side by side, long ones are read in pieces over a cache of their own, so no forward has more than ROWS
rows. Each forward is a task of its own for `run`, which lets the engine's steps come between.

Letters: N prompts, S positions, T rows, D dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from herd.adapters.prefix import prefixed
from herd.engine.cache import StaticCache
from herd.engine.virtual import VirtualTokens
from herd.errors import ConfigError, ContextFullError, HerdError, PromptError
from herd.model.attend import Attend, packed, uncached
from herd.model.llama import Llama

__all__ = ["ROWS", "Pooling", "check_lengths", "embed", "shortened"]

Pooling = Literal["mean", "last"]
"""mean: the average over all positions, BOS included. last: the state of the last one, which has seen all others."""
ROWS = 512
"""The most rows of one forward: about as much as a step of the engine computes."""

Run = Callable[[Callable[[Llama], Any]], Any]


def embed(
    prompts: Sequence[Sequence[int]],
    run: Run,
    *,
    pooling: Pooling = "mean",
    alone: bool = False,
    virtual: VirtualTokens | None = None,
) -> Tensor:
    """Pooled states [N, D] float32 of `prompts`, on the CPU. `run(task)` calls `task(model)`, once for each forward.

    `alone`: every prompt has forwards of its own, so its numbers do not depend on the others. `virtual` tokens stand before each
    prompt and have no part in the average. Raises PromptError for an empty prompt or an id that the model does not have,
    HerdError for states that are not finite.
    """
    size = run(lambda model: model.config.vocab_size)
    for i, ids in enumerate(prompts):
        if not ids:
            raise PromptError(f"prompt {i} is empty: there is nothing to embed")
        if not 0 <= min(ids) <= max(ids) < size:
            raise PromptError(f"prompt {i} holds an id that the model does not have: ids are 0 to {size - 1:,}")
    rows: list[Tensor] = []
    for group in _groups(prompts, 1 if alone else ROWS):
        if len(group) == 1:
            rows.append(_long(group[0], run, pooling, virtual))
        else:
            rows.extend(run(lambda model, group=group: _short(model, group, pooling, virtual)))
    if not rows:
        return torch.empty(0, 0)
    out = torch.stack(rows)
    if not bool(out.isfinite().all()):
        raise HerdError("the model's states are not finite: its weights are damaged, or overflow in this dtype")
    return out


def check_lengths(prompts: Sequence[Sequence[int]], most: int) -> None:
    """Raise ContextFullError naming the first prompt of more than `most` ids."""
    for i, ids in enumerate(prompts):
        if len(ids) > most:
            raise ContextFullError(
                f"prompt {i} has {len(ids):,} tokens, and the context holds {most:,}", needed=len(ids), available=most
            )


def shortened(vectors: Tensor, dimensions: int | None, *, normalize: bool = True) -> Tensor:
    """The first `dimensions` of each vector [N, D], then of length 1 when `normalize`. Raises ConfigError beyond D."""
    if dimensions is not None:
        if not 1 <= dimensions <= vectors.shape[-1]:
            raise ConfigError(f"dimensions is {dimensions:,}: this model's vectors have {vectors.shape[-1]:,}")
        vectors = vectors[..., :dimensions]
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def _groups(prompts: Sequence[Sequence[int]], rows: int) -> Iterator[list[Sequence[int]]]:
    """Neighbours that have at most `rows` rows together; one that has more is alone."""
    group: list[Sequence[int]] = []
    for ids in prompts:
        if group and sum(map(len, group)) + len(ids) > rows:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group


@torch.inference_mode()
def _short(
    model: Llama, prompts: Sequence[Sequence[int]], pooling: Pooling, virtual: VirtualTokens | None
) -> list[Tensor]:
    """All of them in one forward."""
    device = model.norm.weight.device
    lengths = [len(ids) for ids in prompts]
    tokens = torch.tensor([[i for ids in prompts for i in ids]], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    states = _hidden(model, tokens, positions, packed(model.config, positions), virtual)
    return [part.mean(0) if pooling == "mean" else part[-1] for part in states.split(lengths)]


def _hidden(
    model: Llama, tokens: Tensor, positions: Tensor, see: Sequence[Attend], virtual: VirtualTokens | None
) -> Tensor:
    """Final states [S, D] of whole documents, float32 on the CPU."""
    if virtual is not None:
        see = prefixed(see, virtual.keys, virtual.values, tokens.shape[-1])
        positions = positions + virtual.count
    return model.hidden(model.embed(tokens), positions, see)[0].float().cpu()


def _long(ids: Sequence[int], run: Run, pooling: Pooling, virtual: VirtualTokens | None) -> Tensor:
    """One prompt, piece by piece."""
    first = 0 if virtual is None else virtual.count
    cache: StaticCache | None = None
    total: Tensor | None = None
    for start in range(0, len(ids), ROWS):
        end = min(start + ROWS, len(ids))

        @torch.inference_mode()
        def piece(model: Llama, start: int = start, end: int = end) -> Tensor:
            nonlocal cache
            device = model.norm.weight.device
            tokens = torch.tensor([list(ids[start:end])], device=device)
            positions = torch.arange(start, end, device=device)
            if len(ids) <= ROWS:
                return _hidden(model, tokens, positions, uncached(model.config.n_layers), virtual)
            x = model.embed(tokens)
            if cache is None:
                cache = StaticCache(model.config, max_len=first + len(ids), dtype=x.dtype, device=device)
                if virtual is not None:
                    for to, own in ((cache.k, virtual.keys), (cache.v, virtual.values)):
                        for held, layer in zip(to, own, strict=True):
                            held[0, :first] = layer
            positions = positions + first
            return model.hidden(x, positions, cache.bind(positions, first + end))[0].float().cpu()

        states = run(piece)
        if pooling == "last":
            total = states[-1]
        else:
            total = states.sum(0) if total is None else total + states.sum(0)
    assert total is not None
    return total if pooling == "last" else total / len(ids)
