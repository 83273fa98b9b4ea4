"""Virtual tokens served: prefix and prompt tuning as keys and values that lie in the cache before a request's own.

Both come to the same. A prefix is keys and values already; what the layers make of a prompt's embeddings depends on nothing
behind them, and is computed once, when the adapter is loaded. So rows with such an adapter run like any others, through any
runner, in any company: what differs is what their blocks begin with (`herd.engine.pins`), and that their positions count on
from there.

A cache keeps them in its own dtype: with int8 they are rounded as every key and value is (a scale per position and head).

Letters: P virtual tokens, L layers, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.adapters.prefix import Prefix, Virtual, keys_and_values
from herd.engine.paged import PagedCache
from herd.errors import CheckpointError
from herd.kernels.paged import write_kv, write_kv_int8
from herd.model.llama import Llama

__all__ = ["VirtualTokens", "virtual_tokens"]


@dataclass(frozen=True, slots=True)
class VirtualTokens:
    """Keys (placed) and values of every layer, each [L, P, Hkv, Dh] on the model's device, and the adapter they were made of."""

    keys: Tensor
    values: Tensor
    adapter: Virtual

    @property
    def count(self) -> int:
        """P."""
        return self.keys.shape[1]

    @property
    def kind(self) -> str:
        """Which it is, "prefix" or "prompt"."""
        return "prefix" if isinstance(self.adapter, Prefix) else "prompt"

    @property
    def nbytes(self) -> int:
        """Bytes held beside those of the cache's blocks."""
        return self.keys.nbytes + self.values.nbytes

    @torch.inference_mode()
    def put(self, cache: PagedCache, blocks: Sequence[int]) -> None:
        """Write them to the first P positions of `blocks`, in order, in the cache's dtype.

        Raises CheckpointError when they hold numbers that it cannot.
        """
        if cache.dtype.is_floating_point:
            for tensor in (self.keys, self.values):
                if not bool(tensor.to(cache.dtype).isfinite().all()):
                    name = str(cache.dtype).removeprefix("torch.")
                    largest = float(tensor.abs().max())
                    raise CheckpointError(
                        f"virtual tokens hold numbers up to {largest:.3g}, too large for keys and values in {name}: choose "
                        "kv='float32'"
                    )
        size, device = cache.block_size, cache.device
        slots = torch.tensor([blocks[p // size] * size + p % size for p in range(self.count)], device=device)
        for layer, k, v in zip(cache.layers, self.keys, self.values, strict=True):
            if layer.k_scale is None or layer.v_scale is None:
                write_kv(k, v, layer.k, layer.v, slots)
            else:
                write_kv_int8(k, v, layer.k, layer.v, layer.k_scale, layer.v_scale, slots)


@torch.inference_mode()
def virtual_tokens(model: Llama, adapter: Virtual) -> VirtualTokens:
    """What `adapter` puts before requests to `model`: of a prompt, what the model's layers make of it, in the model's dtype.

    Raises CheckpointError or ConfigError when it does not fit, and when the states of a prompt are not finite.
    """
    adapter.check(model.config)
    device = model.norm.weight.device
    if isinstance(adapter, Prefix):
        keys, values = (t.detach().to(device, torch.float32, copy=True) for t in (adapter.keys, adapter.values))
    else:
        keys, values = keys_and_values(model, adapter.embeddings.detach().to(device))
        if not (bool(keys.isfinite().all()) and bool(values.isfinite().all())):
            raise CheckpointError("the model's states behind this prompt are not finite: its numbers are too large")
    return VirtualTokens(keys, values, adapter)
