"""However a run is spread over ranks, its steps have the losses and gradient norms of one process that knows nothing of ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from herd.parallel.config import ParallelPart
from tests.parallel import cases
from tests.parallel.crew import Crew

SAME = 1e-5
"""Relative, fp32: sums are taken in another order, and ten steps of AdamW carry the difference on (measured: below 5e-7)."""

FAST = [
    ("tied", {"dp_shard": 2}),
    ("few", {"tp": 2}),
    ("llama4", {"tp": 2, "experts": "number"}),
    ("llama3", {"cp": 2}),
    ("tied", {"pp": 2}),
    ("llama3", {"dp_shard": 2, "tp": 2}),
]
SLOW = [
    ("llama3", {"dp_shard": 2}),
    ("llama3", {"tp": 2}),
    ("llama3", {"pp": 2}),
    ("tied", {"tp": 2}),
    ("tied", {"cp": 2}),
    ("few", {"dp_shard": 2}),
    ("few", {"tp": 4}),
    ("few", {"cp": 2, "tp": 2}),
    ("llama4", {"dp_shard": 2}),
    ("llama4", {"tp": 2}),
    ("llama4", {"tp": 4, "experts": "number"}),
    ("llama4", {"cp": 2}),
    ("llama4", {"pp": 2}),
    ("llama4", {"dp_shard": 2, "tp": 2}),
    ("llama4", {"cp": 2, "tp": 2}),
    ("llama4", {"pp": 2, "dp_shard": 2}),
    ("llama3", {"dp_shard": 4}),
    ("llama3", {"dp_replicate": 2}),
    ("llama3", {"dp_replicate": 2, "dp_shard": 2}),
    ("llama3", {"dp_replicate": 2, "cp": 2}),
    ("llama3", {"cp": 4}),
    ("llama3", {"cp": 2, "dp_shard": 2}),
    ("llama3", {"cp": 2, "tp": 2}),
    ("llama3", {"pp": 2, "dp_shard": 2}),
    ("llama3", {"pp": 2, "tp": 2}),
    ("llama3", {"pp": 2, "cp": 2}),
    ("llama3", {"pp": 2, "schedule": "gpipe"}),
    ("llama3", {"pp": 2, "stages": 2, "schedule": "interleaved"}),
    ("llama3", {"pp": 2, "dp_shard": 2, "stages": 2, "schedule": "interleaved"}),
    ("llama3", {"dp_shard": 2, "reshard": False}),
    ("tied", {"dp_shard": 2, "tp": 2}),
    ("tied", {"pp": 2, "dp_shard": 2}),
    ("tied", {"pp": 2, "tp": 2}),
]
THREE = [  # kinds at once, 8 ranks
    ("tied", {"pp": 2, "dp_shard": 2, "tp": 2}),
    ("llama4", {"dp_shard": 2, "cp": 2, "tp": 2, "experts": "number"}),
    ("llama3", {"pp": 2, "cp": 2, "tp": 2}),
    ("llama4", {"pp": 2, "dp_shard": 2, "tp": 2}),
    ("llama3", {"pp": 2, "dp_shard": 2, "cp": 2}),
    ("few", {"dp_replicate": 2, "dp_shard": 2, "tp": 2}),
    ("tied", {"dp_replicate": 2, "pp": 2, "tp": 2}),
    ("llama3", {"dp_shard": 2, "pp": 2, "tp": 2, "stages": 2, "schedule": "interleaved"}),
]


def _name(value: Any) -> str | None:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


@cache
def _alone(model: str, steps: int) -> list[tuple[float, float]]:
    return cases.reference(model, steps=steps)


@pytest.mark.parametrize(
    ("model", "spread", "steps"),
    [
        *((*case, cases.FEW) for case in FAST),
        *(pytest.param(*case, cases.STEPS, marks=pytest.mark.slow) for case in (*FAST, *SLOW, *THREE)),
    ],
    ids=_name,
)
def test_spread_runs_have_the_losses_of_one_process(
    ranks: Crew, model: str, spread: dict[str, Any], steps: int
) -> None:
    part = ParallelPart(**spread)
    expected = _alone(model, steps)
    for found in ranks.run("tests.parallel.cases:losses", part.world, model, part, "full", steps):
        for step, (got, wanted) in enumerate(zip(found, expected, strict=True)):
            assert got == pytest.approx(wanted, rel=SAME), f"step {step}: loss and gradient norm"
    assert expected[-1][1] != expected[0][1]
    assert any(norm > cases.CLIP for _, norm in expected), "no step was clipped: the test would not see a wrong norm"
