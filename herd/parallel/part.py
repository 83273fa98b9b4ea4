"""Which part of a model one rank of several holds when they run it together. Imports no torch.

Every rank has its own heads, its own width of each feed-forward and each expert, and its own rows of the vocabulary, by the table
of `herd.parallel.plan`. What it holds is a Llama of its own, with fewer heads, narrower and with a smaller vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from herd.errors import ConfigError
from herd.model.config import ModelConfig
from herd.parallel.plan import check, cut_of, kv_copies

__all__ = ["Part"]

_VOCABULARY = ("tok_embeddings.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class Part:
    """The part of rank `rank` of `ranks` in a model of `whole`. Raises ConfigError, with the counts, for what they cannot share.

    With more ranks than key/value heads, neighbours hold the same head.
    """

    whole: ModelConfig
    rank: int
    ranks: int

    def __post_init__(self) -> None:
        check(self.whole, self.ranks)
        if self.rows * (self.ranks - 1) >= self.whole.vocab_size:
            raise ConfigError(f"tp {self.ranks}: the {self.whole.vocab_size} rows of the vocabulary are too few")

    @property
    def rows(self) -> int:
        """Rows of the vocabulary on every rank but the last, which has what is left."""
        return -(-self.whole.vocab_size // self.ranks)

    @property
    def config(self) -> ModelConfig:
        """The geometry of what this rank holds."""
        whole, ranks, moe = self.whole, self.ranks, self.whole.moe
        dense = any(not spec.moe for spec in whole.layers)
        first = self.rank * self.rows
        return replace(
            whole,
            n_heads=whole.n_heads // ranks,
            n_kv_heads=max(1, whole.n_kv_heads // ranks),
            hidden_dim=whole.hidden_dim // ranks if dense else whole.hidden_dim,
            vocab_size=min(self.rows, whole.vocab_size - first),
            moe=None if moe is None else replace(moe, hidden_dim=moe.hidden_dim // ranks),
        )

    def cut(self, name: str, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
        """(dimension, start, count) of this rank's part of the canonical parameter `name` of `shape`; None: it holds all."""
        dim = cut_of(name)
        if dim is None or self.ranks == 1:
            return None
        size = shape[dim]
        if name in _VOCABULARY:
            start = self.rank * self.rows
            return dim, start, min(self.rows, size - start)
        copies = kv_copies(self.whole, self.ranks) if name.endswith(("wk.weight", "wv.weight")) else 1
        count = size * copies // self.ranks
        return dim, self.rank // copies * count, count
