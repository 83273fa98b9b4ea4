"""An importance matrix: how much each column of a matrix matters, measured on a text.

The error that rounding a weight makes in an output is the rounding times the input, so over a text it grows with the mean
square of the input of that column. The model is run from its files, layer by layer in float32, and that mean is kept for every
matrix of the layers. Experts have none (their tokens lie inside one fused operation), nor has the output matrix (as in
llama.cpp).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from herd.checkpoint.store import TensorStore
from herd.convert.sample import Sample
from herd.convert.stream import Streamed, of_store
from herd.model.attend import uncached

__all__ = ["WINDOWS", "importance_of"]

WINDOWS = 32
"""Windows of a text that are read: 16,384 tokens."""


@torch.inference_mode()
def importance_of(
    store: TensorStore, sample: Sample, tick: Callable[[int], None] = lambda _: None
) -> dict[str, Tensor]:
    """Canonical name -> mean square of the inputs [columns] float32 over every position of `sample`."""
    run = Streamed(of_store(store, tick=tick))
    states = run.embed(list(sample.windows))
    rotary = run.rope(torch.arange(sample.windows.shape[1]))
    attends = uncached(store.config.n_layers)
    found: dict[str, Tensor] = {}
    for i in range(store.config.n_layers):
        block = run.block(i)
        sums: dict[str, Tensor] = {}
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("router"):
                module.register_forward_pre_hook(_adding(sums, f"layers.{i}.{name}.weight"))
        states = [block(x, rotary, attends[i]) for x in states]
        del block
        found |= {name: (total / sample.windows.numel()).float() for name, total in sums.items()}
    return found


def _adding(sums: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total = inputs[0].double().square_().flatten(0, -2).sum(0)
        sums[name] = sums[name] + total if name in sums else total

    return hook
