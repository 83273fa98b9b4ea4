"""Which parameter is moved by which optimiser, at which rate and decay.

| kind      | matrices inside layers | embeddings, output | norms, routers' and other vectors |
|-----------|------------------------|--------------------|-----------------------------------|
| adamw     | AdamW                  | AdamW              | AdamW, no decay                   |
| adamw8bit | AdamW8                 | AdamW8             | AdamW8 (32 bits), no decay        |
| muon      | Muon                   | AdamW              | AdamW, no decay                   |

Only parameters that require gradients are held.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from herd.errors import ConfigError
from herd.train.adamw8 import AdamW8
from herd.train.config import OptimConfig
from herd.train.muon import MATRICES, Muon
from herd.train.schedule import rate, set_rate

__all__ = ["make_optimisers", "rate", "set_rate"]

OUTER = ("tok_embeddings", "output")


def make_optimisers(model: nn.Module, config: OptimConfig, *, part: bool = False) -> list[Optimizer]:
    """The optimisers of `model`: every trained parameter in exactly one group, whose `peak` is its rate before the schedule.

    Works on plain and on sharded (DTensor) parameters. Raises ConfigError when nothing is trained (of a `part`, as a rank of a
    pipeline has, that may be: there is no optimiser then), and for AdamW and Muon on parameters that are not float32: updates
    smaller than half of their last place would be lost.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named and not part:
        raise ConfigError("no parameter of the model is trained: put an adapter in, or let some require gradients")
    narrow = next((name for name, p in named if p.dtype != torch.float32), None)
    if narrow is not None and config.kind != "adamw8bit":
        raise ConfigError(
            f"train.optim.kind={config.kind} moves weights in float32, and {narrow} is not: leave model.dtype out (with "
            "train.precision=bfloat16 products are still of 16 bits), or choose adamw8bit, which rounds stochastically"
        )
    inner = [(n, p) for n, p in named if p.ndim >= 2 and not n.startswith(OUTER)]
    outer = [p for n, p in named if p.ndim >= 2 and n.startswith(OUTER)]
    vectors = [p for _, p in named if p.ndim < 2]
    by_muon = [p for n, p in inner if _is_matrix(n)] if config.kind == "muon" else []
    held = {id(p) for p in by_muon}
    decayed = [p for _, p in inner if id(p) not in held]
    (decayed if config.decay_embeddings else vectors).extend(outer)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    made: list[Optimizer] = []
    if groups and config.kind == "adamw8bit":
        made.append(AdamW8(groups, config.lr, config.betas, config.eps))
    elif groups:
        fused = _fuses([p for group in groups for p in group["params"]])
        made.append(AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused))
    if by_muon:
        dtype = None if config.muon_dtype is None else getattr(torch, config.muon_dtype)
        made.append(Muon(by_muon, config.muon_lr, config.muon_momentum, config.weight_decay, dtype))
    for optimiser in made:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return made


def _is_matrix(name: str) -> bool:
    """Whether Muon is for this parameter: `...attention.wq.weight`, `...experts.w1`; no router, no adapter's factors."""
    parts = name.removesuffix(".weight").split(".")
    return parts[-1] in MATRICES


def _fuses(weights: Sequence[nn.Parameter]) -> bool:
    """Whether torch has one operation for the whole step of these."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in weights)
