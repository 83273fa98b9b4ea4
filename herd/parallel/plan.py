"""The one table of which dimension of each parameter is cut: Meta's files, training and serving all read it. Imports no torch.

Names are canonical (`Llama.state_dict()`), dimensions are of the canonical layout. A matrix cut along 0 makes a part of its
outputs (a column of Megatron's drawing), one cut along 1 takes a part of its inputs and makes a summand of the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from herd.errors import ConfigError
from herd.model.config import ModelConfig

__all__ = ["CUTS", "check", "cut_of", "known", "kv_copies"]

_L = "layers.{i}."

CUTS: Mapping[str, int] = {
    "tok_embeddings.weight": 0,  # rows of the vocabulary
    _L + "attention.wq.weight": 0,  # heads
    _L + "attention.wk.weight": 0,
    _L + "attention.wv.weight": 0,
    _L + "attention.wo.weight": 1,
    _L + "feed_forward.w1.weight": 0,  # width
    _L + "feed_forward.w3.weight": 0,
    _L + "feed_forward.w2.weight": 1,
    _L + "feed_forward.experts.w1": 1,  # the width of every expert
    _L + "feed_forward.experts.w3": 1,
    _L + "feed_forward.experts.w2": 2,
    _L + "feed_forward.shared_expert.w1.weight": 0,
    _L + "feed_forward.shared_expert.w3.weight": 0,
    _L + "feed_forward.shared_expert.w2.weight": 1,
    "output.weight": 0,
}
"""Every parameter that is cut; the others (norms, routers) are whole on every rank."""

_LAYER = re.compile(r"layers\.\d+\.")

_FACTORS: Mapping[int, Mapping[str, int]] = {0: {"b": 0, "magnitude": 0}, 1: {"a": 1}}
"""What of a low-rank change B A is cut when its matrix is cut along 0 or 1: a has the inputs, b and magnitude the outputs."""
_LOOKED_UP: Mapping[str, int] = {"b": 0}
"""The same for the embedding, whose inputs are its rows."""
_PREFIX = {"prefix_keys": 2, "prefix_values": 2}
"""Virtual tokens as keys and values [L, P, Hkv, Dh]: heads."""


def cut_of(name: str, *, experts: str = "width") -> int | None:
    """The dimension along which the canonical parameter `name` is cut, None when it is whole everywhere.

    With `experts` "number", routed experts are dealt out whole instead of each being cut. Factors of adapters (`herd.adapters`)
    are cut as the matrix that they change: `layers.3.attention.wq` has `base.weight`, `a`, `b` and `magnitude`.
    """
    row = _LAYER.sub(_L, name)
    if experts == "number" and ".experts.w" in row:
        return 0
    home, _, kind = row.rpartition(".")
    if kind in ("a", "b", "magnitude"):
        changed = CUTS.get(f"{home}.weight")
        if changed is None:
            return None
        return (_LOOKED_UP if home == "tok_embeddings" else _FACTORS[changed]).get(kind)
    return _PREFIX.get(row, CUTS.get(row.replace(".base.weight", ".weight")))


def known(name: str) -> bool:
    """Whether the plan knows the parameter `name`: one that is cut, or one that is whole on every rank for a reason."""
    row = _LAYER.sub(_L, name)
    home, _, kind = row.rpartition(".")
    if kind in ("a", "b", "magnitude"):
        return f"{home}.weight" in CUTS
    return cut_of(name) is not None or row == "prompt" or row.endswith(("norm.weight", "router.weight"))


def kv_copies(config: ModelConfig, ranks: int) -> int:
    """How many ranks share one key/value head: 1 unless there are more ranks than heads."""
    return max(1, ranks // config.n_kv_heads)


def check(config: ModelConfig, ranks: int, *, experts: str = "width") -> None:
    """Raise ConfigError naming what `ranks` cannot share evenly."""
    if ranks > config.n_kv_heads:
        fits, word = ranks % config.n_kv_heads == 0, "a multiple"
    else:
        fits, word = config.n_kv_heads % ranks == 0, "a divisor"
    if not fits:
        raise ConfigError(f"tp {ranks}: must be {word} of the {config.n_kv_heads} key/value heads")
    shared = {"query heads": config.n_heads, "units of hidden_dim": config.hidden_dim}
    if config.moe is not None:
        by_number = experts == "number"
        shared["experts" if by_number else "units of an expert"] = (
            config.moe.n_experts if by_number else config.moe.hidden_dim
        )
        shared["units of the shared expert"] = config.moe.hidden_dim
    if all(spec.moe for spec in config.layers):
        del shared["units of hidden_dim"]
    for what, count in shared.items():
        if count % ranks:
            raise ConfigError(f"tp {ranks}: the {count} {what} cannot be shared evenly by {ranks} ranks")
