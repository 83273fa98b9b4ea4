"""The gradient norm of a model that is spread over ranks, as one number that all ranks agree on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from herd.parallel.mesh import Mesh

__all__ = ["clip", "global_norm"]


def global_norm(parameters: Iterable[Tensor], mesh: Mesh) -> Tensor:
    """The 2-norm of all gradients, fp32 scalar. Each number counts once, wherever it is and however many copies there are.

    `parameters` are this rank's, of its layers only when there is a pipeline.
    """
    by_cut: dict[tuple[str, ...], list[Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or getattr(parameter, "herd_counted_elsewhere", False):
            continue
        local, cut = gradient, ()
        if isinstance(gradient, DTensor):
            names = gradient.device_mesh.mesh_dim_names or ()
            cut = tuple(
                sorted(name for name, p in zip(names, gradient.placements, strict=True) if not p.is_replicate())
            )
            local = gradient.to_local()
        by_cut.setdefault(cut, []).append(local.float())
    if mesh.devices is None:
        return nn.utils.get_total_norm([part for parts in by_cut.values() for part in parts])
    total = torch.zeros((), device=mesh.device)
    for cut in mesh.cuts():  # the same order on all ranks, also where a rank has none of a kind
        parts = by_cut.pop(cut, [])
        squares = torch.zeros((), device=mesh.device)
        if parts:
            squares = squares + nn.utils.get_total_norm(parts).square()
        for name in cut:
            dist.all_reduce(squares, group=mesh.group(name))
        total = total + squares
    assert not by_cut, f"gradients cut along {list(by_cut)}"
    if mesh.part.pp > 1:
        dist.all_reduce(total, group=mesh.group("pp"))
    return total.sqrt()


def clip(parameters: Iterable[Tensor], limit: float | None, mesh: Mesh) -> Tensor:
    """Scale gradients in place so that their norm is at most `limit` (None: only measure). Returns the norm before."""
    own = [p for p in parameters if p.grad is not None]
    norm = global_norm(own, mesh)
    if limit is not None:
        for parameter in own:
            assert parameter.grad is not None
            local = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            local.mul_((limit / (norm + 1e-6)).clamp(max=1.0).to(local.device))
    return norm
