"""Every transformation of a model that trains on many ranks, in the one order that works.

tensor parallel -> the caller's own (checkpointing, float8, compile per block: `herd.train.prepare`) -> pipeline -> FSDP ->
numbers. Cutting first lets the middle see local matrices, and FSDP gathers what the middle made. A model whose numbers are
promised (`herd.model.late`) gets them at the end, when each rank knows which it holds.
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
from herd.parallel.pipeline import Pipeline, Stage, layers_of, split
from herd.parallel.settle import settle

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
        for root in [self.model] if self.pipeline is None else self.pipeline.stages:
            fsdp.give_back(root)

    def clip(self, limit: float | None) -> Tensor:
        """Clip by the norm of all gradients of all ranks; returns it."""
        return clip(self.parameters(), limit, self.mesh)


def prepare(
    model: Llama,
    mesh: Mesh,
    *,
    middle: Callable[[Llama], object] = lambda model: None,
    tick: Callable[[int, int], None] | None = None,
    dtype: torch.dtype | None = None,
    built: list[Stage] | None = None,
) -> Spread:
    """Spread `model` in place: every rank must hold, or promise, the same values (the same seed, or the same file).

    `middle` is applied between tensor parallelism and FSDP; `tick` is told how far the numbers are, as by `settle`; `dtype` is
    what FSDP computes in (None: the parameters' own). `built` receives this rank's stages instead of a pipeline being made of
    them (`herd.parallel.fake`). Raises ConfigError for what these ranks cannot share.
    """
    if mesh.part.pp > 1:
        _in_layers(model, mesh)
    if mesh.devices is not None and mesh.part.tp > 1:
        tensor.shard(model, mesh.along("tp"), experts=mesh.part.experts)
    middle(model)
    weight = getattr(model.output, "weight", None)
    tied = model.config.tie_embeddings and weight is not None and weight.requires_grad
    stages = split(model, mesh) if mesh.part.pp > 1 else []
    if mesh.devices is not None and mesh.spread:
        fsdp.shard(model, mesh, dtype=dtype, stages=stages)
    if built is not None:
        built += stages
        return Spread(model, mesh)
    settle(model, tick=tick)
    if mesh.devices is not None and mesh.part.tp > 1 and not mesh.spread:
        tensor.sum_gradients(model)
    return Spread(model, mesh, Pipeline(model, stages, mesh, tied=tied) if stages else None)


def _in_layers(model: Llama, mesh: Mesh) -> None:
    """Refuse what trains outside of the layers and the two ends, and a beginning that no gradient reaches.

    In later stages nothing has to train: gradients pass through.
    """
    names = [name.split(".") for name, parameter in model.named_parameters() if parameter.requires_grad]
    last = model.config.n_layers - 1
    ends = {"tok_embeddings": 0, "prompt": 0, "norm": last, "output": last}
    outside = [".".join(parts) for parts in names if parts[0] not in ("layers", "prefix", *ends)]
    if outside:
        raise ConfigError(
            f"parallel.pp cannot share {outside[0]}: use parallel.dp_shard or parallel.tp for this method"
        )
    trained = {ends[parts[0]] if parts[0] in ends else int(parts[1]) for parts in names}
    first = layers_of(model.config.n_layers, mesh.part.pp * mesh.part.stages)[0]
    if not trained & set(first):
        raise ConfigError(
            f"parallel.pp: in layers {first.start} to {first.stop - 1}, the first stage, nothing trains: choose targets there, "
            "too (method.targets), or fewer stages"
        )
