"""How much a model lost: perplexity, KL divergence and choices on a text, and the error of every layer and matrix.

Two checkpoints of the same shape are run side by side, layer by layer from their files in float32 (`herd.convert.stream`): never
more than one layer of one of them is in memory, and logits exist for a slice of the vocabulary at a time. The definitions
are those of llama.cpp's perplexity tool, so figures for the same text and window are its figures:

- perplexity: exp of the mean of -ln p(next token); its error is the standard error of that mean, times the perplexity;
- KL divergence: sum over the vocabulary of p_A (ln p_A - ln p_B), per position, in nats;
- same choice: share of positions where the most likely token is the same.

Letters: W windows, S positions of a window, N scored positions, D dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from herd.checkpoint.store import TensorStore
from herd.convert.lost import LayerLoss, MatrixLoss, Perplexity, Quality, Spread
from herd.convert.sample import Sample
from herd.convert.stream import Streamed, of_store
from herd.convert.weights import rows_of, tensor_bytes, weights_of
from herd.errors import ConfigError
from herd.model.attend import uncached

__all__ = ["check_comparable", "measure", "readings"]

Tick = Callable[[int], None]

SLICE = 1 << 20
"""Logits computed at a time on either side."""


def readings(store: TensorStore) -> int:
    """About how many bytes of `store` a measurement reads: all for the errors of matrices, all for running the model."""
    # A shared table is read at both ends.
    table = store.info("tok_embeddings.weight").nbytes if store.config.tie_embeddings else 0
    return 2 * tensor_bytes(store) + table


def check_comparable(a: TensorStore, b: TensorStore) -> None:
    """Raise ConfigError unless the two are models of the same shape."""
    one, other = a.config, b.config
    for field in ("vocab_size", "n_layers", "dim"):
        if getattr(one, field) != getattr(other, field):
            raise ConfigError(
                f"quality compares two forms of one model, and {field} is {getattr(one, field)} in A, "
                f"{getattr(other, field)} in B"
            )


@torch.inference_mode()
def measure(a: TensorStore, b: TensorStore, sample: Sample, tick: Tick = lambda _: None) -> Quality:
    """What `b` lost of `a` on `sample`. `tick` hears of bytes read. Raises ConfigError when their shapes differ."""
    check_comparable(a, b)
    matrices = tuple(_matrices(a, b, tick))
    layers, states_a, states_b = _layers(a, b, sample, tick)
    first, targets = sample.first, sample.windows[:, sample.first + 1 :].flatten()
    rows_a, rows_b = (torch.cat([x[0, first:-1] for x in states]) for states in (states_a, states_b))
    found = _Scores(len(targets))
    for start, left, right in _output_rows(a, b, len(targets), tick):
        found.add(rows_a @ left.T, rows_b @ right.T, targets, start)
    nll_a, nll_b, kl, same = found.done()
    return Quality(
        text=sample.name,
        tokens=sample.tokens,
        windows=sample.windows.shape[0],
        context=sample.windows.shape[1],
        scored=len(targets),
        a=_perplexity(nll_a),
        b=_perplexity(nll_b),
        ratio=_perplexity(nll_b - nll_a),
        kl=_spread(kl),
        same_top=float(same.double().mean()),
        layers=tuple(layers),
        matrices=matrices,
        notes=sample.notes,
    )


def _matrices(a: TensorStore, b: TensorStore, tick: Tick) -> Iterator[MatrixLoss]:
    held_a, held_b = weights_of(a), weights_of(b)
    for name, own in held_a.items():
        other = held_b.get(name)
        info = a.info(own)
        if other is None or len(info.shape) < 2 or info.shape != b.info(other).shape:
            continue
        if name != own and name != other:  # a tied output on both sides: the embedding was seen
            continue
        lost = size = 0.0
        for (_, left), (_, right) in zip(rows_of(a, own), rows_of(b, other), strict=True):
            lost += float((left - right).double().square_().sum())
            size += float(left.double().square_().sum())
        tick(info.nbytes + b.info(other).nbytes)
        told = b.info(other)
        yield MatrixLoss(
            name, info.stored, told.stored, 8 * told.nbytes / math.prod(told.shape), math.prod(told.shape), lost, size
        )


def _layers(
    a: TensorStore, b: TensorStore, sample: Sample, tick: Tick
) -> tuple[list[LayerLoss], list[Tensor], list[Tensor]]:
    """The errors of layers, and the normed states [1, S, D] of every window on both sides."""
    run_a, run_b = (Streamed(of_store(store, tick=tick)) for store in (a, b))
    windows = list(sample.windows)
    states_a, states_b = run_a.embed(windows), run_b.embed(windows)
    positions = torch.arange(sample.windows.shape[1])
    rotary_a, rotary_b = run_a.rope(positions), run_b.rope(positions)
    attends_a, attends_b = uncached(a.config.n_layers), uncached(b.config.n_layers)
    layers = [LayerLoss("embedding", None, _distance(states_b, states_a))]
    for i in range(a.config.n_layers):
        block = run_b.block(i)
        alone = [block(x, rotary_b, attends_b[i]) for x in states_a]  # B's layer on what A's layer gets
        states_b = [block(x, rotary_b, attends_b[i]) for x in states_b]
        del block
        block = run_a.block(i)
        states_a = [block(x, rotary_a, attends_a[i]) for x in states_a]
        del block
        layers.append(LayerLoss(f"layers.{i}", _distance(alone, states_a), _distance(states_b, states_a)))
    norm_a, norm_b = run_a.norm(), run_b.norm()
    return layers, [norm_a(x) for x in states_a], [norm_b(x) for x in states_b]


def _distance(xs: Sequence[Tensor], originals: Sequence[Tensor]) -> float:
    """|x - original| / |original| over everything."""
    lost = sum(float((x - y).double().square_().sum()) for x, y in zip(xs, originals, strict=True))
    size = sum(float(y.double().square().sum()) for y in originals)
    return math.sqrt(lost / size) if size else (0.0 if not lost else math.inf)


def _output_rows(a: TensorStore, b: TensorStore, scored: int, tick: Tick) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number of the first row, rows of A's output matrix, the same rows of B's): slices of the vocabulary."""
    own, other = weights_of(a)["output.weight"], weights_of(b)["output.weight"]
    step = max(1, SLICE // max(scored, a.config.dim))
    for (start, left), (_, right) in zip(rows_of(a, own, step), rows_of(b, other, step), strict=True):
        yield start, left, right
    tick(a.info(own).nbytes + b.info(other).nbytes)


class _Scores:
    """Log probabilities and divergences of N positions, gathered over slices of the vocabulary in float64.

    With a, b the logits and m a's running maximum: Z = sum exp(a - m) and T = sum exp(a - m) (a - b) give
    KL = T / Z - ln Z - m + ln Z_b + m_b.
    """

    def __init__(self, count: int) -> None:
        self._a, self._b = _LogSum(count), _LogSum(count)
        self._gap = torch.zeros(count, dtype=torch.float64)
        self._at_a, self._at_b = (torch.full((count,), math.nan, dtype=torch.float64) for _ in range(2))

    def add(self, a: Tensor, b: Tensor, targets: Tensor, start: int) -> None:
        """Logits a, b [N, slice] for the ids from `start` on; `targets` [N] are the ids that came."""
        a, b = a.double(), b.double()
        inside = ((targets >= start) & (targets < start + a.shape[1])).nonzero().flatten()
        ids = targets[inside] - start
        self._at_a[inside], self._at_b[inside] = a[inside, ids], b[inside, ids]
        scale, weights = self._a.add(a, start)
        self._b.add(b, start)
        self._gap.mul_(scale).add_((weights * (a - b)).sum(1))

    def done(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-ln p of the token that came under A and under B, KL divergence, same choice: [N] each."""
        a, b = self._a.value, self._b.value
        kl = self._gap / self._a.total - a + b
        return a - self._at_a, b - self._at_b, kl, self._a.top == self._b.top


class _LogSum:
    """ln of the sum of exponentials and the place of the largest logit, over slices."""

    def __init__(self, count: int) -> None:
        self.most = torch.full((count,), -math.inf, dtype=torch.float64)
        self.total = torch.zeros(count, dtype=torch.float64)
        self.top = torch.zeros(count, dtype=torch.int64)

    def add(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """What older sums were scaled by [N], and exp(logits - most) [N, slice]. Of equal logits the lowest id wins."""
        largest, place = logits.max(1)
        self.top = torch.where(largest > self.most, place + start, self.top)
        most = torch.maximum(self.most, largest)
        scale, weights = torch.exp(self.most - most), torch.exp(logits - most.unsqueeze(1))
        self.total = self.total * scale + weights.sum(1)
        self.most = most
        return scale, weights

    @property
    def value(self) -> Tensor:
        return self.most + self.total.log()


def _perplexity(nll: Tensor) -> Perplexity:
    mean, count = float(nll.mean()), len(nll)
    error = float(nll.var(unbiased=True)) / count if count > 1 else math.nan
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, value * math.sqrt(error) if error >= 0 else math.nan)


def _spread(kl: Tensor) -> Spread:
    ordered = torch.quantile(kl, torch.tensor([0.5, 0.99], dtype=kl.dtype)) if len(kl) < 1 << 24 else _quantiles(kl)
    return Spread(max(float(kl.mean()), 0.0), float(ordered[0]), float(ordered[1]), float(kl.max()))


def _quantiles(kl: Tensor) -> Tensor:
    """torch.quantile refuses large inputs."""
    ordered = kl.sort().values
    return torch.stack([ordered[round(share * (len(kl) - 1))] for share in (0.5, 0.99)])
