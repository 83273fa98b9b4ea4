"""What is learned: from a model and a batch to a sum of losses, and the count that the sum is divided by.

An objective gives sums, never means: the trainer counts what is learned in all micro-batches of all ranks first and divides once,
so that one batch of B rows and B batches of one row are the same step.

Letters: B rows, S row length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from herd.data.batch import TokenBatch
from herd.data.encode import IGNORE
from herd.model.attend import Attend, packed
from herd.model.config import ModelConfig
from herd.model.llama import Llama
from herd.train.losses import linear_cross_entropy
from herd.train.router import Routers

__all__ = ["Loss", "NextToken", "Objective", "at_the_end"]


@dataclass(frozen=True, slots=True)
class Loss:
    """What one micro-batch gives. All tensors are scalars, and sums over its supervised tokens.

    `total` in nats; `extra` is added to it for the gradient and not for the loss that is reported (already weighted, for example
    the losses of routers); `metrics` are divided by the same count and reported.
    """

    total: Tensor
    supervised: int
    metrics: dict[str, Tensor] = field(default_factory=dict)
    extra: Tensor | None = None

    @property
    def descended(self) -> Tensor:
        """What gradients are taken of."""
        return self.total if self.extra is None else self.total + self.extra


class Objective(Protocol):
    """A loss over batches. It reads the model and changes nothing."""

    def count(self, batch: TokenBatch) -> int:
        """How many tokens of `batch` carry loss; no pass through the model."""
        ...

    def __call__(self, model: Llama, batch: TokenBatch) -> Loss: ...


@dataclass(frozen=True, slots=True)
class NextToken:
    """-log p of every label that is not IGNORE; documents packed into a row do not see each other.

    `chunk` bounds the logits held at once, in positions (None: chosen, see `herd.train.losses.chunk_for`). `attend` makes the
    attention of all layers from positions; with several ranks it is `Mesh.packed`. `routers` adds the losses of the model's
    routers, and their figures, see `herd.train.router`.
    """

    chunk: int | None = None
    attend: Callable[[ModelConfig, Tensor], Sequence[Attend]] = packed
    routers: Routers | None = None

    def count(self, batch: TokenBatch) -> int:
        return int((batch.labels != IGNORE).sum())

    def __call__(self, model: Llama, batch: TokenBatch) -> Loss:
        see, supervised = self.attend(model.config, batch.positions), self.count(batch)
        watching = self.routers.watching() if self.routers else contextlib.nullcontext()
        with watching:
            hidden = model.hidden(model.embed(batch.tokens), batch.positions, see)
            routed = self.routers.take() if self.routers else None
        total = linear_cross_entropy(hidden, batch.labels, model.output, self.chunk)
        if routed is None:
            return Loss(total, supervised)
        # Means over tokens so far: sums are what accumulates.
        return Loss(
            total, supervised, {k: v * supervised for k, v in routed.figures.items()}, routed.extra * supervised
        )


def at_the_end(objective: Objective) -> Objective:
    """`objective` for the last stage of a pipeline: routers of other stages say nothing there."""
    return replace(objective, routers=None) if isinstance(objective, NextToken) else objective
