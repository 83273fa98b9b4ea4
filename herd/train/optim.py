"""Optimisers and the learning-rate schedule.

Muon (Jordan et al., 2024, github.com/KellerJordan/Muon): momentum, then the nearest semi-orthogonal matrix by a
Newton-Schulz iteration, so every direction of a weight matrix moves equally far. It is used for the matrices inside the layers;
embeddings (whose rows are looked up, not multiplied as a whole) and norms stay with AdamW.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from herd.train.config import OptimConfig, ScheduleConfig

__all__ = ["Muon", "make_optimisers", "orthogonalise", "rate", "set_rate"]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration from the Muon reference: fast growth of small singular values, limit near 1."""


def rate(config: ScheduleConfig, step: int, progress: float) -> float:
    """Multiplier of every learning rate at `step` (from 0) when `progress` (0 to 1) of the budget is used."""
    warm = 1.0 if config.warmup_steps == 0 else min(1.0, (step + 1) / config.warmup_steps)
    if config.decay_fraction == 0 or progress <= 1 - config.decay_fraction:
        return warm
    left = (1 - progress) / config.decay_fraction
    return warm * (config.final + (1 - config.final) * left)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """The semi-orthogonal matrix nearest to each g [..., M, N], roughly: singular values end between 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g  # the Gram matrix is then of the smaller side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. Matrices only.

    Matrices of one shape are orthogonalised together: many small products would leave the processor idle. The step is scaled
    by sqrt(max(1, rows / columns)), as in the reference, so that tall and wide matrices change their output equally.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                moved = orthogonalise(torch.stack([self._momentum(p, group["momentum"]) for p in params]))
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for p, change in zip(params, moved, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-scale)

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        assert p.grad is not None
        state: dict[str, Any] = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        kept = state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(kept, momentum)


def make_optimisers(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """The optimisers of `model`: every parameter in exactly one group. Norm weights are not decayed."""
    named = list(dict(model.named_parameters()).items())
    norms = [p for _, p in named if p.ndim < 2]
    matrices = [(n, p) for n, p in named if p.ndim >= 2]
    outer = [p for n, p in matrices if n.startswith(("tok_embeddings", "output"))]
    inner = [p for n, p in matrices if not n.startswith(("tok_embeddings", "output"))]
    decayed = outer if config.kind == "muon" else outer + inner
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    made: list[Optimizer] = [AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)]
    if config.kind == "muon":
        made.append(Muon(inner, config.muon_lr, config.muon_momentum, config.weight_decay))
    for optimiser in made:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return made


def set_rate(optimisers: Iterable[Optimizer], scale: float) -> None:
    """Set every group's learning rate to `scale` times its peak."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * scale
