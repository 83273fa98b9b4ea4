"""Choosing the next tokens of a batch by operations whose shapes and order never depend on numbers, so that they can be recorded.

The rules are those of `herd.engine.device_sample`, for rows that nothing but temperature, top-k, top-p and min-p shapes. A row's
uniform number comes from the host: it is a hash of seed, reply and position (`herd.engine.sampler.uniform`), all of which are
known before the token is, so the device draws with exactly the numbers that the CPU path draws with.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from herd.engine.device_sample import draw_at, nucleus
from herd.engine.sample import COLDEST, HOTTEST
from herd.engine.sampler import RowState

__all__ = ["Kind", "choose", "kind_of", "kind_of_all"]

Kind = Literal["greedy", "plain", "filtered"]
"""What the rows of a step need: the best token; a draw from all of them; a sorted vocabulary."""


def kind_of(row: RowState) -> Kind | None:
    """What `row` needs at its position and all later ones; None when that cannot be recorded."""
    params = row.params
    if not row.plain or row.wants_logprobs is not None or params.typical_p < 1:
        return None
    if params.temperature == 0:
        return "greedy"
    return "filtered" if params.top_k > 0 or params.top_p < 1 or params.min_p > 0 else "plain"


def kind_of_all(kinds: list[Kind | None]) -> Kind | None:
    """What rows need together; None when one of them cannot be recorded."""
    if None in kinds:
        return None
    return "filtered" if "filtered" in kinds else "plain" if "plain" in kinds else "greedy"


def choose(
    logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, kind: Kind
) -> tuple[Tensor, Tensor]:
    """logits [B, V] float32, the others [B] float64 -> the tokens [B] int64, and whether the logits were finite [B] bool."""
    size = logits.shape[-1]
    best = logits.amax(-1, keepdim=True)
    finite = best[:, 0].isfinite()
    ids = torch.arange(size, device=logits.device)
    greedy = ids.where(logits == best, size).amin(-1).clamp(max=size - 1)  # no logit of a NaN row is its best
    if kind == "greedy":
        return greedy, finite
    heat = temperature.clamp(COLDEST, HOTTEST).float()[:, None]
    weights = ((logits - best) / heat).exp()
    if kind == "filtered":
        weights = _filtered(weights, top_k[:, None], top_p[:, None], min_p[:, None])
    # A row that is not finite is an error whatever is drawn; its search must find numbers all the same.
    drawn = draw_at(weights.nan_to_num(0.0, posinf=0.0), uniform)
    return drawn.where(temperature > 0, greedy), finite


def _filtered(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    size = weights.shape[-1]
    ordered = weights.sort(dim=-1, descending=True).values
    every = (top_k <= 0) | (top_k >= size)
    least = ordered.gather(-1, (top_k.long() - 1).clamp(0, size - 1))
    weights, ordered = (part.where((part >= least) | every, 0) for part in (weights, ordered))
    weights = nucleus(weights, top_p, ordered)
    return weights.where(weights >= min_p.float() * weights.amax(-1, keepdim=True), 0)
