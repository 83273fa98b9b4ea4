"""The few ways in which file formats rearrange a weight, each with its inverse.

All work on views of the mapped file and on outlines alike, so shapes can be asked for without data and without torch.
Letters: E experts, I and O inner and outer width, Dh head_dim.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from herd.checkpoint.outline import Outline
from herd.errors import CheckpointError
from herd.files import short
from herd.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fused", "Interleave", "Shaped", "Stack", "Step", "Transpose", "fitting"]

Shaped = TypeVar("Shaped", "Tensor", Outline)
"""A tensor, or only its shape. (torch gives `unflatten` no types, hence the ignored returns.)"""

Heads = Literal["n_heads", "n_kv_heads"]


class Step(Protocol):
    """One rearrangement: `read` foreign -> canonical, `write` back."""

    def read(self, tensor: Shaped, config: ModelConfig) -> Shaped: ...

    def write(self, tensor: Shaped, config: ModelConfig) -> Shaped: ...


@dataclass(frozen=True, slots=True)
class Interleave:
    """RoPE rows of a query or key matrix [n * Dh, ...]: half-split (Hugging Face) <-> interleaved pairs (Meta)."""

    heads: Heads

    def read(self, tensor: Shaped, config: ModelConfig) -> Shaped:
        return tensor.unflatten(0, (getattr(config, self.heads), 2, -1)).transpose(1, 2).flatten(0, 2)  # pyright: ignore[reportReturnType]

    def write(self, tensor: Shaped, config: ModelConfig) -> Shaped:
        return tensor.unflatten(0, (getattr(config, self.heads), -1, 2)).transpose(1, 2).flatten(0, 2)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True)
class Transpose:
    """Matrices stored [..., in, out] (used as x @ W) <-> [..., out, in]."""

    def read(self, tensor: Shaped, config: ModelConfig) -> Shaped:
        return tensor.transpose(-1, -2)

    def write(self, tensor: Shaped, config: ModelConfig) -> Shaped:
        return tensor.transpose(-1, -2)


@dataclass(frozen=True, slots=True)
class Stack:
    """Experts stacked in two dimensions [E * I, O] <-> [E, I, O]."""

    def read(self, tensor: Shaped, config: ModelConfig) -> Shaped:
        if config.moe is None:
            raise CheckpointError("an expert matrix in a model without experts")
        return tensor.unflatten(0, (config.moe.n_experts, -1))  # pyright: ignore[reportReturnType]

    def write(self, tensor: Shaped, config: ModelConfig) -> Shaped:
        return tensor.flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Fused:
    """Several parameters side by side in one tensor along `axis`; this is part `index`.

    `shares` are the relative sizes, numbers or fields of ModelConfig: with model parallelism each rank's piece is cut in
    the same proportions.
    """

    axis: int
    index: int
    shares: tuple[int | Heads, ...]

    def cut(self, tensor: Shaped, config: ModelConfig) -> Shaped:
        """The part of the fused tensor."""
        shares = [s if isinstance(s, int) else getattr(config, s) for s in self.shares]
        unit, rest = divmod(tensor.shape[self.axis], sum(shares))
        if rest:
            sizes = ":".join(map(str, shares))
            raise CheckpointError(f"{tensor.shape[self.axis]} rows cannot be cut in the proportions {sizes}")
        return tensor.narrow(self.axis, unit * sum(shares[: self.index]), unit * shares[self.index])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """All parts in order -> the fused tensor. Inverse of `cut`."""
        import torch

        return torch.cat(list(parts), dim=self.axis)


@contextmanager
def fitting(
    shape: Sequence[int], canonical: str, *, config: str, path: str | os.PathLike[str], tensor: str
) -> Iterator[None]:
    """Name file and tensor when a stored `shape` cannot be brought into the layout of `canonical`; `config` is a file name."""
    try:
        yield
    except CheckpointError as error:
        why = f"shape {short(tuple(shape))} does not fit {canonical} of the model in {config}"
        raise CheckpointError(why, path=path, tensor=tensor) from error
