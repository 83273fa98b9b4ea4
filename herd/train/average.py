"""Averages of weights: along a run (exponential, or of its last part), and of finished checkpoints ("soup").

Averages are float32 whatever the weights are, and hold only what is trained. Llama 3 averages checkpoints of its annealing
(arXiv 2407.21783, 3.4.3), which `tail` is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from herd.adapters.apply import trained
from herd.errors import ConfigError
from herd.train.config import AveragePart

__all__ = ["Average", "soup"]


class Average:
    """The average of what `model` trains. Until the first update it is empty, and `swapped` changes nothing.

    Over several ranks each holds the average of its parts: parameters must be parts whenever it is asked (`Spread.give_back`).
    """

    def __init__(self, model: nn.Module, config: AveragePart) -> None:
        self.model, self.config = model, config
        self.count = 0
        self.held: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int, progress: float) -> None:
        """Take the weights in after `step` (from 1), when `progress` (0 to 1) of the budget is used.

        ema: average = decay * average + (1 - decay) * weights, beginning with the first weights that are taken in; the decay is
        at most (1 + n) / (10 + n) at the n-th update, so that a short run is not all beginning. tail: the plain mean from
        `start` on.
        """
        if step % self.config.every_steps or (self.config.kind == "tail" and progress < self.config.start):
            return
        if self.config.kind == "tail":
            share = 1 / (self.count + 1)
        else:
            share = 1 - min(self.config.decay, (1 + self.count) / (10 + self.count))
        for name, weight in trained(self.model).items():
            if name not in self.held:
                self.held[name] = weight.detach().float().clone()
            else:
                _local(self.held[name]).lerp_(_local(weight.detach()).float(), share)
        self.count += 1

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold, by name: "average.<parameter>" and "average.count"."""
        return {"average.count": torch.tensor(self.count)} | {f"average.{n}": t for n, t in self.held.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors()` of another moment: exactly."""
        self.count = int(tensors["average.count"])
        found = {n.removeprefix("average."): t for n, t in tensors.items() if n.startswith("average.")}
        self.held = {n: t.clone() for n, t in found.items() if n != "count"}

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the average inside, for evaluation and export, and its own weights again after."""
        own = {name: weight.detach().clone() for name, weight in trained(self.model).items() if name in self.held}
        try:
            self._give(self.held)
            yield
        finally:
            self._give(own)

    @torch.no_grad()
    def _give(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in trained(self.model).items():
            if name in weights:
                _local(weight.detach()).copy_(_local(weights[name]))


def _local(weight: Tensor) -> Tensor:
    """What is on this rank: averages are cut as their weights are."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def soup(models: Sequence[Mapping[str, Tensor]], shares: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of the tensors of several checkpoints, added up in float32, in the first one's dtypes.

    `shares` default to equal ones and are divided by their sum. Raises ConfigError for checkpoints of different tensors.
    """
    if not models:
        raise ConfigError("soup: give at least one checkpoint")
    parts = [1.0] * len(models) if shares is None else list(shares)
    if len(parts) != len(models) or not sum(parts) or any(part < 0 for part in parts):
        raise ConfigError(f"soup: {len(models)} checkpoints and shares {parts}: give one share of at least 0 for each")
    first = models[0]
    for at, other in enumerate(models[1:], 2):
        names = sorted(first.keys() ^ other.keys())
        names += [n for n in first if n in other and first[n].shape != other[n].shape]
        if names:
            raise ConfigError(f"soup: checkpoint {at} is of another model: {', '.join(names[:3])} differ")
    whole = sum(parts)
    mixed: dict[str, Tensor] = {}
    for name, tensor in first.items():
        total = torch.zeros_like(tensor, dtype=torch.float32)
        for model, part in zip(models, parts, strict=True):
            total.add_(model[name].float(), alpha=part / whole)
        mixed[name] = total.to(tensor.dtype)
    return mixed
