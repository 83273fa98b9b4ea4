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

_LAYER = re.compile(r"(layers|prefix)\.\d+\.")

_FACTORS: Mapping[int, Mapping[str, int]] = {0: {"b": 0, "magnitude": 0}, 1: {"a": 1}}
"""What of a low-rank change B A is cut when its matrix is cut along 0 or 1: a has the inputs, b and magnitude the outputs."""
_LOOKED_UP: Mapping[str, int] = {"b": 0}
"""The same for the embedding, whose inputs are its rows."""
_EXPERT_FACTORS: Mapping[str, int | None] = {"a13": None, "b13": 2, "a2": 2, "b2": None}
"""The same for routed experts that are each cut: a13 [E, r, D], b13 [E, 2, F, r], a2 [E, r, F], b2 [E, D, r]."""
_PREFIX = {"prefix.{i}.keys": 1, "prefix.{i}.values": 1}
"""Virtual tokens as keys and values [P, Hkv, Dh]: heads."""


def cut_of(name: str, *, experts: str = "width") -> int | None:
    """The dimension along which the canonical parameter `name` is cut, None when it is whole everywhere.

    With `experts` "number", routed experts are dealt out whole instead of each being cut. Factors of adapters (`herd.adapters`)
    are cut as the matrix that they change: `layers.3.attention.wq` has `base.weight`, `a`, `b` and `magnitude`.
    """
    row = _row(name)
    home, _, kind = row.rpartition(".")
    if home.endswith(".experts"):
        return 0 if experts == "number" else _EXPERT_FACTORS.get(kind, CUTS.get(row))
    if kind in ("a", "b", "magnitude"):
        changed = CUTS.get(f"{home}.weight")
        if changed is None:
            return None
        return (_LOOKED_UP if home == "tok_embeddings" else _FACTORS[changed]).get(kind)
    return _PREFIX.get(row, CUTS.get(row))


def _row(name: str) -> str:
    """`name` as tables have it: of any layer, and of the matrix that an adapter lies beside."""
    return _LAYER.sub(r"\1.{i}.", name).replace(".base.", ".")


def known(name: str) -> bool:
    """Whether the plan knows the parameter `name`: one that is cut, or one that is whole on every rank for a reason."""
    row = _row(name)
    home, _, kind = row.rpartition(".")
    if kind in ("a", "b", "magnitude"):
        return f"{home}.weight" in CUTS
    if home.endswith(".experts") and kind in _EXPERT_FACTORS:
        return True
    return cut_of(name) is not None or row == "prompt.embeddings" or row.endswith(("norm.weight", "router.weight"))


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
