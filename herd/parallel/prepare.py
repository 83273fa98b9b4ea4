"""Every transformation of a model that trains on many ranks, in the one order that works.

tensor parallel -> the caller's own (checkpointing, float8, compile per block: `herd.train.prepare`) -> pipeline -> FSDP. Cutting
first lets the middle see local matrices, and FSDP last gathers what the middle made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from herd.errors import ConfigError
from herd.model.llama import Llama
from herd.parallel import fsdp, tensor
from herd.parallel.mesh import Mesh
from herd.parallel.norm import clip
from herd.parallel.pipeline import Pipeline, Stage, split

__all__ = ["Spread", "prepare"]


@dataclass(frozen=True, slots=True)
class Spread:
    """A model that is ready to train on the ranks of `mesh`."""

    model: Llama
    mesh: Mesh
    pipeline: Pipeline | None = None

    def parameters(self) -> Iterator[nn.Parameter]:
        """What this rank trains: a tied matrix once."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def last(self, last: bool) -> None:
        """Say before each backward pass whether it is a step's last: only then gradients have to be exchanged."""
        fsdp.only_last(self.model, last)

    def give_back(self) -> None:
        """Make every parameter a part again, as optimisers and checkpoints know it, until the next forward pass."""
        fsdp.give_back(self.model)

    def clip(self, limit: float | None) -> Tensor:
        """Clip by the norm of all gradients of all ranks; returns it."""
        return clip(self.parameters(), limit, self.mesh)


def prepare(
    model: Llama,
    mesh: Mesh,
    *,
    middle: Callable[[Llama], object] = lambda model: None,
    dtype: torch.dtype | None = None,
    built: list[Stage] | None = None,
) -> Spread:
    """Spread `model` in place: every rank must hold the same values (the same seed, or the same file).

    `middle` is applied between tensor parallelism and FSDP; `dtype` is what FSDP computes in (None: the parameters' own).
    `built` receives this rank's stages instead of a pipeline being made of them (`herd.parallel.fake`).
    Raises ConfigError for what these ranks cannot share.
    """
    if mesh.part.pp > 1 and not all(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("parallel.pp trains whole models: use parallel.dp_shard for adapters")
    if mesh.devices is not None and mesh.part.tp > 1:
        tensor.shard(model, mesh.along("tp"), experts=mesh.part.experts)
    middle(model)
    stages = split(model, mesh) if mesh.part.pp > 1 else []
    if mesh.devices is not None and mesh.spread:
        fsdp.shard(model, mesh, dtype=dtype, stages=stages)
    if built is not None:
        built += stages
        return Spread(model, mesh)
    return Spread(model, mesh, Pipeline(model, stages, mesh) if stages else None)
