"""Log-probabilities of tokens: of a reply's as they are chosen, and of a given text's.

They are log-softmax of the model's logits, without temperature or filters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from herd.engine.sample import best_of_row

__all__ = ["Scored", "chosen_and_best", "log_total", "score"]

ROWS = 64
"""Positions whose logits exist at once while scoring: 32 MB at a 128k vocabulary."""


def log_total(row: NDArray[np.float32]) -> float:
    """log(sum(exp(row))): a logit less this is a log-probability. row [V]."""
    top = row.max()
    return float(np.log(np.exp(row - top).sum(dtype=np.float64))) + float(top)


def chosen_and_best(row: NDArray[np.float32], token: int, count: int) -> tuple[float, dict[int, float]]:
    """The log-probability of `token` and those of the `count` likeliest ids, best first (ties by id); row [V] of logits."""
    total = log_total(row)
    best = best_of_row(row, count) if count else ()
    return float(row[token]) - total, {int(i): float(row[i]) - total for i in best}


@dataclass(frozen=True, slots=True)
class Scored:
    """The log-probability of one token given those before it, and the likeliest alternatives (best first)."""

    token: int
    logprob: float
    top: dict[int, float]


def score(
    hidden: Tensor, output: Callable[[Tensor], Tensor], tokens: Sequence[int], count: int = 0, *, rows: int = ROWS
) -> list[Scored]:
    """Log-probabilities of `tokens` [S] given hidden states [S, D], `hidden[i]` being that of the position before tokens[i].

    `output` maps [r, D] to logits [r, V]; it is called for `rows` positions at a time, so that [S, V] never exists. The
    numbers do not depend on `rows` as far as `output` does not. Non-finite logits give NaN.
    """
    assert hidden.shape[0] == len(tokens), f"{hidden.shape[0]} positions for {len(tokens)} tokens"
    found: list[Scored] = []
    for start in range(0, len(tokens), rows):
        logits = output(hidden[start : start + rows]).detach().to("cpu", torch.float32).numpy()
        for row, token in zip(logits, tokens[start : start + rows], strict=True):
            found.append(Scored(token, *chosen_and_best(row, token, count)))
    return found
