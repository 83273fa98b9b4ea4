"""The same bits whatever runs beside a request, with any kernels: every product is made over the same number of rows.

Matrix kernels are chosen by the shape of their operands, and a row rounds differently in another kernel. So here a step goes
through the model in tiles of always the same number of rows (filled up with copies), and each query attends alone. What a row
computes then depends on nothing but its token, its position and the keys and values before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from herd.engine.pack import RaggedBatch
from herd.engine.paged import PagedCache
from herd.kernels.paged import paged_attention, write_kv, write_kv_int8
from herd.model.attend import Attend
from herd.model.llama import Llama

__all__ = ["TILE", "TiledRunner"]

TILE = 16
"""Rows of a tile: more make prompts faster and single replies slower."""


@dataclass(frozen=True, slots=True)
class _RowByRow:
    """One layer's view of a cache for one tile of `rows` true rows: every query is a span of its own."""

    cache: PagedCache
    layer: int
    rows: int
    slots: Tensor
    spans: Tensor
    tables: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        cache, n = self.cache, self.rows
        keys, values = cache.k[self.layer], cache.v[self.layer]
        scales = (cache.k_scale[self.layer], cache.v_scale[self.layer]) if cache.k_scale else ()
        if scales:
            write_kv_int8(k[:n], v[:n], keys, values, *scales, self.slots)
        else:
            write_kv(k[:n], v[:n], keys, values, self.slots)
        out = torch.zeros_like(q)
        out[:n] = paged_attention(q[:n].contiguous(), keys, values, self.spans, self.tables, chunk, *scales)
        return out


class TiledRunner:
    """A Runner over the model as it is, in tiles. Experts are multiplied with the rows that chose them, so tiles of them are one
    row high.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.tile = 1 if any(spec.moe for spec in model.config.layers) else TILE

    @torch.inference_mode()
    def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """As `Runner.logits`."""
        tables = [table for _, rows, _, table in batch.spans.tolist() for _ in range(rows)]
        states = []
        for first in range(0, len(batch.tokens), self.tile):
            rows = slice(first, min(first + self.tile, len(batch.tokens)))
            positions = batch.positions[rows]
            n = len(positions)
            ones, place = torch.ones_like(positions), torch.arange(n, device=positions.device)
            spans = torch.stack([place, ones, positions, torch.tensor(tables[rows], device=positions.device)], 1)
            see: list[Attend] = [
                _RowByRow(cache, layer, n, batch.slots[rows], spans, batch.tables) for layer in range(len(cache.k))
            ]
            x = self.model.embed(self._full(batch.tokens[rows]))
            states.append(self.model.hidden(x, self._full(positions), see)[:n])
        h = torch.cat(states)[batch.logit_rows]
        parts = h.split(self.tile)
        if not len(h):
            return self.model.output(h).float()
        return torch.cat([self.model.output(self._full(part))[: len(part)] for part in parts]).float()

    def _full(self, rows: Tensor) -> Tensor:
        """`rows` with the last one repeated until the tile is full."""
        missing = self.tile - len(rows)
        return rows if not missing else torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
