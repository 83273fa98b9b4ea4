"""Muon (Jordan et al., 2024, github.com/KellerJordan/Muon): momentum, then the nearest semi-orthogonal matrix by a Newton-Schulz
iteration, so that every direction of a weight matrix moves equally far.

It is for matrices inside the layers (MATRICES); embeddings, whose rows are looked up and not multiplied as a whole, the output,
norms, routers and the thin factors of adapters stay with AdamW.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

__all__ = ["MATRICES", "Muon", "orthogonalise"]

MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
"""What Muon moves: attention, feed-forward, shared and routed experts (each expert's matrix for itself)."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration from the Muon reference: fast growth of small singular values, limit near 1."""


def orthogonalise(g: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """The semi-orthogonal matrix nearest to each g [..., M, N], roughly: singular values end between 0.7 and 1.2.

    Computed in `dtype`; without one in g's dtype on a CPU and, as the reference does, in bfloat16 on a GPU.
    """
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g  # the Gram matrix is then of the smaller side
    if dtype is not None or g.device.type == "cuda":
        x = x.to(dtype or torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. Parameters [..., M, N]: matrices, or stacks of them.

    Matrices of one shape are orthogonalised together: many small products would leave the processor idle. The step is scaled
    by sqrt(max(1, M / N)), as in the reference, so that tall and wide matrices change their output equally.

    Sharded parameters (DTensor) keep their momentum sharded; each rank gathers one matrix after the other, orthogonalises it
    whole and takes its own part: the same numbers as one rank, for the work of all on each.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if isinstance(p.data, DTensor):
                    self._move(p, _sharded(self._momentum(p, group["momentum"]), self.dtype), group)
                else:
                    shapes[p.shape].append(p)
            for params in shapes.values():
                stacked = torch.stack([self._momentum(p, group["momentum"]) for p in params])
                moved = orthogonalise(stacked, dtype=self.dtype)
                for p, change in zip(params, moved, strict=True):
                    self._move(p, change, group)

    def _move(self, p: nn.Parameter, change: Tensor, group: dict[str, Any]) -> None:
        scale = group["lr"] * math.sqrt(max(1.0, p.shape[-2] / p.shape[-1]))
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-scale)

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        assert p.grad is not None
        state: dict[str, Any] = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        kept = state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(kept, momentum)


def _sharded(momentum: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A sharded momentum, gathered, orthogonalised and cut as it was."""
    assert isinstance(momentum, DTensor)
    mesh, placements = momentum.device_mesh, momentum.placements
    whole = orthogonalise(momentum.full_tensor(), dtype=dtype)
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(mesh, placements)
