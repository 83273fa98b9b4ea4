"""What the sampler must do, written one token at a time from the definitions, in plain Python. Slow, and obviously right."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from herd.chat.params import SamplingParams

__all__ = ["adjusted", "filtered", "reference_sample"]

NEVER = -math.inf


def adjusted(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    stop_ids: frozenset[int] = frozenset(),
    allowed: frozenset[int] | None = None,
) -> list[float]:
    """Logits after bias, minimum length, mask and penalties, in this order."""
    row = list(logits)
    for i, bias in dict(params.logit_bias).items():
        row[i] += bias
    for i in range(len(row)):
        if i in stop_ids and len(generated) < params.min_tokens:
            row[i] = NEVER
        if allowed is not None and i not in allowed:
            row[i] = NEVER
    for i in {*prompt, *generated}:
        row[i] = row[i] / params.repetition_penalty if row[i] > 0 else row[i] * params.repetition_penalty
    for i, count in Counter(generated).items():
        row[i] -= params.presence_penalty + params.frequency_penalty * count
    return row


def filtered(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Probabilities after temperature, top-k, typical-p, top-p and min-p, each on what the one before left, renormalised."""
    top = max(logits)
    probs = _normal([math.exp((x - top) / params.temperature) for x in logits])
    if params.top_k:
        least = sorted(probs, reverse=True)[min(params.top_k, len(probs)) - 1]
        probs = _normal([p if p >= least else 0.0 for p in probs])
    if params.typical_p < 1:
        probs = _typical(probs, params.typical_p)
    if params.top_p < 1:
        mass, kept = 0.0, [0.0] * len(probs)
        for i in sorted(range(len(probs)), key=lambda i: -probs[i]):  # ties by id: sorted is stable
            if mass > params.top_p:
                break
            kept[i] = probs[i]
            mass += probs[i]
        probs = _normal(kept)
    if params.min_p:
        least = params.min_p * max(probs)
        probs = _normal([p if p >= least else 0.0 for p in probs])
    return probs


def reference_sample(logits: Sequence[float], params: SamplingParams, uniform: float) -> int:
    """The next id for adjusted logits: the best one at temperature 0, otherwise where the cumulative sum passes `uniform`."""
    if params.temperature == 0:
        return max(range(len(logits)), key=lambda i: logits[i])  # the first of equals
    mass = 0.0
    last = 0
    for i, p in enumerate(filtered(logits, params)):
        mass += p
        last = i if p else last
        if mass > uniform:
            return i
    return last


def _typical(probs: list[float], typical_p: float) -> list[float]:
    entropy = -sum(p * math.log(p) for p in probs if p)
    distance = [abs(-math.log(p) - entropy) if p else math.inf for p in probs]
    mass, border = 0.0, 0.0
    for i in sorted(range(len(probs)), key=lambda i: distance[i]):
        border = distance[i]
        mass += probs[i]
        if mass >= typical_p:
            break
    return _normal([p if d <= border else 0.0 for p, d in zip(probs, distance, strict=True)])


def _normal(weights: list[float]) -> list[float]:
    total = sum(weights)
    return [w / total for w in weights]
