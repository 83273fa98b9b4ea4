"""The sampler over a whole batch of logits where they lie: what `logits` and `sample` do to one row, as tensor operations.

For GPUs, where a row in main memory would cost a transfer of the vocabulary and a batch of rows a loop. Rows do not touch each
other, but here the order of a sum is the device's: a draw that falls on a border within rounding may differ from the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from herd.chat.params import SamplingParams
from herd.engine.sample import COLDEST, HOTTEST

if TYPE_CHECKING:
    from herd.engine.sampler import RowState

__all__ = ["adjust", "choose", "draw_at", "logprobs", "nucleus", "weigh"]


def choose(
    logits: Tensor, rows: Sequence[RowState], masks: Sequence[NDArray[np.int32] | None]
) -> list[tuple[int, bool, bool]]:
    """For every row of `logits` [R, V]: the token, whether the logits were finite, and whether anything was left to choose.

    `masks` are the allowed bits of the rows that have a constraint. One transfer back to main memory in all.
    """
    adjusted = adjust(logits, rows, masks)
    best = adjusted.amax(-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    tokens = ids.where(adjusted == best, logits.shape[-1]).amin(-1)  # argmax does not promise the first of equals here
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        where = torch.tensor(drawn, device=logits.device)
        weights = weigh(adjusted[where], [rows[i].params for i in drawn])
        uniforms = torch.tensor([rows[i].uniform() for i in drawn], dtype=torch.float64, device=logits.device)
        tokens[where] = draw_at(weights, uniforms)
    outcome = torch.stack([tokens, logits.amax(-1).isfinite().long(), best[:, 0].isfinite().long()], dim=-1)
    return [(token, bool(finite), bool(left)) for token, finite, left in outcome.tolist()]


def adjust(logits: Tensor, rows: Sequence[RowState], masks: Sequence[NDArray[np.int32] | None]) -> Tensor:
    """`logits` [R, V] in float32 with biases, bans, masks and penalties; the same tensor when no row has any."""
    if all(row.plain for row in rows):
        return logits.float()
    logits = logits.float().clone()
    device, size = logits.device, logits.shape[-1]

    def pairs(ids_of: Callable[[RowState], NDArray[np.int64] | None]) -> tuple[tuple[Tensor, Tensor], list[int]]:
        """Indices (row, id) of all that `ids_of` gives, and how many each row has."""
        found = [ids if (ids := ids_of(row)) is not None else np.empty(0, dtype=np.int64) for row in rows]
        counts = [len(ids) for ids in found]
        at = np.repeat(np.arange(len(rows)), counts)
        return (torch.from_numpy(at).to(device), torch.from_numpy(np.concatenate(found)).to(device)), counts

    def spread(counts: list[int], value_of: Callable[[SamplingParams], float]) -> Tensor:
        """One float32 per pair: its row's own."""
        values = np.array([value_of(row.params) for row in rows], dtype=np.float32)
        return torch.from_numpy(np.repeat(values, counts)).to(device)

    at, counts = pairs(lambda row: row.bias[0])
    if sum(counts):
        logits[at] += torch.from_numpy(np.concatenate([row.bias[1] for row in rows])).to(device)
    at, counts = pairs(lambda row: row.banned[row.banned < size])
    if sum(counts):
        logits[at] = -torch.inf
    held = [i for i, bits in enumerate(masks) if bits is not None]
    if held:
        logits[torch.tensor(held, device=device)] += _masked([masks[i] for i in held], size, device)
    at, counts = pairs(lambda row: None if row.seen is None else row.seen.ids)
    if sum(counts):
        values, penalty = logits[at], spread(counts, lambda p: p.repetition_penalty)
        logits[at] = torch.where(values > 0, values / penalty, values * penalty)
    at, counts = pairs(lambda row: None if row.counted is None else row.counted.ids)
    if sum(counts):
        uses = np.concatenate([row.counted.counts for row in rows if row.counted is not None])
        frequency = spread(counts, lambda p: p.frequency_penalty) * torch.from_numpy(uses).to(device)
        logits[at] -= spread(counts, lambda p: p.presence_penalty) + frequency
    return logits


def weigh(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits [R, V], all temperatures above 0, to weights [R, V] float32 (0: ruled out), the best token's at most 1."""
    size = logits.shape[-1]

    def column(value_of: Callable[[SamplingParams], Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor([[value_of(p)] for p in params], dtype=dtype, device=logits.device)

    heat = column(lambda p: min(max(p.temperature, COLDEST), HOTTEST), torch.float32)
    weights = ((logits - logits.amax(-1, keepdim=True)) / heat).exp()
    if any(0 < p.top_k < size for p in params):
        k = column(lambda p: min(p.top_k or size, size), torch.int64)
        most = max(p.top_k for p in params if 0 < p.top_k < size)
        least = weights.topk(most, dim=-1).values.gather(-1, (k - 1).clamp(max=most - 1))
        weights = weights.where((weights >= least) | (k >= size), 0)
    if any(p.typical_p < 1 for p in params):
        weights = _typical(weights, column(lambda p: p.typical_p, torch.float64))
    if any(p.top_p < 1 for p in params):
        weights = nucleus(weights, column(lambda p: p.top_p, torch.float64))
    if any(p.min_p for p in params):
        least = column(lambda p: p.min_p, torch.float32) * weights.amax(-1, keepdim=True)
        weights = weights.where(weights >= least, 0)
    return weights


def draw_at(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The ids [R] at `uniforms` [R] float64 of the cumulative distributions `weights` [R, V], in the order of the ids."""
    mass = weights.double().cumsum(-1)
    total = mass[:, -1:]
    at = (uniforms[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(mass, at, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)


def logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[tuple[float, dict[int, float]]]:
    """Log-probabilities of `tokens` and of the likeliest `counts` ids of each row of `logits` [R, V], best first."""
    logits = logits.float()
    total = logits.double().logsumexp(-1, keepdim=True)
    chosen = (logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None]) - total)[:, 0].tolist()
    best = logits.topk(min(max(counts), logits.shape[-1]), dim=-1)
    values, ids = (best.values - total).tolist(), best.indices.tolist()
    return [(chosen[i], dict(zip(ids[i][:count], values[i][:count], strict=True))) for i, count in enumerate(counts)]


def _masked(masks: Sequence[NDArray[np.int32] | None], size: int, device: torch.device) -> Tensor:
    """Allowed bits as what to add to logits, [R, size]: 0 or -inf."""
    words = max(len(bits) for bits in masks if bits is not None)
    table = np.zeros((len(masks), words), dtype=np.int32)
    for row, bits in zip(table, masks, strict=True):
        assert bits is not None
        row[: len(bits)] = bits
    shifts = torch.arange(32, dtype=torch.int32, device=device)
    allowed = (torch.from_numpy(table).to(device)[..., None] >> shifts & 1).flatten(1).bool()[:, :size]
    allowed = torch.nn.functional.pad(allowed, (0, size - allowed.shape[-1]))
    return torch.zeros(allowed.shape, device=device).masked_fill_(~allowed, -torch.inf)


def _typical(weights: Tensor, typical_p: Tensor) -> Tensor:
    chances = weights / weights.sum(-1, keepdim=True, dtype=torch.float64)
    surprise = -chances.log()
    entropy = (chances * surprise).nansum(-1, keepdim=True)  # 0 times infinity
    distance = (surprise - entropy).abs().float()
    ordered, order = distance.sort(dim=-1, stable=True)
    last = (chances.gather(-1, order).cumsum(-1) < typical_p).sum(-1, keepdim=True).clamp(max=weights.shape[-1] - 1)
    return weights.where((distance <= ordered.gather(-1, last)) | (typical_p >= 1), 0)


def nucleus(weights: Tensor, top_p: Tensor, ordered: Tensor | None = None) -> Tensor:
    """Meta's top-p over `weights` [R, V], top_p [R, 1] float64; `ordered` are the same weights, falling, where they are known."""
    ordered = weights.sort(dim=-1, descending=True).values if ordered is None else ordered
    mass = ordered.cumsum(-1, dtype=torch.float64)
    kept = 1 + (mass[:, :-1] <= top_p * mass[:, -1:]).sum(-1, keepdim=True)
    least = ordered.gather(-1, kept - 1)
    above, tied = weights > least, weights == least
    room = kept - above.sum(-1, keepdim=True)  # how many of the tied ones stay: the first ones
    return weights.where(above | (tied & (tied.cumsum(-1) <= room)) | (top_p >= 1), 0)
