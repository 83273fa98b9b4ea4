"""The one table of which dimension of each parameter is cut: Meta's files, training and serving all read it. Imports no torch.

Names are canonical (`Llama.state_dict()`), dimensions are of the canonical layout. A matrix cut along 0 makes a part of its
outputs (a column of Megatron's drawing), one cut along 1 takes a part of its inputs and makes a summand of the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from herd.errors import ConfigError
from herd.model.config import ModelConfig

__all__ = ["CUTS", "check", "cut_of", "kv_copies"]

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


def cut_of(name: str, *, experts: str = "width") -> int | None:
    """The dimension along which the canonical parameter `name` is cut, None when it is whole everywhere.

    With `experts` "number", routed experts are dealt out whole instead of each being cut.
    """
    row = _LAYER.sub(_L, name)
    if experts == "number" and ".experts.w" in row:
        return 0
    return CUTS.get(row)


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
