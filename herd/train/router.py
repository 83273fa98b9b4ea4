"""Losses and figures of routers (mixture of experts), collected while a model runs; a model without watch pays nothing.

Load balancing as in Switch Transformer (arXiv 2101.03961) and Mixtral's code: experts * sum over experts of (share of choices
that fell on it * mean of its softmax probability), which is top_k when all get the same. z-loss as in ST-MoE (arXiv 2202.08906):
mean of logsumexp(logits)^2, which keeps logits small. What Llama 4 was trained with is not published; its gates are sigmoids,
which these losses do not touch: they look at the router's logits.

Letters: T tokens, E experts, k experts a token, L layers with experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from herd.model.moe import MoE

__all__ = ["FIGURES", "Routed", "Routers", "Staged", "balance_loss", "z_loss"]

FIGURES: tuple[str, ...] = ("router_balance", "router_z", "expert_load", "expert_idle")


def balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """E * sum_e share_e * probability_e of logits [T, E]: scalar float32, top_k when even, E at most."""
    wide = logits.float()
    return wide.shape[-1] * (_shares(wide, top_k) * wide.softmax(-1).mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean of logsumexp(logits)^2 over tokens: scalar float32."""
    return logits.float().logsumexp(-1).square().mean()


def _shares(logits: Tensor, top_k: int) -> Tensor:
    """How many of the top k choices fell on each expert, per token: [E], sums to top_k. Carries no gradient."""
    chosen = logits.detach().topk(top_k, dim=-1).indices
    counts = torch.zeros(logits.shape[-1], device=logits.device)
    return counts.scatter_add(0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=torch.float32)) / len(logits)


@dataclass(frozen=True, slots=True)
class Routed:
    """What one pass through the model gave: means over its layers with experts."""

    extra: Tensor
    """The weighted losses, scalar."""
    figures: dict[str, Tensor]
    """router_balance and router_z (the losses unweighted), expert_load (most loaded expert over the mean: 1 is even),
    expert_idle (share of experts that nothing went to)."""


class Routers:
    """Watches the routers of `model`. Use `watching()` around a forward pass, then `take()`.

    Works with activation checkpointing (the second pass is not collected) and with blocks that are compiled. Of a part of a
    model (a stage of a pipeline, whose `config` is the whole one's), losses and figures are this part's share of the means.
    """

    def __init__(self, model: nn.Module, aux: float, z: float) -> None:
        self.aux, self.z = aux, z
        self.top_k: list[int] = []
        self.logits: dict[int, Tensor] = {}
        self.open = False
        self._handles = []
        for at, moe in enumerate(m for m in model.modules() if isinstance(m, MoE)):
            self.top_k.append(moe.top_k)
            self._handles.append(moe.router.register_forward_hook(_Keep(self, at)))
        config = getattr(model, "config", None)
        self.layers = len(self.top_k) if config is None else sum(spec.moe for spec in config.layers)

    def __bool__(self) -> bool:
        """Whether the model has experts at all, here or on another rank of a pipeline."""
        return self.layers > 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Collect what routers say inside."""
        self.logits.clear()
        self.open = True
        try:
            yield
        finally:
            self.open = False

    def take(self) -> Routed:
        """Losses and figures of the pass that was watched; forgets it."""
        layers = [(self.logits[at].flatten(0, -2), k) for at, k in enumerate(self.top_k)]
        self.logits.clear()
        balance = torch.stack([balance_loss(logits, k) for logits, k in layers]).sum() / self.layers
        z = torch.stack([z_loss(logits) for logits, _ in layers]).sum() / self.layers
        shares = torch.stack([_shares(logits, k) / k for logits, k in layers])
        load, idle = shares.amax(-1) * shares.shape[-1], (shares == 0).float().mean(-1)
        values = balance.detach(), z.detach(), load.sum() / self.layers, idle.sum() / self.layers
        figures: dict[str, Tensor] = dict(zip(FIGURES, values, strict=True))
        return Routed(self.aux * balance + self.z * z, figures)

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()


class Staged:
    """The routers of one stage of a pipeline (`herd.parallel.pipeline.Beside`): their losses are added where they are.

    `shares`, set before each step, has the weight of each micro-batch in the step; `figures` has those of each one after it.
    """

    def __init__(self, stage: nn.Module, whole: Routers) -> None:
        self.own = Routers(stage, whole.aux, whole.z)
        self.shares: Sequence[float] = ()
        self.figures: dict[int, dict[str, Tensor]] = {}

    def __call__(self, run: Callable[[], Tensor], index: int) -> tuple[Tensor, Tensor]:
        with self.own.watching():
            x = run()
            routed = self.own.take()
        self.figures[index] = routed.figures
        return x, routed.extra * self.shares[index]


class _Keep:
    def __init__(self, home: Routers, at: int) -> None:
        self.home, self.at = home, at

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        if self.home.open:
            self.home.logits[self.at] = logits
