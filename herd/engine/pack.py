"""From a plan to tensors: the rows of all sequences side by side, and where each finds its keys and values.

Letters: T rows, n spans (one per chunk of the plan), R rows whose logits are wanted.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.engine.scheduler import StepPlan

__all__ = ["RaggedBatch", "pack"]


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """One forward over pieces of many sequences, without padding.

    tokens, positions and slots [T] int64: the id of each row, its position (virtual tokens of an adapter come first), and where
    its key and value go (block * block_size + offset). spans [n, 4] int64: (first row, rows, first position, table) of the rows
    of one sequence; tables [n, width] int32: its blocks in order, then zeros. logit_rows [R] int64, in the order of the plan's
    chunks. `adapters`: one name or None per span; None when no request has one. Those of virtual tokens are not among them:
    what they change is in the cache. `known`: the spans once more, in main memory, so that a GPU need not be asked for them;
    None when only the tensors were made.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    spans: Tensor
    tables: Tensor
    logit_rows: Tensor
    adapters: tuple[str | None, ...] | None = None
    known: tuple[tuple[int, int, int, int], ...] | None = None


def pack(
    plan: StepPlan, block_size: int, device: torch.device | str = "cpu", *, table_width: int | None = None
) -> RaggedBatch:
    """The tensors of a plan that has rows. `table_width` fixes the width of `tables`, for steps whose shapes must not change.

    The copies of the plan are the caller's to make first (`PagedCache.copy`).
    """
    assert plan.rows, "an empty plan is not run"
    tokens, positions, slots, spans, wanted = (array("q") for _ in range(5))
    width = max(len(chunk.blocks) for chunk in plan.rows) if table_width is None else table_width
    tables = array("i")
    for i, chunk in enumerate(plan.rows):
        first, start, blocks = len(tokens), chunk.position, chunk.blocks
        stop = start + chunk.count
        spans.extend((first, chunk.count, start, i))
        tokens.extend(chunk.tokens)
        positions.extend(range(start, stop))
        slots.extend(blocks[p // block_size] * block_size + p % block_size for p in range(start, stop))
        wanted.extend(range(first + chunk.count - chunk.logits, first + chunk.count))
        tables.extend(blocks)
        tables.extend([0] * (width - len(blocks)))
    # One buffer and one transfer for all that is int64; the parts are views.
    sizes = [len(tokens), len(tokens), len(tokens), len(spans), len(wanted)]
    flat = torch.frombuffer(tokens + positions + slots + spans + wanted, dtype=torch.int64).to(device)
    parts = flat.split(sizes)
    adapters = tuple(None if chunk.before else chunk.sequence.request.adapter for chunk in plan.rows)
    return RaggedBatch(
        *parts[:3],
        spans=parts[3].view(-1, 4),
        tables=torch.frombuffer(tables, dtype=torch.int32).view(-1, width).to(device),
        logit_rows=parts[4],
        adapters=adapters if any(name is not None for name in adapters) else None,
        known=tuple(zip(*(iter(spans),) * 4, strict=True)),
    )
