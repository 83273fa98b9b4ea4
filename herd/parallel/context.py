"""Context parallelism: every rank of the cp dimension holds a part of each sequence and attends to all keys.

As in Llama 3 (section 3.3.2 of its paper): a sequence is cut into 2 cp pieces and rank i takes pieces i and 2 cp - 1 - i, so
that each has as many visible keys as every other; keys and values are gathered before attention, which with grouped heads is
little beside the queries. Masks of documents and chunks come from positions, as everywhere in herd. Why not torch's ring
attention: docs/adr/0012.

Letters: B sequences, S positions of whole sequences, H query heads, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from herd.errors import ConfigError
from herd.model.attend import Attend, masked_attention, visible
from herd.model.config import ModelConfig
from herd.parallel.collective import gather

__all__ = ["Gathered", "cut", "join", "packed_over"]


def cut(rows: Tensor, count: int, rank: int) -> Tensor:
    """The two pieces that `rank` of `count` holds of `rows` [B, S, ...]: [B, S / count, ...].

    Raises ConfigError when S has no 2 count equal pieces.
    """
    if rows.shape[1] % (2 * count):
        raise ConfigError(
            f"rows of {rows.shape[1]} tokens cannot be shared by parallel.cp={count}: data.length must be a multiple of "
            f"{2 * count}"
        )
    pieces = rows.chunk(2 * count, 1)
    return torch.cat([pieces[rank], pieces[2 * count - 1 - rank]], 1)


def join(parts: Sequence[Tensor]) -> Tensor:
    """The inverse of `cut`: what all ranks hold, in rank order, as whole rows in their own order."""
    firsts, lasts = zip(*(part.chunk(2, 1) for part in parts), strict=True)
    return torch.cat([*firsts, *reversed(lasts)], 1)


def packed_over(group: dist.ProcessGroup, config: ModelConfig, positions: Tensor) -> Sequence[Attend]:
    """One Attend per layer for this rank's part of packed rows, whose `positions` [B, S / cp] `cut` left."""
    count, rank = group.size(), group.rank()
    parts = [torch.empty_like(positions) for _ in range(count)]
    dist.all_gather(parts, positions.contiguous(), group=group)
    numbered = (join(parts) == 0).cumsum(-1)  # the document of every token
    documents = [cut(numbered, count, other) for other in range(count)]
    of_keys = torch.cat(documents, 1)  # in the order in which keys are gathered
    same = documents[rank][:, :, None] == of_keys[:, None, :]
    masks = {
        chunk: (same & visible(positions, torch.cat(parts, 1), chunk)).unsqueeze(-3)
        for chunk in dict.fromkeys(spec.chunk for spec in config.layers)
    }
    return (Gathered(masks, group),) * config.n_layers


@dataclass(frozen=True, slots=True)
class Gathered:
    """Own queries [B, S / cp, H, Dh] against the keys and values of all ranks; their gradients are summed over the ranks."""

    masks: dict[int | None, Tensor]
    group: dist.ProcessGroup

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        return masked_attention(q, *self.whole(k, v), self.masks[chunk])

    def whole(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of all ranks [B, S, Hkv, Dh], in the order that `masks` counts."""
        keys, values = gather(torch.cat([k, v], -2), self.group).chunk(2, -2)  # one exchange instead of two
        return keys, values
