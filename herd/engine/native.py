"""Steps of a model through the native library, and which runner a model gets.

The library (`herd.kernels.native`) runs all layers of a step in one call, over the same paged cache that `TorchRunner` uses. The
residual stream is float32 whatever the weights are; before quantized matrices activations are rounded to 8 bits (a scale per
128 columns).

Letters: T rows, R rows whose logits are wanted, D dim, Dh head_dim, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from herd.engine.pack import RaggedBatch
from herd.engine.paged import PagedCache
from herd.engine.runner import Runner, TorchRunner
from herd.errors import ConfigError
from herd.kernels import native
from herd.kernels.native import Decoder, LayerWeights, OutputHead, Weight
from herd.model.attention import Attention
from herd.model.config import LayerSpec
from herd.model.feedforward import FeedForward
from herd.model.llama import Block, Llama
from herd.model.moe import Experts, MoE
from herd.model.rope import Rope, Temperature
from herd.quant.apply import kind_of
from herd.quant.linear import QuantExperts, QuantLinear

__all__ = ["MANY_ROWS", "NativeRunner", "StepwiseRunner", "runner_for", "unsupported"]

MANY_ROWS = 8
"""Rows of a step from which on torch multiplies bfloat16 weights on a processor with AMX, whose tiles the library does not use
(by their rates on paper, not measured). On others nothing is gained: a prompt of 512 through Llama 3.2 1B in bfloat16 takes
3.02 s in the library and 2.93 s in torch on two cores with AVX512-BF16; in float32 products take the same time within a tenth,
and in float16 torch needs four times as long."""

_PLAIN = (torch.float32, torch.float16, torch.bfloat16)


class NativeRunner:
    """A Runner over the native library. Raises ConfigError for a model that `unsupported` objects to.

    A row's logits are the same bits whatever rows are computed beside it, however the prompt was split, and with any number of
    threads. Weights that the model has as views of a file stay views. The runner has the weights of the moment it is made: after
    training steps, or other weights loaded into the model, make a new one.
    """

    def __init__(self, model: Llama) -> None:
        why = unsupported(model)
        if why is not None:
            raise ConfigError(f"the native runner cannot run this model: {why}")
        self.model, config = model, model.config
        self._head = OutputHead(_matrix(model.output), model.norm.weight, config.norm_eps)
        self._angles, self._ones = _Angles(model.rope), torch.empty(0)
        self._decoder = Decoder(
            [_layer(block, spec) for block, spec in zip(_blocks(model), config.layers, strict=True)],
            dim=config.dim,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            norm_eps=config.norm_eps,
        )

    @torch.inference_mode()
    def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """Logits [R, V] float32 of `batch.logit_rows`; keys and values of all T rows are written to `cache`.

        Raises ConfigError for adapters.
        """
        if batch.adapters is not None:
            raise ConfigError("the native runner applies no adapters: use the torch runner, or merge the adapter")
        x = self.model.embed(batch.tokens).float().contiguous()
        cos, sin = self._angles.at(batch.positions, batch.tables.shape[1] * cache.block_size)
        self._decoder(
            x,
            cos=cos,
            sin=sin,
            temper=self._temper(batch.positions),
            slots=batch.slots.contiguous(),
            spans=batch.spans.contiguous(),
            tables=batch.tables.contiguous(),
            k=cache.k,
            v=cache.v,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )
        return self._head(x, batch.logit_rows)

    def _temper(self, positions: Tensor) -> Tensor:
        """What tempered layers multiply queries by, [T] float32."""
        temper = self.model.config.temper
        if temper is not None:
            return Temperature(temper).scale(positions).contiguous()
        if len(self._ones) < len(positions):
            self._ones = torch.ones(len(positions))
        return self._ones[: len(positions)]


class _Angles:
    """Cosines and sines of positions, from a table that grows to TABLE of them: for a small model that is a tenth of a step."""

    TABLE = 1 << 15

    def __init__(self, rope: Rope) -> None:
        self._rope = rope
        self._cos = self._sin = torch.empty(0, 0)

    def at(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """cos, sin [T, Dh / 2] float32 of `positions` [T], which are below `end`."""
        if end > self.TABLE:
            rotary = self._rope(positions)
            return rotary.cos.squeeze(-2).contiguous(), rotary.sin.squeeze(-2).contiguous()
        if end > len(self._cos):
            rotary = self._rope(torch.arange(max(512, 1 << (end - 1).bit_length())))
            self._cos, self._sin = rotary.cos.squeeze(-2).contiguous(), rotary.sin.squeeze(-2).contiguous()
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


class StepwiseRunner:
    """Steps of fewer than `rows` rows through `few`, of others through `many`, over one cache.

    The two round differently, so a row's last bits depend on how many rows its step has: on how a prompt is split, and on what
    is computed beside it.
    """

    def __init__(self, few: Runner, many: Runner, rows: int) -> None:
        self.few, self.many, self.rows = few, many, rows

    def logits(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """As `Runner.logits`."""
        return (self.many if len(batch.tokens) >= self.rows else self.few).logits(batch, cache)


def runner_for(model: Llama, *, deterministic: bool = False) -> Runner:
    """The fastest runner for `model`: native on a CPU where the library can run it, torch otherwise.

    Native steps give the same tokens the same bits in any batch and any split. Only on a processor with AMX do steps of MANY_ROWS
    with plain bfloat16 weights go through torch, and results differ in the last bits with the batch (`StepwiseRunner`);
    `deterministic` uses the native kernels alone there, too.
    """
    if unsupported(model) is not None:
        return TorchRunner(model)
    runner = NativeRunner(model)
    if deterministic or not _torch_has_tiles() or kind_of(model) is not None:
        return runner
    first = model.get_submodule("layers.0.attention.wq")
    brains = isinstance(first, nn.Linear) and first.weight.dtype == torch.bfloat16
    return StepwiseRunner(runner, TorchRunner(model), MANY_ROWS) if brains else runner


def _torch_has_tiles() -> bool:
    return torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]


def unsupported(model: Llama) -> str | None:
    """Why the native library cannot run `model`, as a sentence; None when it can."""
    if (why := native.missing()) is not None:
        return why
    device = model.norm.weight.device
    if device.type != "cpu":
        return f"the model is on {device}"
    config = model.config
    if config.head_dim % 16:
        return f"heads of {config.head_dim} numbers are not whole vectors of 16"
    if (group := config.n_heads // config.n_kv_heads) > native.MAX_GROUP:
        return f"{group} query heads share one key head, more than {native.MAX_GROUP}"
    for name, module in model.named_modules():
        if (why := _objection(module)) is not None:
            return f"{name}: {why}"
    return None


def _objection(module: nn.Module) -> str | None:
    match module:
        case QuantLinear() | QuantExperts():
            for matrix in module.matrices():
                if matrix.panels is None:
                    return f"the kernels do not multiply with {matrix.type.name}"
        case nn.Linear():
            if module.bias is not None:
                return "the kernels know no bias"
            if module.weight.dtype not in _PLAIN or type(module) is not nn.Linear:
                return f"the kernels do not multiply with {type(module).__name__} in {module.weight.dtype}"
        case Attention():
            children = (module.wq, module.wk, module.wv, module.wo)
            return _strange(children)
        case FeedForward():
            return _strange((module.w1, module.w2, module.w3))
        case MoE():
            if not isinstance(module.experts, Experts | QuantExperts) or type(module.router) is not nn.Linear:
                return "experts or router are of a kind that the kernels do not know"
        case Experts():
            if module.w1.dtype not in _PLAIN:
                return f"the kernels do not multiply with {module.w1.dtype}"
    return None


def _strange(children: tuple[nn.Module, ...]) -> str | None:
    """Children that some transformation put there and the kernels know nothing of: adapters, shards."""
    for child in children:
        if type(child) not in (nn.Linear, QuantLinear):
            return f"the kernels do not know {type(child).__name__}"
    return None


def _blocks(model: Llama) -> list[Block]:
    blocks = list(model.layers)
    assert all(isinstance(block, Block) for block in blocks)
    return blocks  # type: ignore[return-value]


def _layer(block: Block, spec: LayerSpec) -> LayerWeights:
    attention, inner = block.attention, block.feed_forward
    router, experts, top_k = None, [], 0
    if isinstance(inner, MoE):
        router, experts, top_k = _matrix(inner.router), _experts(inner.experts), inner.top_k
        inner = inner.shared_expert
    assert isinstance(inner, FeedForward)
    modules = (attention.wq, attention.wk, attention.wv, attention.wo, inner.w1, inner.w2, inner.w3)
    return LayerWeights(
        block.attention_norm.weight,
        block.ffn_norm.weight,
        [_matrix(module) for module in modules],
        spec.placement,
        spec.chunk,
        router=router,
        experts=experts,
        top_k=top_k,
    )


def _matrix(module: nn.Module) -> Weight:
    if isinstance(module, QuantLinear):
        assert module.matrix.panels is not None  # `unsupported` looked
        return module.matrix.panels
    assert isinstance(module, nn.Linear)
    return native.plain(module.weight)


def _experts(module: Experts | QuantExperts) -> list[tuple[Weight, Weight, Weight]]:
    if isinstance(module, Experts):
        each = zip(module.w1, module.w2, module.w3, strict=True)
        return [(native.plain(w1), native.plain(w2), native.plain(w3)) for w1, w2, w3 in each]
    found = []
    for matrices in zip(module.w1, module.w2, module.w3, strict=True):
        w1, w2, w3 = (matrix.panels for matrix in matrices)
        assert w1 is not None
        assert w2 is not None
        assert w3 is not None
        found.append((w1, w2, w3))
    return found
