"""LoRA and DoRA in a model that is trained: thin layers around frozen matrices, plain or quantized (QLoRA).

`apply_lora` puts them in as children, freezes everything else and gives back what trains; `adapter_of` takes them out as data,
which `herd.checkpoint.peft` writes as PEFT does. Start, scaling, dropout and numbers are PEFT's: factors are float32, A is drawn
uniformly and B is zero, so that training starts from the base model itself. Routed experts are in `herd.adapters.experts`.

Letters: T tokens, D dim, V vocabulary, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding, linear

from herd.adapters.experts import PARTS, LowRankExperts, expert_shapes, fused, homes_of, start_experts, taken_apart
from herd.adapters.lora import EMBEDDING, Factors, LoraAdapter, lengths
from herd.errors import ConfigError
from herd.kernels.dense import product
from herd.model.late import bare, derived, hand_on, lives_on, promise, promises, replayed, zeros
from herd.model.llama import Llama
from herd.model.moe import Experts
from herd.quant.late import maker_of
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from herd.quant.matrix import Matrix, frozen_product

__all__ = [
    "ATTENTION", "EXPERTS", "FEED_FORWARD", "LINEAR", "TARGETS",
    "LoraConfig", "LowRankEmbedding", "LowRankLinear",
    "adapter_of", "apply_adapter", "apply_lora", "trained",
]  # fmt: skip

ATTENTION = ("wq", "wk", "wv", "wo")
FEED_FORWARD = ("w1", "w2", "w3")
LINEAR = (*ATTENTION, *FEED_FORWARD)
"""The seven matrices of a dense layer; of a layer with experts w1, w2, w3 are those of the shared expert."""
EXPERTS = ("experts", *(f"experts.{part}" for part in PARTS))
"""Those of routed experts: all of them, gate with up (they share the factor that reads x, as in PEFT), down."""
TARGETS = (*LINEAR, "tok_embeddings", "output", *EXPERTS)
"""Kinds of matrices that can be adapted."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What is trained: factors of `rank`, scaled by alpha / rank (with `use_rslora` alpha / sqrt(rank)).

    `targets` are kinds of matrices (TARGETS), or single ones by name ("layers.3.attention.wq"). `dropout` falls on what goes into
    the factors, while training. `use_dora` trains lengths of outputs beside their directions. Routed experts have neither, as in
    PEFT. Raises ConfigError.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEAR
    use_dora: bool = False
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"lora: rank {self.rank!r}: give a whole number of at least 1")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ConfigError(f"lora: alpha {self.alpha!r}: give a positive number")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora: dropout {self.dropout!r}: give a share from 0 to below 1")
        if isinstance(self.targets, str) or not self.targets:
            raise ConfigError(f"lora: targets {self.targets!r}: give some of {', '.join(TARGETS)}")


class _LowRank(nn.Module):
    """What both share: the base, A [r, in], B [out, r], the scale, and DoRA's magnitude."""

    squares: Tensor | None

    def __init__(self, name: str, base: nn.Module, pair: Factors, scale: float, share: float) -> None:
        super().__init__()
        late = pair.a.is_meta or bool(promises(base))
        device = pair.a.device if late else _values(base).device
        self.name, self.base, self.alpha, self.scale, self.dropout = name, base, pair.alpha, scale, share
        self.a = nn.Parameter(pair.a.to(device, torch.float32, copy=True))
        self.b = nn.Parameter(pair.b.to(device, torch.float32, copy=True))
        self.magnitude = None
        squares = None
        if pair.magnitude is not None:
            self.magnitude = nn.Parameter(pair.magnitude.to(device, torch.float32, copy=True))
            squares = torch.empty_like(pair.magnitude, device="meta") if late else _squares(name, _values(base))
        self.register_buffer("squares", squares, persistent=False)
        self._kept = slice(None)
        for key in ("a", "b", "magnitude"):
            hand_on(self, key, getattr(pair, key))
        if squares is not None and squares.is_meta:
            values = maker_of(base)
            promise(self, "squares", lambda: _squares(name, values())[self._kept].clone())
        self._summed: Callable[[Tensor], Tensor] | None = None
        self._columns: tuple[int, int] | None = None

    def share(self, dim: int, cut: Callable[[int], tuple[int, int]], total: Callable[[Tensor], Tensor]) -> None:
        """Become one rank's part (`herd.parallel.tensor`), before parameters are cut: of the matrix along `dim`.

        `cut(size)` says where this rank's part begins and how much it is, `total` sums a tensor over the ranks.
        """
        looked_up = self.name == EMBEDDING
        whole = _size(self.base)[dim]
        start, count = cut(whole)
        if dim == (0 if looked_up else 1):  # some inputs of every output
            self._summed = total
            self._columns = None if looked_up else (start, whole)
        elif self.squares is not None:
            self._kept = slice(start, start + count)
            self.squares = self.squares[self._kept].clone()

    def dropped(self, x: Tensor) -> Tensor:
        """x [..., in] after dropout, while training. Of a part of x, what dropout of the whole would leave of it."""
        if not (self.training and self.dropout):
            return x
        if self._columns is None:
            return dropout(x, self.dropout)
        start, whole = self._columns
        kept = dropout(x.new_ones(*x.shape[:-1], whole), self.dropout)
        return x * kept[..., start : start + x.shape[-1]]

    def gain(self, weight: Tensor) -> Tensor | None:
        """DoRA: what every output is multiplied with, magnitude over length; the length counts as a constant (section 4.3)."""
        if self.magnitude is None:
            return None
        with torch.no_grad():
            length = lengths(self.name, weight, self.a, self.b, self.scale, self.squares, self._summed)
        return self.magnitude / length

    def extra_repr(self) -> str:
        kind = "LoRA" if self.magnitude is None else "DoRA"
        return f"{kind}, rank {len(self.a)}, scale {self.scale:g}"


class LowRankLinear(_LowRank):
    """y = W x + scale * B A x, with DoRA its outputs times a gain. x [..., in] -> [..., out] in x's dtype."""

    def base_product(self, x: Tensor) -> Tensor:
        """W x."""
        return _product(self.base, x)

    def at_once(self, x: Tensor) -> Tensor | None:
        """W x + scale * B A x with its gradients in as few passes as there are products; None where more is asked for:
        dropout, DoRA, a base that trains, is sharded or of another kind, factors of another dtype than x."""
        if self.magnitude is not None or (self.training and self.dropout) or not torch.is_grad_enabled():
            return None
        a, b = self._factors(x)
        weight, matrix = self._frozen(x)
        if (weight is None and matrix is None) or a.dtype != x.dtype or not all(_plain(t) for t in (x, self.a, self.b)):
            return None
        return _Sum.apply(x, weight, matrix, a, b, self.scale)  # pyright: ignore[reportReturnType] (torch gives no types)

    def _factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a, self.b

    def _frozen(self, x: Tensor) -> tuple[Tensor | None, Matrix | None]:
        """The base's matrix as it is, or quantized."""
        base = self.base
        if base._forward_hooks or base._forward_pre_hooks:
            return None, None
        if type(base) is QuantLinear and not torch.compiler.is_compiling():
            return None, base.matrix
        if not isinstance(base, nn.Linear) or base.bias is not None or not getattr(base, "plain", True):
            return None, None
        weight = base.weight
        usual = (
            (type(base) is nn.Linear or hasattr(type(base), "known")) and _plain(weight) and not weight.requires_grad
        )
        fits = weight.dtype == x.dtype or hasattr(type(base), "narrows")
        return (weight, None) if usual and fits else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        if (together := self.at_once(x)) is not None:
            return together
        y = self.base_product(x)
        dropped = self.dropped(x)
        change = linear(linear(dropped.to(self.a.dtype), self.a), self.b) * self.scale
        if self.magnitude is None:
            return (y + change).to(y.dtype)
        gain = self.gain(_values(self.base))
        assert gain is not None
        turned = y if dropped is x else _product(self.base, dropped)
        return (y + (gain - 1) * turned + gain * change).to(y.dtype)


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


class _Sum(torch.autograd.Function):
    """x W^T + scale * (x A^T) B^T for a frozen W, added up in place, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, matrix: Matrix | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        flat, ctx.matrix, ctx.scale = x.reshape(-1, x.shape[-1]), matrix, scale
        inner = flat @ a.T
        ctx.save_for_backward(flat, weight, inner, a, b)
        out = product(flat, _frozen(weight, matrix, x.dtype))
        return out.addmm_(inner, b.T, alpha=scale).view(*x.shape[:-1], len(b))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, inner, a, b = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        by_inner = (flat @ b) * ctx.scale
        by_a, by_b = by_inner.T @ x, (flat.T @ inner) * ctx.scale
        if not ctx.needs_input_grad[0]:
            return None, None, None, by_a, by_b, None
        by_x = product(flat, _frozen(weight, ctx.matrix, x.dtype).T)
        return by_x.addmm_(by_inner, a).view(*grad.shape[:-1], -1), None, None, by_a, by_b, None


def _frozen(weight: Tensor | None, matrix: Matrix | None, dtype: torch.dtype) -> Tensor:
    if weight is not None:
        return weight.to(dtype)
    assert matrix is not None
    return matrix.dequantize(dtype)


class LowRankEmbedding(_LowRank):
    """The same for looked-up rows. tokens [...] int -> [..., D]. There is no dropout, as in PEFT."""

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.base(tokens)
        total = y + (embedding(tokens, self.b) @ self.a) * self.scale
        if self.magnitude is not None:
            total = total * self.gain(_values(self.base))
        return total.to(y.dtype)


def apply_lora(model: Llama, config: LoraConfig) -> list[nn.Parameter]:
    """Freeze `model` and put trainable factors around the matrices that `config` names, in place; returns what trains.

    Drawn from the global random state. With tied embeddings, factors of the embedding change looking up alone, as in PEFT.
    Raises ConfigError, with the model as it was: targets that are not there, a rank that is no smaller than the matrix,
    dropout or DoRA on routed experts, a model that has an adapter already.
    """
    chosen, experts = _chosen(model, config)
    _refuse_on_experts(experts, config.dropout, dora=config.use_dora)
    where = lives_on(model)
    pairs = {name: _start(name, module, config, where) for name, module in chosen.items()}
    for (home, part), module in experts.items():
        pairs |= taken_apart(home, part, start_experts(module, part, config.rank, config.alpha, where))
    return _put(model, LoraAdapter(pairs, config.rank, config.alpha, config.use_rslora), config.dropout)


def apply_adapter(model: Llama, adapter: LoraAdapter, *, dropout: float = 0.0) -> list[nn.Parameter]:
    """As `apply_lora`, going on from `adapter`: its tensors are copied, not changed.

    Raises CheckpointError when it does not fit the model, ConfigError for one that replaces whole weights (PEFT
    saves an adapted embedding with the adapter; that is fine when it is the model's own).
    """
    _refuse_second(model)
    every = _matrices(model)
    known: dict[str, tuple[int, ...]] = {name: _size(module) for name, module in every.items()}
    replace(adapter, whole={}).check(known | _expert_shapes(model))
    _refuse_on_experts(homes_of(adapter.factors), dropout)
    replaced = [name for name, whole in adapter.whole.items() if name not in every or not _same(every[name], whole)]
    if replaced:
        raise ConfigError(
            f"this adapter replaces whole weights ({', '.join(replaced[:3])}), and herd trains factors alone: merge it into "
            "the base first"
        )
    return _put(model, adapter, dropout)


def adapter_of(model: Llama, base: str | None = None) -> LoraAdapter:
    """The adapter in `model` as data; its tensors are the model's own, detached. `base` is the name of the base model.

    Raises ConfigError when there is none.
    """
    pairs: dict[str, Factors] = {}
    scales: list[tuple[Factors, float]] = []
    for m in _layers(model):
        if isinstance(m, LowRankExperts):
            for part, pair in m.factors().items():
                pairs |= taken_apart(m.name, part, pair)
                scales.append((pair, m.scales[part]))
        else:
            magnitude = None if m.magnitude is None else m.magnitude.detach()
            pairs[m.name] = Factors(m.a.detach(), m.b.detach(), m.alpha, magnitude)
            scales.append((pairs[m.name], m.scale))
    if not scales:
        raise ConfigError("the model has no LoRA layers: put them in with apply_lora")
    first, _ = scales[0]
    rslora = any(p.rank > 1 and math.isclose(by, p.alpha / math.sqrt(p.rank), rel_tol=1e-9) for p, by in scales)
    return LoraAdapter(pairs, first.rank, first.alpha, rslora, base=base)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters of `model` by name: what a checkpoint of such a training has to hold."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _put(model: Llama, adapter: LoraAdapter, share: float) -> list[nn.Parameter]:
    model.requires_grad_(False)
    made: list[nn.Parameter] = []
    experts = homes_of(adapter.factors)
    for name, pair in adapter.factors.items():
        home = name.removesuffix(".weight")
        if home.rpartition(".")[0] in experts:
            continue
        kind = LowRankEmbedding if name == EMBEDDING else LowRankLinear
        layer = kind(name, model.get_submodule(home), pair, adapter.scale(name), share).train(model.training)
        model.set_submodule(home, layer)
        made += layer.parameters(recurse=False)
    for home in experts:
        pairs = fused(adapter, home)
        scales = {part: adapter.scale_of(pair) for part, pair in pairs.items()}
        several = LowRankExperts(home, model.get_submodule(home), pairs, scales, lives_on(model)).train(model.training)
        model.set_submodule(home, several)
        made += several.parameters(recurse=False)
    return made


def _chosen(
    model: Llama, config: LoraConfig
) -> tuple[Mapping[str, nn.Module], Mapping[tuple[str, str], Experts | QuantExperts]]:
    """The matrices that are adapted, and the experts with a part of PARTS, in the model's order."""
    _refuse_second(model)
    every, routed = _matrices(model), _experts(model)
    wanted: set[str] = set()
    parts: set[tuple[str, str]] = set()
    for target in config.targets:
        hits = {n for n in every if target in (n.removesuffix(".weight"), n.removesuffix(".weight").rpartition(".")[2])}
        several = {
            (home, part)
            for home in routed
            for part in PARTS
            if target in ("experts", home, f"experts.{part}", f"{home}.{part}")
        }
        if not hits and not several:
            raise ConfigError(_why_not(model, target))
        wanted |= hits
        parts |= several
    sizes = {name: _size(every[name]) for name in wanted} | {
        home: expert_shapes(routed[home])["w1"] for home, _ in parts
    }
    for name, (rows, columns) in sizes.items():
        if config.rank >= min(rows, columns):
            raise ConfigError(
                f"lora: rank {config.rank} is not thin for {name} [{rows}, {columns}]: give less than {min(rows, columns)}"
            )
    experts = {(home, part): routed[home] for home in routed for part in PARTS if (home, part) in parts}
    return {name: module for name, module in every.items() if name in wanted}, experts


def _why_not(model: Llama, target: str) -> str:
    if target == "output":
        return "lora: the output of this model is its embedding (tied): choose tok_embeddings, which changes look-ups alone"
    if target.startswith("experts") and not _experts(model):
        return f"lora: this model has no routed experts, and {target[:80]!r} means theirs: leave it out"
    if target.rpartition(".")[0].endswith("experts") and target.endswith((".w1", ".w3")):
        return (
            f"lora: {target[:80]!r}: gate and up of routed experts share a factor, as in PEFT: choose experts.w13, both"
        )
    known = [t for t in TARGETS if t != "output" or not model.config.tie_embeddings]
    known = [t for t in known if t not in EXPERTS or model.config.moe is not None]
    return f"lora: no matrix of this model is called {target[:80]!r}: choose some of {', '.join(known)}"


def _refuse_on_experts(chosen: Iterable[object], dropout: float, *, dora: bool = False) -> None:
    """What PEFT cannot do with parameters of routed experts either."""
    if not list(chosen):
        return
    if dora:
        raise ConfigError("lora: DoRA is not possible on routed experts: leave experts out of targets, or train a LoRA")
    if dropout:
        raise ConfigError(
            f"lora: dropout {dropout:g} is not possible on routed experts: set it to 0, or leave experts out of targets"
        )


def _refuse_second(model: Llama) -> None:
    if next(_layers(model), None) is not None:
        raise ConfigError("the model has LoRA layers already: merge them, or load the model anew")


def _layers(model: nn.Module) -> Iterator[_LowRank | LowRankExperts]:
    return (module for module in model.modules() if isinstance(module, _LowRank | LowRankExperts))


def _experts(model: nn.Module) -> dict[str, Experts | QuantExperts]:
    """The routed experts of every layer that has some, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Experts | QuantExperts)}


def _expert_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter of routed experts."""
    found: dict[str, tuple[int, ...]] = {}
    for home, module in _experts(model).items():
        for key, shape in expert_shapes(module).items():
            found[f"{home}.{key}"] = (len(module.w1), *shape)
    return found


def _matrices(model: Llama) -> dict[str, nn.Module]:
    """Every module with one matrix, by the canonical name of that matrix; no routers, and no tied output."""
    found: dict[str, nn.Module] = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding | QuantLinear | QuantEmbedding) and not name.endswith("router")
    }
    if model.config.tie_embeddings:
        found.pop("output.weight", None)
    return found


def _size(module: nn.Module) -> tuple[int, int]:
    assert not isinstance(module, Experts | QuantExperts)
    if isinstance(module, QuantLinear | QuantEmbedding):
        return module.matrix.rows, module.matrix.columns
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0], weight.shape[1]


def _start(name: str, module: nn.Module, config: LoraConfig, where: torch.device) -> Factors:
    """Factors whose product is zero, and the lengths that the outputs have; on `where` later, when the module's numbers are."""
    rows, columns = _size(module)

    def draw() -> Tensor:
        if name == EMBEDDING:  # PEFT draws the factor that is not looked up from a normal distribution
            return torch.randn(config.rank, columns)
        return nn.init.kaiming_uniform_(torch.empty(config.rank, columns), a=math.sqrt(5))

    size = columns if name == EMBEDDING else rows
    if promises(module):
        values = maker_of(module)
        shape, again = replayed(draw)
        a = bare(shape, derived(lambda: again().to(where)))
        b = bare((rows, config.rank), zeros((rows, config.rank), where))
        magnitude = bare((size,), derived(lambda: _lengths(name, values()))) if config.use_dora else None
    else:
        a, b = draw(), torch.zeros(rows, config.rank)
        magnitude = _lengths(name, _values(module)) if config.use_dora else None
    return Factors(a, b, config.alpha, magnitude)


def _lengths(name: str, values: Tensor) -> Tensor:
    """The length of every output of a matrix."""
    return torch.linalg.vector_norm(values.float(), dim=0 if name == EMBEDDING else 1)


def _squares(name: str, values: Tensor) -> Tensor:
    return values.float().square().sum(0 if name == EMBEDDING else 1)


def _values(module: nn.Module) -> Tensor:
    """The matrix in plain numbers; of a quantized one, made for this moment."""
    if isinstance(module, QuantLinear | QuantEmbedding):
        return module.matrix.dequantize()
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _same(module: nn.Module, whole: Tensor) -> bool:
    own = _values(module)
    return own.shape == whole.shape and torch.equal(own, whole.to(own.device, own.dtype))


def _product(module: nn.Module, x: Tensor) -> Tensor:
    """x W^T. While training no input is rounded, not even in the first layer, whose x needs no gradient."""
    if isinstance(module, QuantLinear) and torch.is_grad_enabled():
        return frozen_product(x, module.matrix)
    return module(x)
