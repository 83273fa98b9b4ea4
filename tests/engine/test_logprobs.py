"""Scoring: equal to log-softmax over everything at once, without ever holding it."""

from __future__ import annotations

import pytest
import torch

from herd.engine.logprobs import score


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_scores_are_log_softmax_and_never_hold_all_logits(rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(150, 16, generator=generator), torch.randn(900, 16, generator=generator)
    tokens = torch.randint(900, (150,), generator=generator).tolist()
    held: list[int] = []

    def output(h: torch.Tensor) -> torch.Tensor:
        held.append(len(h))
        return h @ weight.T

    found = score(hidden, output, tokens, 3, rows=rows)
    oracle = (hidden.double() @ weight.double().T).log_softmax(-1)
    best = oracle.topk(3)
    assert max(held) == min(rows, 150)
    assert [s.token for s in found] == tokens
    for i, scored in enumerate(found):
        assert scored.logprob == pytest.approx(float(oracle[i, tokens[i]]), abs=1e-4)
        assert list(scored.top) == best.indices[i].tolist()
        assert list(scored.top.values()) == pytest.approx(best.values[i].tolist(), abs=1e-4)


def test_no_alternatives_unless_asked_for() -> None:
    assert score(torch.ones(2, 4), lambda h: h, [1, 2])[0].top == {}


def test_damaged_logits_give_nan() -> None:
    damaged = torch.tensor([[1.0, float("nan"), 2.0]])
    assert score(damaged, lambda h: h, [0])[0].logprob != score(damaged, lambda h: h, [0])[0].logprob
