"""A LoRA adapter as data: for some matrices of a model the two thin factors of a change, W + scale * B A.

Names and layout are canonical (Meta's: RoPE rows interleaved), so an adapter does not depend on the format of its file or of
its base. Source: Hu et al. 2021; rank-stabilised scaling: Kalajdzievski 2023.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from herd.errors import CheckpointError

__all__ = ["Factors", "LoraAdapter"]


@dataclass(frozen=True, slots=True)
class Factors:
    """The change of one matrix [out, in]: `a` [r, in], `b` [out, r], any float dtype; the scale follows from `alpha`."""

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """`factors` by the canonical name of the parameter they change; `whole` are parameters that the adapter replaces outright.

    `rank` and `alpha` are the adapter's usual ones; single matrices may have their own. With `rslora` the scale is alpha /
    sqrt(r) instead of alpha / r. `base` is the name of the model it was trained on, when the file says it. An embedding has
    factors like any matrix: a [r, dim], b [vocab, r]. DoRA's magnitudes are not held: readers refuse them.

    Raises CheckpointError when the factors of a matrix do not fit together, or a scale is not a finite number.
    """

    factors: Mapping[str, Factors]
    rank: int
    alpha: float
    rslora: bool = False
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    base: str | None = None

    def __post_init__(self) -> None:
        for name, pair in self.factors.items():
            shapes = tuple(pair.a.shape), tuple(pair.b.shape)
            if pair.a.ndim != 2 or pair.b.ndim != 2 or pair.a.shape[0] != pair.b.shape[1] or pair.rank == 0:
                raise CheckpointError(f"its factors {shapes[0]} and {shapes[1]} do not fit together", tensor=name)
            if not math.isfinite(pair.alpha):
                raise CheckpointError(f"alpha is {pair.alpha}", tensor=name)

    def scale(self, name: str) -> float:
        """What B A is multiplied with."""
        pair = self.factors[name]
        return pair.alpha / (math.sqrt(pair.rank) if self.rslora else pair.rank)

    def delta(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * B A, the change of the parameter `name` [out, in], computed in `dtype`."""
        pair = self.factors[name]
        return (pair.b.to(dtype) @ pair.a.to(dtype)) * self.scale(name)

    def check(self, shapes: Mapping[str, tuple[int, ...]], path: str | os.PathLike[str] | None = None) -> None:
        """Hold every part against the parameter shapes of a base model; `path` is the file they came from.

        Raises CheckpointError naming the first that differs.
        """
        for name, pair in self.factors.items():
            shape = shapes.get(name)
            if shape is None:
                raise CheckpointError("the base model has no such parameter", path=path, tensor=name)
            found = (pair.b.shape[0], pair.a.shape[1])
            if shape != found:
                raise CheckpointError(
                    f"changes a matrix of shape {found}, the base model has {shape}", path=path, tensor=name
                )
        for name, tensor in self.whole.items():
            if shapes.get(name) != tuple(tensor.shape):
                found = tuple(tensor.shape)
                raise CheckpointError(f"has shape {found}, the base model {shapes.get(name)}", path=path, tensor=name)
