"""Prefix and prompt tuning: virtual tokens before every document, the only thing that trains.

A prefix is trained keys and values of each layer, [n_kv_heads] of them like the model's own; a prompt is trained embeddings, and
what the layers make of those are keys and values, too: they depend on nothing behind them. So both reach the model through the
same seam, the `attend` that each layer is handed (ADR 1), and each document of a packed row begins with them.

Sources: Li and Liang 2021 (prefix), Lester et al. 2021 (prompt); shapes and positions are PEFT's.
Letters: P virtual tokens, S positions, L layers, Hkv key/value heads, Dh head_dim, D dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from herd.errors import CheckpointError, ConfigError
from herd.model.attend import Attend, Causal, Packed, masked_attention, uncached, visible
from herd.model.config import ModelConfig
from herd.model.late import lent, lives_on
from herd.model.llama import Llama

__all__ = [
    "Prefix", "PrefixTuned", "Prompt", "PromptTuned", "Virtual", "keys_and_values", "prefixed", "tune_prefix", "tune_prompt",
]  # fmt: skip


PerLayer = Tensor | Sequence[Tensor]
"""Something [P, Hkv, Dh] of each layer, also as one tensor [L, P, Hkv, Dh]."""
Through = Callable[[Tensor, Tensor, Sequence[Attend]], Tensor]
"""Some neighbouring layers: x [1, P, D], positions, the attention of each -> x."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys (placed, rotary pairs interleaved) and values of every layer: each [L, P, Hkv, Dh]. `base` names its model."""

    keys: Tensor
    values: Tensor
    base: str | None = None

    @property
    def count(self) -> int:
        """P, the virtual tokens."""
        return self.keys.shape[1]

    def check(self, config: ModelConfig) -> None:
        """Raise unless it fits a base of `config`: CheckpointError, or ConfigError for a base that takes no virtual tokens."""
        _refuse_chunks(config)
        count = self.keys.shape[1] if self.keys.ndim == 4 else 0
        expected = config.n_layers, count or "P", config.n_kv_heads, config.head_dim
        for tensor in (self.keys, self.values):
            if tuple(tensor.shape) != expected:
                raise CheckpointError(f"a prefix of shape {tuple(tensor.shape)}: this base has {expected}")
        _check_numbers(self.keys, self.values)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Embeddings [P, D] that stand before every document. `base` names its model."""

    embeddings: Tensor
    base: str | None = None

    @property
    def count(self) -> int:
        """P, the virtual tokens."""
        return len(self.embeddings)

    def check(self, config: ModelConfig) -> None:
        """As `Prefix.check`."""
        _refuse_chunks(config)
        shape = tuple(self.embeddings.shape)
        if len(shape) != 2 or shape[1] != config.dim or not shape[0]:
            raise CheckpointError(f"a prompt of shape {shape}: this base has dim {config.dim}")
        _check_numbers(self.embeddings)


Virtual = Prefix | Prompt


@dataclass(frozen=True, slots=True)
class Prefixed:
    """Attention to `keys` and `values` [P, Hkv, Dh] first, which every query sees, then as `mask` says (bool, [..., 1, S, S])."""

    keys: Tensor
    values: Tensor
    mask: Tensor
    whole: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    """Keys and values of all ranks from those of this one, where ranks share sequences (`herd.parallel.context`)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        assert chunk is None  # models with chunks are refused
        if self.whole is not None:
            k, v = self.whole(k, v)
        keys, values = (
            torch.cat([first.to(x.dtype).expand(*x.shape[:-3], *first.shape), x], dim=-3)
            for first, x in ((self.keys, k), (self.values, v))
        )
        return masked_attention(q, keys, values, self.mask)


def prefixed(inner: Sequence[Attend], keys: PerLayer, values: PerLayer, length: int) -> Sequence[Attend]:
    """`inner`, one function per layer for documents of `length` positions in a row, with the layer's keys and values
    [P, Hkv, Dh] before each document. Raises ConfigError for attention whose mask is not known (bound to a cache)."""
    masks: dict[int, Tensor] = {}
    out = []
    for see, k, v in zip(inner, keys, values, strict=True):
        if id(see) not in masks:
            own = _mask(see, length, k.device)
            masks[id(see)] = torch.cat([own.new_ones(*own.shape[:-1], len(k)), own], dim=-1)
        out.append(Prefixed(k, v, masks[id(see)], getattr(see, "whole", None)))
    return out


def _mask(see: Attend, length: int, device: torch.device) -> Tensor:
    if isinstance(see, Packed):
        return see.mask(None)
    if hasattr(see, "whole"):  # herd.parallel.context.Gathered, whose import costs
        return cast(Any, see).masks[None]
    if isinstance(see, Causal):
        places = torch.arange(length, device=device)
        return visible(places, places, None).unsqueeze(-3)
    raise ConfigError(
        f"virtual tokens go before whole documents (Causal, Packed), not into {type(see).__name__}: a cache holds their keys and "
        "values itself (herd.engine.virtual), give the engine the adapter and the base"
    )


class LayerPrefix(nn.Module):
    """The trained keys and values [P, Hkv, Dh] of one layer; called, it gives them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class PromptEmbeddings(nn.Module):
    """Trained embeddings [P, D]; called, it gives them, or what of them is this rank's."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings)

    def forward(self) -> Tensor:
        return self.embeddings


class _Tuned(Llama):
    """A Llama over the children of another, frozen one, which stays as it was. Names of parameters are the same, too."""

    def __init__(self, base: Llama) -> None:
        if isinstance(base, _Tuned):
            raise ConfigError("the model has virtual tokens already")
        _refuse_chunks(base.config)
        nn.Module.__init__(self)
        self.config = base.config
        for name, child in base.named_children():
            self.add_module(name, child)
        self.requires_grad_(False).train(base.training)

    def virtual(self) -> tuple[PerLayer, PerLayer]:
        """The keys and values [P, Hkv, Dh] of every layer before every document."""
        raise NotImplementedError

    def before(self, layers: range) -> nn.Module:
        """What a pipeline's stage of `layers` has of the virtual tokens: a `herd.parallel.pipeline.Before`."""
        raise NotImplementedError

    def hidden(self, x: Tensor, positions: Tensor | None = None, attend: Sequence[Attend] | None = None) -> Tensor:
        """As `Llama.hidden`, of documents behind the virtual tokens: `positions` count from the first real token."""
        keys, values = self.virtual()
        positions = torch.arange(x.shape[-2], device=x.device) if positions is None else positions
        attend = uncached(len(self.layers)) if attend is None else attend
        return super().hidden(x, positions + len(keys[0]), prefixed(attend, keys, values, x.shape[-2]))


class PrefixTuned(_Tuned):
    """A frozen model behind trained keys and values (float32). Raises as `Prefix.check`."""

    def __init__(self, base: Llama, prefix: Prefix) -> None:
        prefix.check(base.config)
        super().__init__(base)
        device = lives_on(base)
        self.prefix = nn.ModuleList(
            LayerPrefix(*(part.to(device, torch.float32, copy=True) for part in pair))
            for pair in zip(prefix.keys, prefix.values, strict=True)
        )

    def virtual(self) -> tuple[PerLayer, PerLayer]:
        return _both(self.prefix)

    def before(self, layers: range) -> nn.Module:
        return _PrefixBefore(self.prefix[i] for i in layers)

    def adapter(self, base: str | None = None) -> Prefix:
        """What was trained, detached."""
        keys, values = (torch.stack([part.detach() for part in parts]) for parts in self.virtual())
        return Prefix(keys, values, base)


class PromptTuned(_Tuned):
    """A frozen model behind trained embeddings (float32). Raises as `Prompt.check`."""

    passes_twice = True
    """Keys and values of the embeddings are made by the same layers (`herd.parallel.fsdp` has to know)."""

    def __init__(self, base: Llama, prompt: Prompt) -> None:
        prompt.check(base.config)
        super().__init__(base)
        self.tokens = prompt.count  # of which several ranks may each compute with a part
        self.prompt = PromptEmbeddings(prompt.embeddings.to(lives_on(base), torch.float32, copy=True))

    def virtual(self) -> tuple[PerLayer, PerLayer]:
        return keys_and_values(self, self.prompt(), self.tokens)

    def before(self, layers: range) -> nn.Module:
        return _PromptBefore(self.prompt if layers.start == 0 else None, self.tokens, [self.layers[i] for i in layers])

    def adapter(self, base: str | None = None) -> Prompt:
        """What was trained, detached."""
        return Prompt(self.prompt.embeddings.detach(), base)


Start = Literal["vocabulary", "zero", "random"] | Sequence[int]


def tune_prefix(model: Llama, count: int = 20, start: Start = "vocabulary") -> PrefixTuned:
    """`model`, frozen, behind `count` virtual tokens of keys and values.

    `start`: what the model makes of ids drawn from the vocabulary, or of given ids (which are repeated or cut to `count`);
    "zero" or "random" (normal, as PEFT). Raises ConfigError.
    """
    config = model.config
    shape = config.n_layers, _count(count), config.n_kv_heads, config.head_dim
    if isinstance(start, str) and start in ("zero", "random"):
        make = torch.zeros if start == "zero" else torch.randn
        return PrefixTuned(model, Prefix(make(shape), make(shape)))
    _refuse_chunks(config)
    with torch.no_grad(), lent(model):
        ids = _ids(config, count, start).to(lives_on(model))
        return PrefixTuned(model, Prefix(*keys_and_values(model, model.embed(ids))))


def tune_prompt(model: Llama, count: int = 20, start: Start = "vocabulary") -> PromptTuned:
    """`model`, frozen, behind `count` virtual tokens of embeddings; `start` as for `tune_prefix`. Raises ConfigError."""
    config = model.config
    shape = _count(count), config.dim
    if isinstance(start, str) and start in ("zero", "random"):
        return PromptTuned(model, Prompt(torch.zeros(shape) if start == "zero" else torch.randn(shape)))
    with torch.no_grad(), lent(model):
        ids = _ids(config, count, start).to(lives_on(model))
        return PromptTuned(model, Prompt(model.embed(ids)))


class _Heard:
    """Causal attention that remembers its keys and values [1, P, Hkv, Dh]."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        self.k, self.v = k, v
        return masked_attention(q, k, v, None)


def keys_and_values(model: Llama, x: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values [L, P, Hkv, Dh] that `model` makes of embeddings x [P, D] at positions 0 to P - 1.

    `count` says P where x is one rank's part of them (`herd.parallel.tensor`).
    """
    heard = [_Heard() for _ in model.layers]
    positions = torch.arange(len(x) if count is None else count, device=x.device)
    Llama.hidden(model, x.to(_dtype(model))[None], positions, heard)
    keys, values = ([one.k if part == "k" else one.v for one in heard] for part in "kv")
    return _stack(keys), _stack(values)


class _PrefixBefore(nn.Module):
    """The prefixes of a stage's layers."""

    travels = False

    def __init__(self, prefixes: Iterable[nn.Module]) -> None:
        super().__init__()
        self.prefix = nn.ModuleList(prefixes)

    def forward(
        self, through: Through, see: Sequence[Attend], positions: Tensor, arrived: Tensor | None
    ) -> tuple[Tensor, Sequence[Attend], Tensor | None]:
        keys, values = _both(self.prefix)
        return positions + len(keys[0]), prefixed(see, keys, values, positions.shape[-1]), None


class _PromptBefore(nn.Module):
    """The prompt on its way through a stage's layers, which has its embeddings when it is the first."""

    travels = True

    def __init__(self, prompt: PromptEmbeddings | None, count: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.prompt, self.count = prompt, count
        self._layers = tuple(layers)  # the stage's own: no children

    def forward(
        self, through: Through, see: Sequence[Attend], positions: Tensor, arrived: Tensor | None
    ) -> tuple[Tensor, Sequence[Attend], Tensor | None]:
        if self.prompt is not None:
            arrived = self.prompt().to(cast(Any, self._layers[0]).attention_norm.weight.dtype)[None]
        assert arrived is not None
        heard = [_Heard() for _ in self._layers]
        leaving = through(arrived, torch.arange(self.count, device=arrived.device), heard)
        keys, values = (
            [cast(Tensor, part)[0] for part in parts] for parts in zip(*((h.k, h.v) for h in heard), strict=True)
        )
        return positions + self.count, prefixed(see, keys, values, positions.shape[-1]), leaving


def _both(prefixes: nn.ModuleList) -> tuple[list[Tensor], list[Tensor]]:
    keys, values = zip(*(prefix() for prefix in prefixes), strict=True)
    return list(keys), list(values)


def _stack(parts: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])


def _dtype(model: Llama) -> torch.dtype:
    return model.norm.weight.dtype


def _count(count: int) -> int:
    if type(count) is not int or count < 1:
        raise ConfigError(f"{count!r} virtual tokens: give a whole number of at least 1")
    return count


def _ids(config: ModelConfig, count: int, start: Start) -> Tensor:
    _count(count)
    if start == "vocabulary":
        return torch.randint(config.vocab_size, (count,))
    if isinstance(start, str) or not start or not all(0 <= id < config.vocab_size for id in start):
        raise ConfigError(f"virtual tokens start as vocabulary, zero, random, or ids below {config.vocab_size}")
    return torch.tensor([start[i % len(start)] for i in range(count)])


def _check_numbers(*tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise CheckpointError(f"virtual tokens are stored as {tensor.dtype}: expected floats")
        if not tensor.is_meta and not bool(tensor.isfinite().all()):
            raise CheckpointError("virtual tokens hold numbers that are not finite")


def _refuse_chunks(config: ModelConfig) -> None:
    if any(spec.chunk is not None for spec in config.layers) or config.temper is not None:
        raise ConfigError(
            "prefix and prompt tuning are for Llama 1 to 3: layers of Llama 4 see one chunk of positions at a time, and would "
            "lose sight of virtual tokens behind it; train LoRA instead"
        )
