"""The decoder as a GPU runs it: the weights of a `Llama`, fewer and larger operations, rows without a batch dimension.

Queries, keys and values are one product, and so are gate and up: their weights are moved into one storage, layer by layer, and
the model's own parameters become views of it, so there is never a second copy. Quantized matrices become what GPU kernels read
(`herd.quant.packed_matrix`), in the model, too: their blocks are given up.

Letters: T rows, D dim, H query heads, Hkv key/value heads, Dh head_dim, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from herd.engine import cuda
from herd.engine.cuda import ExpertWeights, Places
from herd.kernels import packed
from herd.kernels.packed import Packed
from herd.kernels.products import product
from herd.model.config import LayerSpec
from herd.model.feedforward import FeedForward
from herd.model.llama import Block, Llama
from herd.model.moe import Experts, MoE
from herd.model.rope import Temperature
from herd.parallel.infer import Shared
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from herd.quant.packed_matrix import PackedMatrix, pack_matrix, pack_together

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
        self._output = _output(model)
        self._temper = None if config.temper is None else Temperature(config.temper)
        self._marks = self._where()
        asks = any(isinstance(layer.feed, MoE) for layer in self._layers)
        experts = any(isinstance(module, QuantExperts) for module in model.modules())
        self.capturable = not asks and (not experts or cuda.kernels_for(model.norm.weight))
        """Whether steps can be recorded: without kernels, quantized experts ask the host how many rows each has."""

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
        return self._output(states).float()

    def _where(self) -> tuple[int, ...]:
        return tuple(weight.data_ptr() for weight in self.model.parameters())


def _output(model: Llama) -> Products:
    """The output matrix; a tied embedding goes on sharing it, in whatever form."""
    embedding, before = model.tok_embeddings, getattr(model.output, "matrix", None)
    made = together((model.output,))
    if isinstance(embedding, QuantEmbedding) and embedding.matrix is before and isinstance(model.output, QuantLinear):
        embedding.matrix = model.output.matrix
    return made


class _Layer:
    def __init__(self, block: Block, spec: LayerSpec, head_dim: int) -> None:
        own = block.attention
        self.block, self.spec, self.head_dim = block, spec, head_dim
        self.qkv, self.wo = together((own.wq, own.wk, own.wv)), together((own.wo,))
        self.kv_heads = own.wk.out_features // head_dim
        self.feed = _feed(block.feed_forward)

    def __call__(self, i: int, x: Tensor, more: Tensor | None, places: Places, mix: Mix) -> tuple[Tensor, Tensor]:
        """x, and what is still to be added to it, before and after the layer."""
        block = self.block
        x, normed = cuda.add_norm(x, more, block.attention_norm.weight, block.attention_norm.eps)
        heads = self.qkv(normed).unflatten(-1, (-1, self.head_dim))  # [T, H + 2 Hkv, Dh]
        q, k, v = heads.split([heads.shape[1] - 2 * self.kv_heads, self.kv_heads, self.kv_heads], dim=1)
        mixed = self.wo(mix(i, q, k, v, places, self.spec).flatten(-2))
        x, normed = cuda.add_norm(x, mixed, block.ffn_norm.weight, block.ffn_norm.eps)
        return x, self.feed(normed)


def _feed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The feed-forward of a layer, dense or with experts."""
    if isinstance(module, Shared):  # a part of it: the ranks' results are put together
        part, join = _feed(module.inner), module.join
        return lambda x: join(part(x))
    if isinstance(module, MoE):
        shared, experts = _feed(module.shared_expert), _experts(module.experts)
        if experts is None:
            return module
        return lambda x: shared(x) + cuda.routed(module, experts, x)
    assert isinstance(module, FeedForward)
    gate_up, down = together((module.w1, module.w3)), together((module.w2,))
    return lambda x: down(cuda.silu_mul(gate_up(x)))


def _experts(module: nn.Module) -> ExpertWeights | None:
    """The stacks w1, w2, w3 of experts; None for those that are left to their module."""
    if isinstance(module, Experts):
        return packed.plain(module.w1), packed.plain(module.w2), packed.plain(module.w3)
    if not isinstance(module, QuantExperts):
        return None
    stacks = []
    for name in ("w1", "w2", "w3"):
        each = [pack_matrix(matrix) for matrix in getattr(module, name)]
        parts = [one.packed for one in each if one is not None]
        if len(parts) < len(each) or len({part.kind for part in parts}) > 1:
            return None
        stack = packed.stack(parts)
        setattr(
            module, name, tuple(PackedMatrix(_expert(stack, e), one) for e, one in enumerate(each) if one is not None)
        )
        stacks.append(stack)
    return stacks[0], stacks[1], stacks[2]


def _expert(stack: Packed, e: int) -> Packed:
    """One of a stack."""
    parts = (stack.codes, stack.scale, stack.sub, stack.minimum, stack.sub_minimum)
    codes, *others = (None if part is None else part[e] for part in parts)
    assert codes is not None
    return Packed(stack.kind, stack.rows, stack.columns, codes, *others)


def together(modules: Sequence[nn.Module]) -> Products:
    """The products of several matrices with the same rows: one product where all are alike."""
    if len(modules) == 1 and isinstance(alone := modules[0], Shared):
        part, join = together((alone.inner,)), alone.join
        return lambda x: join(part(x))
    plain = [m for m in modules if type(m) is nn.Linear and m.bias is None]
    if len(plain) == len(modules) and len({(m.weight.dtype, m.weight.device) for m in plain}) == 1:
        whole = _joined([m.weight for m in plain]) if len(plain) > 1 else plain[0].weight
        return lambda x: linear(x, whole)
    quantized = [m for m in modules if type(m) is QuantLinear]
    if len(quantized) == len(modules) and (found := _packed(quantized)) is not None:
        return lambda x: product(x, found)
    if len(modules) == 1:
        return modules[0]
    each = [together((module,)) for module in modules]  # of different kinds
    return lambda x: torch.cat([one(x) for one in each], dim=-1)


def _packed(modules: Sequence[QuantLinear]) -> Packed | None:
    """One packed matrix of quantized modules, which hold views of it from now on; None where there is no packed form."""
    if len(modules) == 1:
        alone = pack_matrix(modules[0].matrix)
        if alone is not None:
            modules[0].matrix = alone
        return None if alone is None else alone.packed
    found = pack_together([module.matrix for module in modules])
    if found is None:
        return None
    whole, views = found
    for module, view in zip(modules, views, strict=True):
        module.matrix = view
    return whole


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
