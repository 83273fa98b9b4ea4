"""Weight initialisation: one function, read like a table.

| parameter                                   | distribution                            |
|---------------------------------------------|-----------------------------------------|
| norm weights                                | 1                                       |
| tok_embeddings                              | normal, std 1 (0.02 when tied)          |
| output (untied)                             | normal, std dim^-0.5, cut at 3 std      |
| wq wk wv, w1, router, experts w1            | normal, std 0.02, cut at 3 std          |
| wo w2 w3, experts w2 w3                     | normal, std 0.02 / sqrt(2 * n_layers)   |

The depth-scaled residual writers keep the sum over layers at the scale of one layer, as in torchtitan's and GPT-2's init.

`init_weights` fills a model from the global random state. `drawn` makes a part of one parameter from a seed, its name and where
the part is: a rank that holds a part of a model draws that part, and all parts together are the one model of the seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import product
from math import prod

import torch
from torch import Tensor, nn

from herd.model.config import ModelConfig
from herd.model.late import Index
from herd.model.llama import Llama

__all__ = ["drawn", "init_weights"]

STD = 0.02
RESIDUAL = ("wo.weight", "w2.weight", "w3.weight", "experts.w2", "experts.w3")
BLOCK = 1 << 16
"""Numbers, about, that are drawn from one generator: a few rows. Another value makes other models of the same seeds."""


def init_weights(model: Llama) -> Llama:
    """Fill every parameter of `model` in place from the global random state; returns it."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            nn.init.ones_(weight)
        else:
            _draw(weight, name, model.config)
    return model


def drawn(seed: int, name: str, shape: tuple[int, ...], config: ModelConfig, index: Index | None = None) -> Tensor:
    """The part `index` of the parameter `name` of `shape` in a model of `config`, float32 on the CPU.

    Rows are drawn in blocks from generators of their own, so that a part costs hardly more than it holds.
    """
    index = tuple(slice(0, size) for size in shape) if index is None else index
    out = torch.empty([part.stop - part.start for part in index])
    if len(shape) == 1 or not out.numel():
        return out.fill_(1)
    width, flat = shape[-1], out.view(-1, out.shape[-1])
    block = max(1, BLOCK // width)
    filled = 0
    for first, last in _runs(shape[:-1], index[:-1]):
        for at in range(first // block, -(-last // block)):
            rows = torch.empty(min(block, prod(shape[:-1]) - at * block), width)
            _draw(rows, name, config, _generator(seed, name, at))
            start, stop = max(first, at * block), min(last, (at + 1) * block)
            flat[filled : filled + stop - start] = rows[start - at * block : stop - at * block, index[-1]]
            filled += stop - start
    return out


def _runs(shape: tuple[int, ...], index: Index) -> Iterator[tuple[int, int]]:
    """Rows (first, behind the last) of neighbours that a part has, counted over all dimensions but the last one."""
    *outer, last = index
    if last.stop <= last.start:
        return
    for place in product(*(range(part.start, part.stop) for part in outer)):
        base = 0
        for size, at in zip(shape, (*place, 0), strict=True):
            base = base * size + at
        yield base + last.start, base + last.stop


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    word = hashlib.sha256(f"{seed} {name} {block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(word[:8], "big"))


def _draw(weight: Tensor, name: str, config: ModelConfig, generator: torch.Generator | None = None) -> None:
    """Fill a matrix, or rows of one, in place."""
    if name == "tok_embeddings.weight":
        nn.init.normal_(weight, std=STD if config.tie_embeddings else 1.0, generator=generator)
    elif name == "output.weight":
        _cut_normal(weight, config.dim**-0.5, generator)
    else:
        _cut_normal(weight, STD / (2 * config.n_layers) ** 0.5 if name.endswith(RESIDUAL) else STD, generator)


def _cut_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)
