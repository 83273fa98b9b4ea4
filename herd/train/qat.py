"""Quantization-aware training: the forward pass sees the rounded weights that will be served, gradients go straight through to
float ones, so the model learns what rounding leaves of it.

- GGUF kinds (q4_0, q8_0, q4_k_m, ...): each tensor exactly as `herd quantize` writes it, in the type its mix gives it;
  activations as they are. Weights are those of `herd.quant.encode`, bit for bit, so trained and served weights agree exactly;
  what a server does with activations is its own.
- int8-int4: matrices of layers in 4 bits, groups of 32; embedding and output in 8 bits a row; both symmetric; what goes into a
  matrix in 8 bits a token. The scheme of Meta's quantized Llama 3.2 1B and 3B (model cards; torchao's 8da4w): scale of a group =
  largest magnitude / 7.5, of a row / 127.5, of a token (highest - lowest) / 255 with a zero point.

Straight through also means: no gradient is cut where rounding clamps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from herd.errors import ConfigError
from herd.kernels.grouped import grouped_linear
from herd.kernels.ops import fake, gradient, operation
from herd.model.llama import Llama
from herd.model.moe import Experts
from herd.quant.encode import encode
from herd.quant.mix import MIXES, Mix, mix
from herd.quant.scheme import QuantTensor, block_type
from herd.train.precision import NarrowEmbedding, NarrowExperts, NarrowLinear

__all__ = ["INT8_INT4", "mix_of", "prepare_qat", "remove_qat", "round_tokens", "round_weight"]

INT8_INT4 = "int8-int4"
GROUP = 32


@operation()
def round_weight(weight: Tensor, kind: str) -> Tensor:
    """`weight` [..., rows, columns] as it is after being stored as `kind`: a GGML type, "int4" (groups of 32) or "int8" (rows).

    The gradient passes as if nothing were rounded.
    """
    if kind == "int4":
        return _symmetric(weight.unflatten(-1, (-1, GROUP)), 7).flatten(-2).to(weight.dtype)
    if kind == "int8":
        return _symmetric(weight, 127).to(weight.dtype)
    stored = encode(weight.contiguous(), kind)
    return stored.dequantize(weight.dtype) if isinstance(stored, QuantTensor) else stored.to(weight.dtype)


@fake(round_weight)
def _(weight, kind):
    return torch.empty_like(weight)


def _nothing(ctx, inputs, output) -> None:
    """A straight-through gradient needs nothing."""


@gradient(round_weight, saved=_nothing)
def _(ctx, grad: Tensor):
    return grad, None


def _symmetric(values: Tensor, top: int) -> Tensor:
    wide = values.float()
    scale = (wide.abs().amax(-1, keepdim=True) / (top + 0.5)).clamp(min=torch.finfo(torch.float32).eps)
    return (wide / scale).round().clamp(-top - 1, top) * scale


def round_tokens(x: Tensor) -> Tensor:
    """Activations [..., D] after 8 bits a token, with a zero point; gradients straight through."""
    wide = x.detach().float()
    low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).eps)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    rounded = (((wide / scale).round() + zero).clamp(-128, 127) - zero) * scale
    return x + (rounded.to(x.dtype) - x.detach())


class QatLinear(NarrowLinear):
    """x W^T with W, and for int8-int4 x, rounded."""

    kind: str
    dynamic: bool = False

    def share(self, dim: int, cut: Callable[[int], tuple[int, int]], total: object) -> None:
        """One rank's part rounds as the whole does (`herd.parallel.tensor`), or ConfigError is raised."""
        if dim == 1 and self.dynamic:
            raise ConfigError(
                f"method.qat={INT8_INT4} rounds whole rows of what goes into a matrix, of which parallel.tp leaves each rank a "
                "part: use parallel.dp_shard, cp or pp"
            )
        if dim == 1:
            _whole_blocks(self.kind, cut(self.in_features)[1])

    def effective_weight(self) -> Tensor:
        """The weight that products see."""
        return round_weight(self.weight, self.kind)

    def forward(self, input: Tensor) -> Tensor:
        x = round_tokens(input) if self.dynamic else input
        return linear(x, self.effective_weight().to(x.dtype), self.bias)


class QatEmbedding(nn.Embedding):
    """Rows of the rounded table, in `narrow`'s dtype when it is set."""

    kind: str
    narrow: bool = False

    def forward(self, input: Tensor) -> Tensor:
        found = embedding(input, round_weight(self.weight, self.kind))
        return found.to(torch.bfloat16) if self.narrow else found


class QatExperts(NarrowExperts):
    """Experts of rounded matrices."""

    kinds: dict[str, str]

    def share(self, dim: int, cut: Callable[[int], tuple[int, int]], total: object) -> None:
        """As `QatLinear.share`, of whole experts (`dim` 0) or of some units of each (1)."""
        if dim == 1:
            _whole_blocks(self.kinds["w2"], cut(self.w2.shape[2])[1])

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        w1, w2, w3 = (round_weight(getattr(self, n), self.kinds[n]).to(x.dtype) for n in ("w1", "w2", "w3"))
        return grouped_linear(silu(grouped_linear(x, w1, counts)) * grouped_linear(x, w3, counts), w2, counts)


def _whole_blocks(kind: str, count: int) -> None:
    """Refuse a share of `count` values of a row that blocks of `kind` do not fill: they would be other blocks."""
    type = block_type(kind)
    values = GROUP if type is None else type.values
    if count % values:
        raise ConfigError(
            f"method.qat: a rank's share of a row, {count} values, is no whole number of {kind}'s blocks of {values}: choose "
            "another kind, a smaller parallel.tp, or parallel.dp_shard"
        )


def prepare_qat(model: Llama, kind: str) -> list[str]:
    """Let `model` train with the rounding of `kind`, in place, before `prepare_model`; returns notes on tensors that get another
    type than `kind` says. Names and parameters stay. Routers and norms stay float.

    Raises ConfigError for a kind that is not known, rows that are no whole groups, or a model that is quantized or has adapters.
    """
    chosen = None if kind.lower() == INT8_INT4 else mix_of(kind)
    notes: list[str] = []

    def kind_of(name: str, weight: Tensor) -> str:
        if chosen is not None:
            choice = chosen.kind(name, tuple(weight.shape), model.config)
            notes.extend([f"{name}: {choice.note}"] if choice.note else [])
            return choice.kind
        if not name.startswith("layers."):
            return "int8"
        if weight.shape[-1] % GROUP:
            raise ConfigError(
                f"method.qat={kind}: rows of {name} have {weight.shape[-1]} values, not whole groups of {GROUP}"
            )
        return "int4"

    planned: list[tuple[nn.Module, type[nn.Module], dict[str, object]]] = []
    tied = model.output.weight is model.tok_embeddings.weight
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith("router"):
            source = "tok_embeddings.weight" if tied and name == "output" else f"{name}.weight"
            facts: dict[str, object] = {"kind": kind_of(source, module.weight), "dynamic": chosen is None}
            if chosen is None:
                facts["plain"] = False  # activations are rounded, too: the loss has to call the module
            planned.append((module, QatLinear, facts))
        elif type(module) is nn.Embedding:
            planned.append((module, QatEmbedding, {"kind": kind_of(f"{name}.weight", module.weight)}))
        elif type(module) is Experts:
            kinds = {n: kind_of(f"{name}.{n}", getattr(module, n)) for n in ("w1", "w2", "w3")}
            planned.append((module, QatExperts, {"kinds": kinds}))
        elif type(module) in (NarrowLinear, NarrowEmbedding) or type(module).__module__.startswith(
            ("herd.quant", "herd.adapters")
        ):
            raise ConfigError(
                "method.qat: the model must be a plain one: not quantized, without adapters, not prepared yet"
            )
    for module, made, facts in planned:
        module.__class__ = made
        module.__dict__.update(facts)
    return notes


def remove_qat(model: Llama) -> None:
    """The plain model again, with the float weights that were trained."""
    for module in model.modules():
        for narrow, plain in ((QatLinear, nn.Linear), (QatEmbedding, nn.Embedding), (QatExperts, Experts)):
            if type(module) is narrow:
                module.__class__ = plain  # type: ignore[assignment]
                for name in ("kind", "kinds", "dynamic", "narrow", "plain"):
                    module.__dict__.pop(name, None)


def mix_of(kind: str) -> Mix:
    """The mix of `herd quantize` that `method.qat` names. Raises ConfigError."""
    known = [name.lower() for name, m in MIXES.items() if m.quantized]
    if kind.upper() not in MIXES and kind.upper() not in ("Q4_K", "Q5_K"):
        raise ConfigError(f"method.qat: {kind!r} is not one of {', '.join([*known, INT8_INT4])}")
    return mix(kind)
