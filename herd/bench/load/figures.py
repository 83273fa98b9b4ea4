"""Outcomes as figures: percentiles, throughput, fairness."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from herd.bench.load.client import Outcome

__all__ = ["PERCENTILES", "figures", "jain", "percentile"]

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Between the two nearest ranks by a straight line, as numpy's default; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def jain(shares: Sequence[float]) -> float | None:
    """Jain's index of fairness: 1 when all have the same, 1/n when one has everything. None of nothing or of zeros."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None


def figures(outcomes: Sequence[Outcome], *, clients: int, began: float) -> dict[str, Any]:
    """Everything about one level of load as plain data; times in seconds.

    Time to first token counts from when a request was due, so that a server that is behind cannot hide it. Time between tokens
    is that between the pieces of a stream (`gaps`, where several tokens in one piece are one gap), and per reply the time from
    its first to its last piece by the tokens after the first (`per_token`). Fairness is Jain's index of the tokens that each
    client got per second of its own time.
    """
    good = [one for one in outcomes if one.error is None]
    seconds = max((one.ended for one in outcomes), default=began) - began
    tokens = sum(one.tokens for one in good)
    per_token = [(one.stamps[-1] - one.stamps[0]) / (one.tokens - 1) for one in good if one.tokens > 1]
    gaps = [after - before for one in good for before, after in zip(one.stamps, one.stamps[1:], strict=False)]
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "errors": dict(Counter(one.error for one in outcomes if one.error is not None).most_common(5)),
        "seconds": round(seconds, 3),
        "output_tokens": tokens,
        "prompt_tokens": sum(one.prompt_tokens for one in good),
        "counted_by_server": all(one.counted for one in good),
        "requests_per_s": _rate(len(good), seconds),
        "output_tokens_per_s": _rate(tokens, seconds),
        "total_tokens_per_s": _rate(tokens + sum(one.prompt_tokens for one in good), seconds),
        "ttft": _spread([one.stamps[0] - one.due for one in good]),
        "per_token": _spread(per_token),
        "gaps": _spread(gaps),
        "end_to_end": _spread([one.ended - one.due for one in good]),
        "late": _spread([one.sent - one.due for one in outcomes]),
        "fairness": _rounded(jain(_shares(outcomes, clients))),
    }


def _shares(outcomes: Sequence[Outcome], clients: int) -> list[float]:
    """Tokens per second of each client, from its first request to the end of its last; one that got nothing has 0."""
    tokens, first, last = [0] * clients, [math.inf] * clients, [0.0] * clients
    for one in outcomes:
        tokens[one.client] += one.tokens if one.error is None else 0
        first[one.client] = min(first[one.client], one.due)
        last[one.client] = max(last[one.client], one.ended)
    return [
        count / (end - start) if end > start else 0.0 for count, start, end in zip(tokens, first, last, strict=True)
    ]


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    found |= {"mean": sum(values) / len(values), "max": max(values)}
    return {name: round(value or 0.0, 6) for name, value in found.items()}


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 3) if seconds > 0 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
