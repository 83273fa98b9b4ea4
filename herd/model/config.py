"""The geometry of a Llama: numbers only, no names, no paths, no behaviour. Imports no torch.

A difference between family members is a number in `ModelConfig` or a value in one layer's `LayerSpec`; the layer count is
the length of `layers`. Words are Meta's (params.json); Hugging Face and GGUF spellings live in `herd.checkpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from herd.errors import ConfigError

__all__ = [
    "LayerSpec",
    "MoEConfig",
    "ModelConfig",
    "Placement",
    "RopeScaling",
    "Temper",
    "hidden_dim_of",
    "irope",
    "plain",
]

Placement = Literal["rope", "rope_norm", "none", "tempered"]
"""How a layer's queries and keys learn their position: RoPE; RoPE then weightless RMS norm; nothing; nothing with
log-scaled queries (Llama 4)."""

MAX_LAYERS = 4096
"""More layers than any Llama will have: a larger count is a damaged or hostile file, refused before it costs memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """Llama 3.1 frequency scaling (`rope_type: llama3`), see `herd.model.rope.frequencies`."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        _positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
        if self.high_freq_factor < self.low_freq_factor:
            raise ConfigError(
                f"rope scaling: high_freq_factor {self.high_freq_factor} is below low_freq_factor {self.low_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Temper:
    """Query scale of Llama 4's position-free layers: 1 + attn_scale * log(floor((pos + 1) / floor_scale) + 1)."""

    floor_scale: float = 8192.0
    attn_scale: float = 0.1

    def __post_init__(self) -> None:
        _positive(self, "floor_scale")
        if not _is_number(self.attn_scale):
            raise ConfigError(f"attn_scale is {_short(self.attn_scale)}: expected a finite number")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """Routed experts beside one shared expert, all of width `hidden_dim` (Llama 4)."""

    n_experts: int
    top_k: int = 1
    hidden_dim: int

    def __post_init__(self) -> None:
        _positive(self, "n_experts", "top_k", "hidden_dim")
        if self.top_k > self.n_experts:
            raise ConfigError(f"moe: top_k {self.top_k} is larger than n_experts {self.n_experts}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """What is special about one layer. `chunk`: attend only within blocks of this many positions; None is global."""

    placement: Placement = "rope"
    chunk: int | None = None
    moe: bool = False

    def __post_init__(self) -> None:
        if self.placement not in get_args(Placement):
            raise ConfigError(
                f"layer placement {_short(self.placement)} is not one of {', '.join(get_args(Placement))}"
            )
        if self.chunk is not None:
            _positive(self, "chunk")
        if not isinstance(self.moe, bool):
            raise ConfigError(f"moe is {_short(self.moe)}: expected True or False")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything needed to build a text Llama. All sizes are final (already rounded). Raises ConfigError.

    `hidden_dim` is the width of dense feed-forward layers; experts have theirs in `moe`. `layers` is in execution order.
    """

    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    max_seq_len: int = 8192
    tie_embeddings: bool = False
    moe: MoEConfig | None = None
    temper: Temper | None = None

    @property
    def n_layers(self) -> int:
        """Depth of the decoder."""
        return len(self.layers)

    def __post_init__(self) -> None:
        _positive(
            self,
            "dim",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "hidden_dim",
            "vocab_size",
            "norm_eps",
            "rope_theta",
            "max_seq_len",
        )
        if not isinstance(self.layers, tuple) or not all(isinstance(spec, LayerSpec) for spec in self.layers):
            raise ConfigError("layers: expected a tuple of LayerSpec, as plain() and irope() make")
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise ConfigError(f"{len(self.layers)} layers: expected between 1 and {MAX_LAYERS}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd: rotary positions need pairs")
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"tie_embeddings is {_short(self.tie_embeddings)}: expected True or False")
        if any(spec.moe for spec in self.layers) != (self.moe is not None):
            raise ConfigError("moe must be given exactly when some layer has moe=True")
        if any(spec.placement == "tempered" for spec in self.layers) and self.temper is None:
            raise ConfigError("a tempered layer needs `temper`")


def plain(n_layers: int) -> tuple[LayerSpec, ...]:
    """Layers of Llama 1 to 3.3: rotary positions, global attention, dense feed-forward."""
    return (LayerSpec(),) * _layer_count(n_layers)


def irope(
    n_layers: int,
    *,
    nope: Sequence[int] | None = None,
    nope_every: int = 4,
    chunk: int | None = 8192,
    moe_layers: Sequence[int] = (),
    qk_norm: bool = True,
    temper: bool = True,
) -> tuple[LayerSpec, ...]:
    """Layers of Llama 4: chunked rotary layers, and every `nope_every`-th global without positions.

    `nope` lists the position-free layers by index instead of the regular pattern; `moe_layers` the indices with experts.
    Source: llama-models models/llama4/model.py.
    """
    _layer_count(n_layers)
    without = set(nope) if nope is not None else {i for i in range(n_layers) if (i + 1) % nope_every == 0}
    experts = set(moe_layers)
    rotary: Placement = "rope_norm" if qk_norm else "rope"
    free: Placement = "tempered" if temper else "none"
    return tuple(
        LayerSpec(
            placement=free if i in without else rotary,
            chunk=None if i in without else chunk,
            moe=i in experts,
        )
        for i in range(n_layers)
    )


def hidden_dim_of(dim: int, *, multiple_of: int, ffn_dim_multiplier: float | None = None, ffn_exp: float = 4.0) -> int:
    """Meta's feed-forward width rule, with its two truncations (llama-models models/llama3/model.py)."""
    hidden = int(2 * int(ffn_exp * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def _layer_count(n_layers: int) -> int:
    if isinstance(n_layers, bool) or not isinstance(n_layers, int) or not 1 <= n_layers <= MAX_LAYERS:
        raise ConfigError(f"n_layers is {_short(n_layers)}: expected an integer between 1 and {MAX_LAYERS}")
    return n_layers


def _positive(config: object, *names: str) -> None:
    """Reject zero, negative, non-finite and non-numeric fields by name."""
    for name in names:
        value = getattr(config, name)
        whole = type(config).__annotations__[name].startswith("int")
        if not _is_number(value) or (whole and not isinstance(value, int)) or value <= 0:
            kind = "a positive integer" if whole else "a positive number"
            raise ConfigError(f"{name} is {_short(value)}: expected {kind}")


def _is_number(value: object) -> bool:
    """Whether `value` is a number that a float can hold: JSON can carry others."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _short(value: object) -> str:
    """`value` as it fits in a message: a damaged file can hold a number of a thousand digits."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number too long to print"
    return text if len(text) <= 60 else f"{text[:50]}..."
