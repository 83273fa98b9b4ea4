"""What computes a served LoRA: modules beside the base's own, which add an adapter's change for the rows that have it.

The base's modules are not touched: a twin of the model (`herd.engine.adapters`) has these in their place.

Letters: T rows, D dim, E experts, k experts per token, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from herd.adapters.experts import Change, run_experts
from herd.kernels import native
from herd.model.moe import Experts, MoE
from herd.quant.linear import QuantExperts

__all__ = ["LoraEmbedding", "LoraLinear", "LoraMoE", "LowRank", "Rows"]


@dataclass(slots=True)
class Rows:
    """Which rows of the present forward have which adapter: (name, indices [n] int64, or None for all of them)."""

    groups: tuple[tuple[str, Tensor | None], ...] = ()


class LowRank:
    """A [r, in], scale * B [out, r] and the gain [outputs] in float32, and how they are applied."""

    __slots__ = ("a", "b", "gain", "native_a", "native_b")

    def __init__(self, a: Tensor, b: Tensor, gain: Tensor | None = None) -> None:
        self.a, self.b, self.gain = a, b, gain
        on_cpu = a.device.type == "cpu" and native.isa() is not None
        # The library's products do not depend on how many rows there are.
        self.native_a = native.plain(a) if on_cpu else None
        self.native_b = native.plain(b) if on_cpu else None

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + (0 if self.gain is None else self.gain.nbytes)

    def put_on(self, y: Tensor, change: Tensor) -> Tensor:
        """The base's outputs y [n, outputs] with `change` float32, in y's dtype."""
        if self.gain is None:
            return y + change.to(y.dtype)
        return ((y.float() + change) * self.gain).to(y.dtype)

    def change(self, x: Tensor) -> Tensor:
        """x [n, in] -> [n, out] float32."""
        x = x.float()
        if self.native_a is not None and self.native_b is not None:
            return native.matmul(self.native_b, native.matmul(self.native_a, x))
        return linear(linear(x, self.a), self.b)


class LoraLinear(nn.Module):
    """`base` plus, for some rows, the change of their adapter. x [T, in] -> [T, out]."""

    def __init__(self, base: nn.Module, rows: Rows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.factors: dict[str, LowRank] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for name, rows in self.rows.groups:
            factors = self.factors.get(name)
            if factors is None:
                continue
            if rows is None:
                y = factors.put_on(y, factors.change(x))
            else:
                y[rows] = factors.put_on(y[rows], factors.change(x[rows]))
        return y


class LoraEmbedding(nn.Module):
    """The same for the embedding, whose B [vocab, r] is looked up. tokens [T] -> [T, dim]."""

    def __init__(self, base: nn.Module, rows: Rows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.factors: dict[str, LowRank] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.base(tokens)
        for name, rows in self.rows.groups:
            factors = self.factors.get(name)
            if factors is None:
                continue
            chosen = tokens if rows is None else tokens[rows]
            # A row of its own for every token: the sum does not depend on how many there are.
            change = (factors.b[chosen][:, :, None] * factors.a).sum(1)
            if rows is None:
                y = factors.put_on(y, change)
            else:
                y[rows] = factors.put_on(y[rows], change)
        return y


class LoraMoE(MoE):
    """A layer with experts whose matrices have changes for some rows; `lend` makes one of a plain layer. [T, D] -> [T, D]."""

    rows: Rows
    factors: dict[str, dict[str, Change]]

    @staticmethod
    def lend(module: MoE, rows: Rows) -> None:
        """Make `module`, which nothing else may have, a LoraMoE."""
        module.__class__ = LoraMoE
        module.__dict__ |= {"rows": rows, "factors": {}}

    def run(self, scaled: Tensor, order: Tensor, counts: Tensor) -> Tensor:
        x = scaled[order]
        experts = self.experts
        assert isinstance(experts, Experts | QuantExperts)
        chosen = [(self.factors[name], rows) for name, rows in self.rows.groups if name in self.factors]
        if len(chosen) == 1 and chosen[0][1] is None:
            return run_experts(experts, chosen[0][0], x, counts)
        y = experts(x, counts)
        of = torch.arange(self.n_experts, device=x.device).repeat_interleave(counts, output_size=len(x))
        for changes, rows in chosen:
            assert rows is not None  # only one adapter can have them all
            own = torch.isin(order // self.top_k, rows).nonzero().squeeze(-1)
            if len(own):
                y[own] = run_experts(experts, changes, x[own], of[own].bincount(minlength=self.n_experts))
        return y
