"""Held-out bits per byte: what it is, and that it costs no compiling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.train.measure import bits_per_byte
from tests.build import build

SUM = 1e-5
"""Relative: sums of a few fp32 logarithms, in another order."""
DOCUMENTS = [([5, 6, 7], 10), ([8, 9, 10, 11, 12], 21), ([13], 3)]


def test_it_is_the_mean_surprise_of_a_byte() -> None:
    model = build("llama-3")
    nats = 0.0
    for ids, _ in DOCUMENTS:
        for i, wanted in enumerate(ids):
            nats -= float(torch.log_softmax(model(torch.tensor([[1, *ids[:i]]]))[0, -1], -1)[wanted].detach())
    expected = nats / math.log(2) / sum(size for _, size in DOCUMENTS)
    assert bits_per_byte(model, DOCUMENTS, 1, 16) == pytest.approx(expected, rel=SUM)


def test_nothing_is_compiled_for_it() -> None:
    compiled: list[int] = []

    def count(graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., tuple[Tensor, ...]]:
        compiled.append(1)
        return graph.forward

    model = build("llama-3")
    plain = bits_per_byte(model, DOCUMENTS, 1, 16)
    for block in model.layers:
        block.compile(backend=count)
    assert bits_per_byte(model, DOCUMENTS, 1, 16) == plain
    assert not compiled
