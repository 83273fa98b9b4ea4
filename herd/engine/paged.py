"""Keys and values of many sequences in one pool of blocks: what `herd.engine.blocks` counts, as tensors.

Letters: T rows, H query heads, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from herd.engine.pack import RaggedBatch
from herd.errors import ConfigError
from herd.kernels.paged import paged_attention, write_kv, write_kv_int8
from herd.model.attend import Attend
from herd.model.config import ModelConfig

__all__ = ["KV_DTYPES", "Layer", "PagedAttend", "PagedCache", "block_bytes", "blocks_for"]

KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""What a cache can hold. int8 keeps a float32 scale per position and head beside it."""


def block_bytes(config: ModelConfig, block_size: int = 16, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of one block of all layers, keys, values and scales. Raises ConfigError for a dtype that no cache has."""
    if dtype not in KV_DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in KV_DTYPES)
        raise ConfigError(f"a cache cannot hold {str(dtype).removeprefix('torch.')}: choose one of {names}")
    head = config.head_dim * dtype.itemsize + (torch.float32.itemsize if dtype == torch.int8 else 0)
    return 2 * config.n_layers * block_size * config.n_kv_heads * head


def blocks_for(nbytes: int, config: ModelConfig, block_size: int = 16, dtype: torch.dtype = torch.bfloat16) -> int:
    """How many blocks fit into `nbytes`."""
    return nbytes // block_bytes(config, block_size, dtype)


class Layer(NamedTuple):
    """Keys and values of one layer of a `PagedCache`; scales with int8."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


LAZY = 1 << 20
"""Bytes of a tensor from which on its memory is taken page by page."""


@dataclass(frozen=True, slots=True)
class PagedAttend:
    """One layer's view of a PagedCache for one step: writes the new keys and values, attends over each sequence's blocks.

    k, v [blocks, block_size, Hkv, Dh]; scales [blocks, block_size, Hkv] with int8. Slots, spans and tables are the batch's.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    slots: Tensor
    spans: Tensor
    tables: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        assert q.ndim == 3, "a ragged batch has no batch dimension: [T, H, Dh]"
        if self.k_scale is None or self.v_scale is None:
            write_kv(k, v, self.k, self.v, self.slots)
        else:
            write_kv_int8(k, v, self.k, self.v, self.k_scale, self.v_scale, self.slots)
        return paged_attention(q, self.k, self.v, self.spans, self.tables, chunk, self.k_scale, self.v_scale)


class PagedCache:
    """`blocks` blocks of `block_size` positions for every layer, in a dtype of KV_DTYPES, zero at first.

    `k` and `v` are lists of [blocks, block_size, Hkv, Dh], one per layer; `k_scale` and `v_scale` of [blocks, block_size, Hkv]
    float32 with int8, else empty. Which block belongs to whom is the block pool's affair. `spare` adds one more block behind
    them, `scratch`, which is nobody's: recorded steps of a GPU let rows write there that stand for no sequence. Raises
    ConfigError.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        blocks: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        spare: bool = False,
    ) -> None:
        block_bytes(config, block_size, dtype)
        if blocks < 1 or block_size < 1:
            raise ConfigError(f"a cache of {blocks} blocks of {block_size} positions holds nothing")
        self.config, self.blocks, self.block_size, self.dtype = config, blocks, block_size, dtype
        self.device = torch.device(device)
        self.scratch = blocks if spare else None
        shape = (blocks + spare, block_size, config.n_kv_heads, config.head_dim)
        layers = range(config.n_layers)
        self.k = [_zeros(shape, dtype, self.device) for _ in layers]
        self.v = [_zeros(shape, dtype, self.device) for _ in layers]
        scaled = layers if dtype == torch.int8 else ()
        self.k_scale = [_zeros(shape[:-1], torch.float32, self.device) for _ in scaled]
        self.v_scale = [_zeros(shape[:-1], torch.float32, self.device) for _ in scaled]

    @property
    def tensors(self) -> list[Tensor]:
        """All of it; dimension 0 is the block."""
        return [*self.k, *self.v, *self.k_scale, *self.v_scale]

    @property
    def layers(self) -> list[Layer]:
        """Keys, values and scales of each layer."""
        none = [None] * len(self.k)
        every = zip(self.k, self.v, self.k_scale or none, self.v_scale or none, strict=True)
        return [Layer(*one) for one in every]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in self.tensors)

    def bind(self, batch: RaggedBatch) -> list[Attend]:
        """One Attend per layer for this step."""
        return [PagedAttend(*layer, batch.slots, batch.spans, batch.tables) for layer in self.layers]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to), one after the other: a block may be copied on."""
        for source, target in pairs:
            for tensor in self.tensors:
                tensor[target] = tensor[source]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; large ones on a CPU take memory only where something has been written, so that an unused cache costs nothing."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < LAZY or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)  # keeps the pages as long as it lives
