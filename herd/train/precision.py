"""bfloat16 products over float32 weights.

| float32                                                | bfloat16                                             |
|--------------------------------------------------------|------------------------------------------------------|
| weights that are trained, their gradients after each   | a copy of each weight for the moment of its product, |
| micro-batch, optimiser states, the loss and its        | activations, their gradients, each product's weight  |
| softmax, norms' and rotary arithmetic, sums inside     | gradient before it is added up                       |
| products                                               |                                                      |

It is what FSDP2's mixed precision computes with param_dtype=bfloat16 and gradients reduced in float32, so one rank and many
agree. No loss scaling is needed: bfloat16 has float32's range. Layers keep names and parameters; only their class is another.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from herd.adapters.apply import LowRankLinear
from herd.kernels import dense
from herd.kernels.grouped import grouped_linear
from herd.model.llama import Llama
from herd.model.moe import Experts
from herd.model.norm import RMSNorm, normed

__all__ = ["compute_in", "compute_plainly", "computed_in"]


class NarrowLinear(nn.Linear):
    """x W^T in x's dtype, whatever the weight's."""

    known = narrows = True

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return linear(input, self.weight.to(input.dtype), bias)


class WideLinear(nn.Linear):
    """x W^T in float32, by whichever library is faster (`herd.kernels.dense`)."""

    known = True

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is None and dense.fits(input, self.weight):
            return dense.linear(input, self.weight)
        return super().forward(input)


class NarrowEmbedding(nn.Embedding):
    """Rows in bfloat16: here activations become narrow."""

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.weight).to(torch.bfloat16)


class NarrowNorm(RMSNorm):
    """RMSNorm whose weight is rounded to x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.weight.to(x.dtype), self.eps)


class NarrowExperts(Experts):
    """Experts with products in x's dtype."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        w1, w2, w3 = (w.to(x.dtype) for w in (self.w1, self.w2, self.w3))
        return grouped_linear(silu(grouped_linear(x, w1, counts)) * grouped_linear(x, w3, counts), w2, counts)


class NarrowLowRank(LowRankLinear):
    """A LoRA layer whose factors multiply in x's dtype. DoRA's gain stays float32."""

    def forward(self, x: Tensor) -> Tensor:
        if (together := self.at_once(x)) is not None:
            return together
        if self.magnitude is not None:
            return super().forward(x)
        base = self.base_product(x)
        inner = linear(self.dropped(x), self.a.to(x.dtype))
        return base.add(linear(inner, self.b.to(x.dtype)), alpha=self.scale)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a.to(x.dtype), self.b.to(x.dtype)


_NARROW: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: NarrowLinear,
    nn.Embedding: NarrowEmbedding,
    RMSNorm: NarrowNorm,
    Experts: NarrowExperts,
    LowRankLinear: NarrowLowRank,
}
_PLAIN = {narrow: plain for plain, narrow in _NARROW.items()} | {WideLinear: nn.Linear}


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make `model` compute in `dtype` (float32: its own dtypes, bfloat16), in place; parameters stay as they are."""
    compute_plainly(model)
    if dtype == torch.bfloat16:
        for module in model.modules():
            if type(module) in _NARROW:
                module.__class__ = _NARROW[type(module)]
            elif hasattr(type(module), "narrow"):  # what made the layer another kind knows how
                module.narrow = True  # type: ignore[assignment]
    elif dense.available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = WideLinear


def computed_in(model: Llama) -> torch.dtype:
    """What the activations of `model` are: not the dtype of its weights after `compute_in` bfloat16."""
    table = getattr(model.tok_embeddings, "base", model.tok_embeddings)  # of an adapter
    narrow = isinstance(table, NarrowEmbedding) or getattr(table, "narrow", False)
    return torch.bfloat16 if narrow else model.norm.weight.dtype


def compute_plainly(model: nn.Module) -> None:
    """Undo it."""
    for module in model.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
        elif hasattr(type(module), "narrow"):
            module.narrow = False  # type: ignore[assignment]
