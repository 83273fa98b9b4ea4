"""Where keys and values live while decoding. A cache is a thing that produces one `Attend` per layer for a step.

Letters: B sequences, S new positions, K key positions, H query heads, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from herd.model.attend import Attend, masked_attention, visible
from herd.model.config import ModelConfig

__all__ = ["StaticAttend", "StaticCache"]


@dataclass(frozen=True, slots=True)
class StaticAttend:
    """One layer's view of a StaticCache for one step: writes the new keys and values, attends to what is visible.

    `k`, `v` [B, max_len, Hkv, Dh] are written in place at `positions` [S]. `masks` maps each distinct chunk of the model
    to [S, K] bool over the `window` of key positions that this step can see.
    """

    k: Tensor
    v: Tensor
    positions: Tensor
    masks: dict[int | None, tuple[slice, Tensor]]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        self.k.index_copy_(1, self.positions, k)
        self.v.index_copy_(1, self.positions, v)
        window, mask = self.masks[chunk]
        return masked_attention(q, self.k[:, window], self.v[:, window], mask)


class StaticCache:
    """Contiguous keys and values for B sequences that advance together: single-stream chat, drafts, compiled steps.

    `max_len` is the number of positions it holds; `grow` makes room for more. Storage per layer: 2 x [B, max_len, Hkv, Dh]
    in `dtype`, zero at first so that masked positions never contribute a NaN.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch: int = 1,
        max_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.batch, self.max_len = config, batch, max_len
        shape = (batch, max_len, config.n_kv_heads, config.head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in config.layers]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in config.layers]
        self._chunks = tuple(dict.fromkeys(spec.chunk for spec in config.layers))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (*self.k, *self.v))

    def grow(self, max_len: int) -> None:
        """Make room for `max_len` positions, keeping what is stored. Views bound before are stale afterwards."""
        if max_len <= self.max_len:
            return
        for tensors in (self.k, self.v):
            for i, old in enumerate(tensors):
                tensors[i] = _longer(old, max_len)  # at once: an interrupt between two layers leaves both usable
        self.max_len = max_len

    def bind(self, positions: Tensor, kv_len: int | None = None) -> list[Attend]:
        """One Attend per layer for a step at `positions` [S] (increasing).

        With `kv_len` (last position + 1, known to the caller) only the keys that can be seen are read; without it every
        step has the same shapes, which is what compiled and captured steps need.
        """
        masks = {chunk: self._mask(positions, kv_len, chunk) for chunk in self._chunks}
        return [StaticAttend(k, v, positions, masks) for k, v in zip(self.k, self.v, strict=True)]

    def _mask(self, positions: Tensor, kv_len: int | None, chunk: int | None) -> tuple[slice, Tensor]:
        """The key window of a step and its [S, K] bool mask."""
        first, last = 0, self.max_len
        if kv_len is not None:
            last = kv_len
            if chunk is not None:  # the earliest query's chunk begins the window
                first = (kv_len - positions.shape[0]) // chunk * chunk
        keys = torch.arange(first, last, device=positions.device)
        return slice(first, last), visible(positions, keys, chunk)


def _longer(old: Tensor, max_len: int) -> Tensor:
    """[B, max_len, Hkv, Dh] that begins with `old` [B, L, Hkv, Dh]; `old` itself when it is long enough."""
    if old.shape[1] >= max_len:
        return old
    new = old.new_zeros(old.shape[0], max_len, *old.shape[2:])
    new[:, : old.shape[1]] = old
    return new
