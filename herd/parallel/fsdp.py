"""Fully sharded data parallelism: every rank holds a part of each parameter, its gradient and its optimiser state (FSDP2).

One unit for each block, one for the embedding, one for the output, and the model itself for the final norm: also for embedding
and output when they are one matrix, and for everything where layers are passed through twice. Gradients are SUMMED over ranks,
not averaged: the trainer divides by the supervised tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from herd.model.llama import Llama
from herd.parallel.pipeline import Stage

if TYPE_CHECKING:
    from herd.parallel.mesh import Mesh

__all__ = ["give_back", "only_last", "shard"]


def shard(model: Llama, mesh: Mesh, *, dtype: torch.dtype | None = None, stages: Sequence[Stage] = ()) -> None:
    """Shard `model` in place over the ranks of dp_shard and cp, with copies over dp_replicate; in a pipeline its `stages`.

    With `dtype`, forward and backward compute in it from parameters that stay as they are, and gradients are reduced in fp32;
    without, everything is in the parameters' own type. Call the model through `embed`, `hidden`, `output` and itself only.
    """
    devices = mesh.shards()
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype is not None else None, cast_forward_inputs=False
    )

    def one(module: nn.Module, *, reshard: bool) -> None:
        fully_shard(module, mesh=devices, reshard_after_forward=reshard, mp_policy=policy)
        object.__setattr__(module, "herd_reshard", reshard)

    # Prompt tuning passes through the layers twice, and FSDP gives them back after the first backward pass: all is one unit.
    twice = getattr(model, "passes_twice", False)
    roots: Sequence[Llama | Stage] = stages or [model]
    for root in roots:
        for block in () if twice else root.layers:
            one(block, reshard=mesh.part.reshard)
        # The output is used once for every chunk of the loss: it stays whole until its gradient is there. One that is the
        # embedding is used at both ends of a pass, as the root is, which stays whole throughout.
        ends: list[nn.Module] = [end for end in (root.tok_embeddings, root.output) if end is not None]
        if not twice and not (model.config.tie_embeddings and len(ends) == 2):
            for end in ends:
                one(end, reshard=end is root.tok_embeddings and mesh.part.reshard)
        one(root, reshard=False)
        if isinstance(root, Llama):
            for method in ("embed", "hidden"):
                register_fsdp_forward_method(root, method)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # a plain sum; gloo has no scaled one


def only_last(model: nn.Module, last: bool) -> None:
    """Whether the backward passes that follow reduce gradients: only that of a step's last micro-batch has to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def give_back(model: nn.Module) -> None:
    """Back to parts: after an evaluation some parameters are whole, and other objects.

    FSDP takes itself to be before a backward pass after an evaluation, where it keeps what it was told to keep.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
            module.set_reshard_after_forward(cast(Any, module).herd_reshard, recurse=False)
