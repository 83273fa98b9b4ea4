"""The exchanges inside a layer that gradients pass through. `group` may hold one rank: then nothing is sent.

| forward                  | backward                 |
|--------------------------|--------------------------|
| `gather`: parts -> whole | summed and cut           |
| `scatter`: summed, cut   | parts -> whole           |

Both cut dimension 1, the positions of [B, S, D].
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

__all__ = ["gather", "scatter"]

_names: Any = functional  # torch 2.13 renamed them
_gather: Any = getattr(_names, "all_gather_single_autograd", None) or _names.all_gather_tensor_autograd
_scatter: Any = getattr(_names, "reduce_scatter_single_autograd", None) or _names.reduce_scatter_tensor_autograd


def gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S / n, ...] of each rank -> [B, S, ...] on all. Gradients of all ranks are summed: each gives its share of them."""
    if group.size() == 1:
        return part
    return functional.wait_tensor(_gather(part.contiguous(), 1, group))


def scatter(summand: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S, ...] of which each rank has a summand -> this rank's [B, S / n, ...] of the sum."""
    if group.size() == 1:
        return summand
    return functional.wait_tensor(_scatter(summand.contiguous(), "sum", 1, group))
