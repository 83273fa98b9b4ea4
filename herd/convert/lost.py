"""What a quality report holds: data first (JSON), and the same as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LayerLoss", "MatrixLoss", "Perplexity", "Quality", "Spread"]

SHOWN = 10
"""Layers that the text shows; the JSON and the plot have all of them."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A perplexity (or a ratio of two) and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} +/- {self.error:.4f}"


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the KL divergences of all scored positions, in nats."""

    mean: float
    median: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class LayerLoss:
    """Relative error of what a layer gives: `alone` on the original's input, `total` with all that was lost before it."""

    name: str
    alone: float | None
    total: float


@dataclass(frozen=True, slots=True)
class MatrixLoss:
    """A matrix: how A and B store it, B's bits per value, its values, sum of (a - b)^2 and of a^2."""

    name: str
    stored_a: str
    stored_b: str
    bits: float
    values: int
    lost: float
    size: float

    @property
    def error(self) -> float:
        """|A - B| / |A|."""
        return math.sqrt(self.lost / self.size) if self.size else 0.0

    @property
    def kind(self) -> str:
        """Which matrix of a layer it is: wq, w2, ...; experts' are "experts.w1"."""
        parts = self.name.removesuffix(".weight").split(".")
        if parts[0] != "layers":
            return parts[0]
        inner = [part for part in parts[2:] if part not in ("attention", "feed_forward") and not part.isdigit()]
        return ".".join(inner)


@dataclass(frozen=True, slots=True)
class Quality:
    """B held against A on a text: see `herd.convert.quality` for the definitions.

    `tokens` is what the text has, `scored` how many predictions were judged. `ratio` is B's perplexity over A's, with the
    error of the difference (the two read the same tokens, so it is much smaller than that of either).
    """

    text: str
    tokens: int
    windows: int
    context: int
    scored: int
    a: Perplexity
    b: Perplexity
    ratio: Perplexity
    kl: Spread
    same_top: float
    layers: tuple[LayerLoss, ...]
    matrices: tuple[MatrixLoss, ...]
    notes: tuple[str, ...] = ()

    @property
    def kinds(self) -> dict[str, tuple[float, float, str]]:
        """Kind of matrix -> relative error over all layers, bits per value, the types it is stored in."""
        found: dict[str, list[MatrixLoss]] = {}
        for matrix in self.matrices:
            found.setdefault(matrix.kind, []).append(matrix)
        return {kind: _together(group) for kind, group in found.items()}

    @property
    def by_layer(self) -> dict[str, float]:
        """layers.0, ... and the matrices outside of layers -> relative error of their weights."""
        found: dict[str, list[MatrixLoss]] = {}
        for matrix in self.matrices:
            parts = matrix.name.split(".")
            found.setdefault(".".join(parts[:2]) if parts[0] == "layers" else parts[0], []).append(matrix)
        return {name: _together(group)[0] for name, group in found.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        data["matrices"] = [
            {
                "name": m.name,
                "stored_a": m.stored_a,
                "stored_b": m.stored_b,
                "bits": round(m.bits, 4),
                "error": m.error,
            }
            for m in self.matrices
        ]
        data["kinds"] = {kind: {"error": e, "bits": round(b, 4), "stored": s} for kind, (e, b, s) in self.kinds.items()}
        data["weights_by_layer"] = self.by_layer
        return data

    def lines(self) -> Iterator[str]:
        """For people, at most 76 columns (names of files excepted)."""
        yield f"{self.text}: {self.tokens:,} tokens, {self.windows} windows of {self.context}, {self.scored:,} predictions"
        yield f"perplexity of A     {_short(self.a)}"
        yield f"perplexity of B     {_short(self.b)}"
        yield f"B over A            {_short(self.ratio)}"
        kl = self.kl
        yield f"KL divergence, nats mean {kl.mean:.2g}, median {kl.median:.2g}, 99 % {kl.p99:.2g}, max {kl.max:.2g}"
        yield f"same first choice   {self.same_top:.2%}"
        yield ""
        yield "matrix           bits  error of weights  stored as"
        for kind, (error, bits, stored) in self.kinds.items():
            yield f"{kind:<14} {bits:>6.2f}  {error:>16.3%}  {stored}"
        yield ""
        yield "layer        error of: weights  its output alone  output so far"
        weights = self.by_layer | {"embedding": self.by_layer.get("tok_embeddings", 0.0)}
        for layer in self._shown():
            alone = "" if layer.alone is None else f"{layer.alone:.3%}"
            yield f"{layer.name:<12} {weights.get(layer.name, 0.0):>17.3%} {alone:>17} {layer.total:>14.3%}"
        left = len(self.layers) - len(self._shown())
        if left:
            yield f"and {left} more layers, in the JSON report"

    def _shown(self) -> list[LayerLoss]:
        """First, last, the worst by itself, and an even choice of the others."""
        if len(self.layers) <= SHOWN + 2:
            return list(self.layers)
        last = len(self.layers) - 1
        worst = max(range(1, last + 1), key=lambda i: self.layers[i].alone or 0.0)
        chosen = {0, 1, last, worst} | {round(i * last / (SHOWN - 1)) for i in range(SHOWN)}
        return [self.layers[i] for i in sorted(chosen)]


def _together(group: Iterable[MatrixLoss]) -> tuple[float, float, str]:
    members = list(group)
    size, values = sum(m.size for m in members), sum(m.values for m in members)
    error = math.sqrt(sum(m.lost for m in members) / size) if size else 0.0
    stored = ", ".join(dict.fromkeys(m.stored_b for m in members))
    return error, sum(m.bits * m.values for m in members) / values, stored


def _short(number: Perplexity) -> str:
    return f"{number.value:.4g} +/- {number.error:.2g}"
