"""What two choices of the family save or cost: key/value heads shared by several query heads, and a large vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace

from herd.model.accounting import parameters
from herd.model.config import ModelConfig
from herd.planning.memory import KVType, kv_bytes

__all__ = ["Savings", "savings"]

SMALL_VOCABULARY = 32_000
CHARACTERS_PER_TOKEN = {"llama2": 3.17, "llama3": 3.94}
"""English text, as measured for "The Llama 3 Herd of Models", section 3.2, with the vocabularies of Llama 2 and 3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Savings:
    """`heads_per_kv` query heads share one key/value head; `mha_*` are the figures if each had its own.

    `vocabulary_parameters` is what the vocabulary adds to the parameters over one of 32,000 (negative: saves);
    `tokens_for_the_same_text` compares English text with Llama 2's vocabulary, None where nothing was published.
    """

    heads_per_kv: int
    mha_kv_bytes: int
    kv_bytes_saved: int
    mha_extra_parameters: int
    vocabulary_size: int
    vocabulary_parameters: int
    tokens_for_the_same_text: float | None


def savings(config: ModelConfig, kind: KVType, context: int, batch: int) -> Savings:
    """For `batch` sequences of `context` tokens."""
    each = replace(config, n_kv_heads=config.n_heads)
    small = replace(config, vocab_size=SMALL_VOCABULARY)
    ours, theirs = (batch * kv_bytes(c, kind, context) for c in (config, each))
    llama3 = config.vocab_size == 128_256
    return Savings(
        heads_per_kv=config.n_heads // config.n_kv_heads,
        mha_kv_bytes=theirs,
        kv_bytes_saved=theirs - ours,
        mha_extra_parameters=parameters(each) - parameters(config),
        vocabulary_size=config.vocab_size,
        vocabulary_parameters=parameters(config) - parameters(small),
        tokens_for_the_same_text=CHARACTERS_PER_TOKEN["llama2"] / CHARACTERS_PER_TOKEN["llama3"] if llama3 else None,
    )
