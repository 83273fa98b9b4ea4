"""A LoRA adapter as data: for some matrices of a model the two thin factors of a change, W + scale * B A.

With a magnitude it is DoRA: each output keeps a trained length, and the factors only turn it. Names and layout are canonical
(Meta's: RoPE rows interleaved), so an adapter does not depend on the format of its file or of its base.
Sources: Hu et al. 2021; rank-stabilised scaling: Kalajdzievski 2023; DoRA: Liu et al. 2024.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from herd.errors import CheckpointError

__all__ = ["EMBEDDING", "Factors", "LoraAdapter", "changed", "lengths"]

EMBEDDING = "tok_embeddings.weight"
"""The one matrix whose outputs are its columns: rows are looked up."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The change of one matrix [out, in]: `a` [r, in], `b` [out, r], any float dtype; the scale follows from `alpha`.

    Of a layer's E routed experts, whose matrices are one parameter [E, out, in], each has its own: `a` [E, r, in],
    `b` [E, out, r].
    `magnitude` makes it DoRA: the length that every output of the changed matrix gets, [out]; [in] for an embedding, whose
    outputs are columns. Experts have none.
    """

    a: Tensor
    b: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the parameter they change."""
        return (*self.b.shape[:-1], self.a.shape[-1])


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """`factors` by the canonical name of the parameter they change; `whole` are parameters that the adapter replaces outright.

    `rank` and `alpha` are the adapter's usual ones; single matrices may have their own. With `rslora` the scale is alpha /
    sqrt(r) instead of alpha / r. `base` is the name of the model it was trained on, when the file says it. An embedding has
    factors like any matrix: a [r, dim], b [vocab, r]. Either all factors have a magnitude (DoRA) or none has.

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
            alike = pair.a.ndim == pair.b.ndim in (2, 3) and pair.a.shape[:-2] == pair.b.shape[:-2]
            if not alike or pair.rank != pair.b.shape[-1] or pair.rank == 0:
                raise CheckpointError(f"its factors {shapes[0]} and {shapes[1]} do not fit together", tensor=name)
            if not math.isfinite(pair.alpha):
                raise CheckpointError(f"alpha is {pair.alpha}", tensor=name)
            outputs = pair.a.shape[1] if name == EMBEDDING else pair.b.shape[0]
            if pair.magnitude is not None and (pair.a.ndim == 3 or tuple(pair.magnitude.shape) != (outputs,)):
                found = tuple(pair.magnitude.shape)
                raise CheckpointError(f"has a magnitude of shape {found} for {outputs} outputs", tensor=name)
        bare = [name for name, pair in self.factors.items() if pair.magnitude is None]
        if bare and len(bare) < len(self.factors):
            raise CheckpointError("has no magnitude, and other matrices of the adapter have one", tensor=bare[0])

    @property
    def dora(self) -> bool:
        """Whether the factors have magnitudes."""
        return any(pair.magnitude is not None for pair in self.factors.values())

    def scale(self, name: str) -> float:
        """What B A is multiplied with."""
        return self.scale_of(self.factors[name])

    def scale_of(self, pair: Factors) -> float:
        """The same of factors that have the adapter's way of scaling."""
        return pair.alpha / (math.sqrt(pair.rank) if self.rslora else pair.rank)

    def delta(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """scale * B A for the parameter `name`, in its shape and in `dtype`: LoRA's whole change, the first part of DoRA's."""
        pair = self.factors[name]
        return (pair.b.to(dtype) @ pair.a.to(dtype)) * self.scale(name)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """What the parameter `name` becomes, in its shape, float32: `weight` changed, or the tensor that replaces it."""
        if name not in self.factors:
            return self.whole[name].float() if name in self.whole else weight.float()
        start = self.whole.get(name, weight)
        return changed(name, start, self.factors[name], self.scale(name))

    def check(self, shapes: Mapping[str, tuple[int, ...]], path: str | os.PathLike[str] | None = None) -> None:
        """Hold every part against the parameter shapes of a base model; `path` is the file they came from.

        Raises CheckpointError naming the first that differs.
        """
        for name, pair in self.factors.items():
            shape = shapes.get(name)
            if shape is None:
                raise CheckpointError("the base model has no such parameter", path=path, tensor=name)
            if shape != pair.shape:
                raise CheckpointError(
                    f"changes a matrix of shape {pair.shape}, the base model has {shape}", path=path, tensor=name
                )
        for name, tensor in self.whole.items():
            if shapes.get(name) != tuple(tensor.shape):
                found = tuple(tensor.shape)
                raise CheckpointError(f"has shape {found}, the base model {shapes.get(name)}", path=path, tensor=name)


def changed(name: str, weight: Tensor, pair: Factors, scale: float) -> Tensor:
    """W + scale * B A in float32, with DoRA's magnitude put on its outputs. `name` tells an embedding from other matrices."""
    if weight.ndim == 3:  # one expert at a time: the whole is large
        total = weight.to(torch.float32, copy=True)
        for one, b, a in zip(total, pair.b, pair.a, strict=True):
            one.addmm_(b.float(), a.float(), alpha=scale)
        return total
    total = torch.addmm(weight.float(), pair.b.float(), pair.a.float(), alpha=scale)
    if pair.magnitude is None:
        return total
    axis = 0 if name == EMBEDDING else 1
    return total * (pair.magnitude.float() / torch.linalg.vector_norm(total, dim=axis)).unsqueeze(axis)


def lengths(
    name: str,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    squares: Tensor | None = None,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The length of every output of W + scale * B A, [outputs] float32, without making that matrix.

    `squares` are those of W's outputs, when they are known: |w + c|^2 = |w|^2 + 2 w c + |c|^2. Where each of several ranks has
    some inputs of all outputs, `summed` adds over the ranks, and `squares` are those of the whole matrix.
    """
    w, a, b = weight.float(), a.float(), b.float()
    if name == EMBEDDING:  # the same sums with columns for rows
        w, a, b = w.T, b.T, a.T
    squares = w.square().sum(1) if squares is None else squares
    crossed = (torch.nn.functional.linear(w, a) * b).sum(1)
    own = ((b @ (a @ a.T)) * b).sum(1)
    if summed is not None:
        crossed, own = summed(torch.stack([crossed, own]))
    return (squares + 2 * scale * crossed + scale * scale * own).clamp_min(0).sqrt()
