"""The decoder as a GPU runs it: the weights of a `Llama`, fewer and larger operations, rows without a batch dimension.

Queries, keys and values are one product, and so are gate and up: their weights are moved into one storage, layer by layer, and
the model's own parameters become views of it, so there is never a second copy. What is quantized is multiplied by its own module.

Letters: T rows, D dim, H query heads, Hkv key/value heads, Dh head_dim, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from herd.engine import cuda
from herd.engine.cuda import Places
from herd.model.config import LayerSpec
from herd.model.feedforward import FeedForward
from herd.model.llama import Block, Llama
from herd.model.moe import Experts, MoE
from herd.model.rope import Temperature
from herd.quant.linear import QuantExperts

__all__ = ["Mix", "Runtime", "together"]

Products = Callable[[Tensor], Tensor]
"""Several matrices that multiply the same rows, results side by side."""


class Mix(Protocol):
    """The memory of a step: places the rows of one layer, keeps their keys and values, and attends."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, places: Places, spec: LayerSpec) -> Tensor:
        """q [T, H, Dh], k and v [T, Hkv, Dh] as projected -> [T, H, Dh]."""
        ...


class Runtime:
    """`model` in the form above. Weights that are changed in place are seen; parameters that get other storage need a new one."""

    def __init__(self, model: Llama) -> None:
        self.model, config = model, model.config
        self._layers = [
            _Layer(block, spec, config.head_dim) for block, spec in zip(_blocks(model), config.layers, strict=True)
        ]
        self._temper = None if config.temper is None else Temperature(config.temper)
        self._marks = self._where()
        self.capturable = not any(isinstance(module, QuantExperts) for module in model.modules())
        """Whether steps can be recorded: quantized experts ask the host how many rows each has."""

    @property
    def stale(self) -> bool:
        """Whether some parameter of the model lies elsewhere than when this was made."""
        return self._marks != self._where()

    def hidden(self, tokens: Tensor, positions: Tensor, mix: Mix) -> Tensor:
        """tokens and positions [T] -> final normalised states [T, D]."""
        model = self.model
        rotary = model.rope(positions)
        temper = None if self._temper is None else self._temper.scale(positions)
        places = Places(rotary.cos.squeeze(-2), rotary.sin.squeeze(-2), temper)
        x, more = model.embed(tokens), None
        for i, layer in enumerate(self._layers):
            x, more = layer(i, x, more, places, mix)
        return cuda.add_norm(x, more, model.norm.weight, model.norm.eps)[1]

    def logits(self, states: Tensor) -> Tensor:
        """Final states [R, D] -> logits [R, V] float32."""
        return self.model.output(states).float()

    def _where(self) -> tuple[int, ...]:
        return tuple(weight.data_ptr() for weight in self.model.parameters())


class _Layer:
    def __init__(self, block: Block, spec: LayerSpec, head_dim: int) -> None:
        own = block.attention
        self.block, self.spec, self.head_dim = block, spec, head_dim
        self.qkv = together((own.wq, own.wk, own.wv))
        self.feed = _feed(block.feed_forward)

    def __call__(self, i: int, x: Tensor, more: Tensor | None, places: Places, mix: Mix) -> tuple[Tensor, Tensor]:
        """x, and what is still to be added to it, before and after the layer."""
        block, own = self.block, self.block.attention
        x, normed = cuda.add_norm(x, more, block.attention_norm.weight, block.attention_norm.eps)
        heads = self.qkv(normed).unflatten(-1, (-1, self.head_dim))  # [T, H + 2 Hkv, Dh]
        kv_heads = own.wk.out_features // self.head_dim
        q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
        mixed = own.wo(mix(i, q, k, v, places, self.spec).flatten(-2))
        x, normed = cuda.add_norm(x, mixed, block.ffn_norm.weight, block.ffn_norm.eps)
        return x, self.feed(normed)


def _feed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The feed-forward of a layer, dense or with experts."""
    if isinstance(module, MoE) and isinstance(module.experts, Experts):
        shared = _feed(module.shared_expert)
        return lambda x: shared(x) + cuda.routed(module, x)
    if not isinstance(module, FeedForward):
        return module  # experts of another kind: quantized
    gate_up, down = together((module.w1, module.w3)), module.w2
    return lambda x: down(cuda.silu_mul(gate_up(x)))


def together(modules: Sequence[nn.Module]) -> Products:
    """The products of several matrices with the same rows: one product where all are plain and alike."""
    plain = [m for m in modules if type(m) is nn.Linear and m.bias is None]
    if len(plain) < len(modules) or len({(m.weight.dtype, m.weight.device) for m in plain}) > 1:
        return lambda x: torch.cat([module(x) for module in modules], dim=-1)
    whole = _joined([m.weight for m in plain])
    return lambda x: linear(x, whole)


@torch.no_grad()
def _joined(weights: Sequence[Tensor]) -> Tensor:
    """One matrix of all rows, of which `weights` are views from now on."""
    first = weights[0]
    rows, columns = sum(len(weight) for weight in weights), first.shape[1]
    if _neighbours(weights):  # another runtime of the same model was here
        return first.detach().as_strided((rows, columns), (columns, 1))
    whole = torch.empty(rows, columns, dtype=first.dtype, device=first.device)
    at = 0
    for weight in weights:
        view = whole[at : at + len(weight)]
        view.copy_(weight)
        weight.data = view
        at += len(weight)
    return whole


def _neighbours(weights: Sequence[Tensor]) -> bool:
    """Whether the weights lie side by side in one storage."""
    storage, at = weights[0].untyped_storage().data_ptr(), weights[0].data_ptr()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage or weight.data_ptr() != at or not weight.is_contiguous():
            return False
        at += weight.nbytes
    return True


def _blocks(model: Llama) -> list[Block]:
    blocks = list(model.layers)
    assert all(isinstance(block, Block) for block in blocks)
    return blocks  # type: ignore[return-value]
