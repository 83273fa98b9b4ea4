"""Fifty steps of the loop and fifty of a plain transformers loop: the same losses and norms, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from herd.data.batch import TokenBatch
from herd.data.encode import IGNORE
from herd.train.config import Budget, EvaluatePart, OptimConfig, ScheduleConfig, TrainConfig
from herd.train.objective import NextToken
from herd.train.trainer import Trainer
from herd.train.watch import Recorder
from tests.build import build, tokens
from tests.parity.oracles import hf_dense
from tests.train.test_trainer import Fixed

LOSSES = 1e-4
"""Of losses of about 5 nats over 50 steps in float32: rounding grows, for AdamW makes signs of what is nearly zero."""
NORMS = 1e-3
"""Relative, of gradient norms, which feel differences of weights more than losses do."""
RATE, DECAY, CLIP = 3e-3, 0.1, 1.0


def batches(vocab_size: int) -> list[TokenBatch]:
    """Two micro-batches for each of 50 steps, with unequal numbers of supervised tokens."""
    made = []
    for seed in range(100):
        ids = torch.randint(3, vocab_size, (2, 24), generator=torch.Generator().manual_seed(seed % 20))
        labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORE)], 1)
        labels[0, : (seed * 5) % 17] = IGNORE
        made.append(TokenBatch(ids, labels, torch.arange(24).expand(2, 24)))
    return made


@pytest.mark.parametrize("kind", ["llama-3", "llama-3.2"])
def test_fifty_steps_of_a_plain_transformers_loop(kind: str, measured: Any) -> None:
    model = build(kind)
    assert tokens(model.config, 4).shape == (1, 4)
    theirs = hf_dense(model).train()
    given = batches(model.config.vocab_size)
    norms = {id(p) for name, p in theirs.named_parameters() if "norm" in name}
    groups = [
        {"params": [p for p in theirs.parameters() if id(p) not in norms], "weight_decay": DECAY},
        {"params": [p for p in theirs.parameters() if id(p) in norms], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8)
    expected = []
    for step in range(50):
        pair = given[2 * step : 2 * step + 2]
        learned = sum(int((batch.labels != IGNORE).sum()) for batch in pair)
        optimiser.param_groups[0]["lr"] = optimiser.param_groups[1]["lr"] = RATE * (1 - step / 50)
        total = 0.0
        for batch in pair:
            masked = torch.cat([torch.full((2, 1), IGNORE), batch.labels[:, :-1]], 1)  # transformers shifts by itself
            loss = theirs(input_ids=batch.tokens, labels=masked, num_items_in_batch=torch.tensor(learned)).loss
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        expected.append((total, float(norm)))
    seen = Recorder()
    config = TrainConfig(
        budget=Budget(steps=50),
        optim=OptimConfig(kind="adamw", lr=RATE, weight_decay=DECAY, clip=CLIP),
        schedule=ScheduleConfig(kind="linear", warmup_steps=0),
        accumulate=2,
        evaluate=EvaluatePart(every_minutes=None),
    )
    Trainer(model, NextToken(), Fixed(given), config, watchers=[seen]).fit()
    furthest = max(abs(r.loss - loss) for r, (loss, _) in zip(seen.steps, expected, strict=True))
    measured("losses of 50 steps against transformers", kind, furthest)
    assert furthest <= LOSSES
    assert max(abs(r.norm / norm - 1) for r, (_, norm) in zip(seen.steps, expected, strict=True)) <= NORMS
    assert expected[-1][0] < expected[0][0] - 0.5, "something was learned"
