"""From logits to the next id. Rows are independent; every filter works on [R, V] at once.

Order of filters: repetition penalty, temperature, top-k, top-p (Meta's rule), min-p.
Logits that hold a NaN, or nothing that can be chosen, raise HerdError: a token made from them would look like an answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from herd.chat.params import SamplingParams
from herd.errors import HerdError

__all__ = ["penalize", "probabilities", "sample"]

HEAD = 1024
"""Tokens that top-p looks at first; the rest of the vocabulary is sorted only when they do not make up p."""
COLDEST = 1e-30
"""Lower temperatures are taken as this one: dividing by a number that underflows would turn the best token into a NaN."""


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of the ids marked in `seen` [V] bool (arXiv 1909.05858). logits [R, V]."""
    return logits.where(~seen, torch.where(logits > 0, logits / penalty, logits * penalty))


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """logits [R, V] -> filtered, renormalised probabilities [R, V] in fp32. Needs temperature > 0.

    top_p keeps tokens until the mass before them exceeds p (llama-models models/llama3/generation.py), so at least one stays.
    """
    logits = logits.float()
    # The best token is moved to 0 first, so that a very low temperature cannot overflow it.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(params.temperature, COLDEST)
    probs = torch.softmax(logits, dim=-1)
    if params.top_k:
        kept = probs.topk(min(params.top_k, probs.shape[-1]), dim=-1).values[..., -1:]
        probs = probs.where(probs >= kept, 0)
    if params.top_p < 1:
        probs = _nucleus(probs, params.top_p)
    if params.min_p:
        probs = probs.where(probs >= params.min_p * probs.amax(-1, keepdim=True), 0)
    return probs / probs.sum(-1, keepdim=True)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """probs [R, V] with 0 behind the first tokens, in falling order and ties by id, whose mass exceeds `top_p` of all."""
    limit = top_p * probs.sum(-1, keepdim=True)
    ordered = probs.topk(min(HEAD, probs.shape[-1]), dim=-1).values
    mass = ordered.cumsum(-1)
    if ordered.shape[-1] < probs.shape[-1] and (mass[..., -1:] <= limit).any():
        ordered = probs.sort(dim=-1, descending=True).values
        mass = ordered.cumsum(-1)
    # The mass before a token is that up to the one in front of it; 0 for the best one, which therefore always stays.
    kept = 1 + (mass[..., :-1] <= limit).sum(-1, keepdim=True)
    least = ordered.gather(-1, kept - 1)
    above, tied = probs > least, probs == least
    room = kept - above.sum(-1, keepdim=True)  # how many of the tied ones stay: the first ones
    return probs.where(above | (tied & (tied.cumsum(-1) <= room)), 0)


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator, seen: Tensor | None = None) -> Tensor:
    """Next ids [R] for logits [R, V]. Greedy at temperature 0. `seen` [V] bool marks the ids the repetition penalty is for.

    Raises HerdError when a row has a NaN, a positive infinity or no finite value at all.
    """
    if not logits.amax(-1).isfinite().all():
        raise HerdError(
            "the model gave numbers that are not finite, so no next token can be chosen: its weights are damaged, or they "
            "overflow in this dtype (try bfloat16 or float32)"
        )
    if params.repetition_penalty != 1 and seen is not None:
        logits = penalize(logits, seen, params.repetition_penalty)
    if params.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, params), 1, generator=generator).squeeze(-1)
