"""Adapters over ranks: steps have the losses and gradient norms of one process, whatever is cut and wherever layers are."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from herd.errors import ConfigError
from herd.parallel.config import ParallelPart
from herd.parallel.mesh import Mesh
from herd.parallel.prepare import prepare
from herd.quant.encode import encode
from herd.quant.matrix import Matrix
from herd.quant.nf4 import Nf4Matrix, encode_nf4
from herd.quant.scheme import QuantTensor
from herd.train.config import Budget, TrainConfig
from herd.train.prepare import prepare_model
from tests.parallel import cases
from tests.parallel.crew import Crew

SAME = 1e-5
"""Relative, fp32, as for whole models: sums are taken in another order."""
ROUNDED = 2e-3
"""Of losses of some 5 nats whose products are of 16 bits, and added in another order."""

FAST = [
    ("tied", "lora", {"pp": 2}),
    ("wide", "qdora", {"tp": 2}),
    ("llama4", "experts", {"dp_shard": 2}),
    ("llama4", "experts", {"tp": 2}),
    ("llama3", "prefix", {"pp": 2}),
    ("llama3", "prompt", {"pp": 2}),
]
SLOW = [
    ("llama3", "dora", {"tp": 2}),
    ("llama3", "lora", {"tp": 2}),
    ("llama3", "dora", {"pp": 2}),
    ("llama3", "inner", {"dp_shard": 2}),
    ("llama3", "dora", {"cp": 2}),
    ("llama3", "sparse", {"pp": 2}),
    ("few", "dora", {"tp": 2}),
    ("few", "dora", {"tp": 4}),
    ("few", "prefix", {"tp": 2}),
    ("llama4", "inner", {"tp": 2}),
    ("llama4", "inner", {"pp": 2}),
    ("llama4", "experts", {"pp": 2}),
    ("llama4", "experts", {"cp": 2}),
    ("llama4", "experts", {"dp_replicate": 2}),
    ("llama4", "qexperts", {"dp_shard": 2}),
    ("wide4", "qexperts", {"tp": 2}),
    ("wide4", "qexperts", {"tp": 2, "experts": "number"}),
    ("wide4", "qexperts", {"dp_shard": 2, "tp": 2}),
    ("wide4", "qexperts", {"pp": 2, "tp": 2, "experts": "number"}),
    ("wide", "qlora", {"pp": 2}),
    ("wide", "qlora", {"tp": 2}),
    ("wide", "qlora", {"dp_shard": 2, "tp": 2}),
    ("llama3", "dora", {"dp_shard": 2, "tp": 2}),
    ("tied", "dora", {"pp": 2, "tp": 2}),
    ("tied", "lora", {"pp": 2, "dp_shard": 2}),
    ("llama3", "dora", {"pp": 2, "dp_shard": 2, "tp": 2}),
    ("llama3", "prefix", {"dp_shard": 2}),
    ("llama3", "prefix", {"tp": 2}),
    ("llama3", "prefix", {"cp": 2, "tp": 2}),
    ("llama3", "prefix", {"dp_shard": 2, "tp": 2}),
    ("llama3", "prompt", {"dp_shard": 2}),
    ("llama3", "prompt", {"cp": 2}),
    ("few", "prompt", {"tp": 4}),
    ("llama3", "prompt", {"tp": 2}),
    ("llama3", "prompt", {"dp_shard": 2, "tp": 2}),
    ("llama4", "experts", {"tp": 2, "experts": "number"}),
    ("llama4", "down", {"tp": 2}),
    ("llama4", "experts", {"tp": 4}),
    ("llama4", "experts", {"tp": 4, "experts": "number"}),
    ("llama4", "experts", {"dp_shard": 2, "tp": 2}),
    ("llama4", "experts", {"dp_shard": 2, "tp": 2, "experts": "number"}),
    ("llama4", "experts", {"dp_replicate": 2, "tp": 2}),
    ("llama4", "experts", {"cp": 2, "tp": 2}),
    ("llama4", "experts", {"pp": 2, "tp": 2}),
    ("llama4", "experts", {"pp": 2, "tp": 2, "experts": "number"}),
    ("llama4", "experts", {"pp": 2, "dp_shard": 2, "tp": 2}),
    ("llama3", "early", {"pp": 2}),
    ("llama3", "early", {"pp": 2, "dp_shard": 2}),
    *(
        (model, method, {"pp": 2, **more})
        for method in ("prefix", "prompt")
        for model, more in (
            ("llama3", {"schedule": "gpipe"}),
            ("few", {"tp": 2}),
            ("llama3", {"tp": 2}),
            ("llama3", {"dp_shard": 2}),
            ("llama3", {"dp_replicate": 2}),
            ("llama3", {"cp": 2}),
            ("llama3", {"schedule": "interleaved", "stages": 2}),
            ("llama3", {"dp_shard": 2, "schedule": "interleaved", "stages": 2}),
            ("llama3", {"dp_shard": 2, "tp": 2}),
            ("llama3", {"cp": 2, "tp": 2}),
        )
    ),
    ("tied", "prompt", {"pp": 2}),
    ("llama3", "prefix", {"pp": 4, "schedule": "gpipe"}),
    ("llama3", "prompt", {"pp": 4, "schedule": "gpipe"}),
]


def _name(value: Any) -> str | None:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


@cache
def _alone(model: str, method: str, steps: int) -> list[tuple[float, float]]:
    return cases.reference(model, method, steps)


@pytest.mark.parametrize(
    ("model", "method", "spread", "steps"),
    [
        *((*case, cases.FEW) for case in FAST),
        *(pytest.param(*case, cases.STEPS, marks=pytest.mark.slow) for case in (*FAST, *SLOW)),
    ],
    ids=_name,
)
def test_adapters_have_the_losses_of_one_process(
    ranks: Crew, model: str, method: str, spread: dict[str, Any], steps: int
) -> None:
    part = ParallelPart(**spread)
    expected = _alone(model, method, steps)
    for found in ranks.run("tests.parallel.cases:losses", part.world, model, part, method, steps):
        for step, (got, wanted) in enumerate(zip(found, expected, strict=True)):
            assert got == pytest.approx(wanted, rel=SAME), f"step {step}: loss and gradient norm"
    assert abs(expected[-1][0] - expected[0][0]) > 100 * SAME


@pytest.mark.slow
def test_dropout_leaves_what_one_process_leaves(ranks: Crew) -> None:
    """Ranks that share rows draw the same numbers, and take their columns of them: not one dropped number is another."""
    expected = cases.losses("llama3", ParallelPart(), "dropout")
    assert expected[0][1] != pytest.approx(cases.losses("llama3", ParallelPart(), "inner")[0][1], rel=100 * SAME)
    for found in ranks.run("tests.parallel.cases:losses", 2, "llama3", ParallelPart(tp=2), "dropout"):
        for got, wanted in zip(found, expected, strict=True):
            assert got == pytest.approx(wanted, rel=SAME)


@pytest.mark.parametrize(("dim", "start", "count"), [(0, 3, 5), (1, 64, 128)])
def test_parts_of_quantized_matrices_have_their_numbers(dim: int, start: int, count: int) -> None:
    values = torch.randn(70, 320, generator=torch.Generator().manual_seed(0))  # 350 blocks: two groups of magnitudes
    q8 = encode(values, "Q8_0")
    assert isinstance(q8, QuantTensor)
    for matrix in (Nf4Matrix(encode_nf4(values)), Matrix(q8)):
        part = matrix.part(dim, start, count)
        assert torch.equal(part.dequantize(), matrix.dequantize().narrow(dim, start, count))
    with pytest.raises(ConfigError, match="no whole number of NF4's blocks of 64"):
        Nf4Matrix(encode_nf4(values)).part(1, 32, 64)
    with pytest.raises(ConfigError, match="no whole number of Q8_0's blocks of 32"):
        Matrix(q8).part(1, 0, 48)


def refused(name: str, method: str, part: ParallelPart) -> str:
    try:
        prepare(cases.fresh(name, method), Mesh.of(part))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "method", "part", "why"),
    [
        ("llama3", "late", {"pp": 2}, "in layers 0 to 1, the first stage, nothing trains"),
        ("llama4", "qexperts", {"tp": 2}, "no whole number of NF4's blocks of 64"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_the_first_step(
    ranks: Crew, name: str, method: str, part: dict[str, int], why: str
) -> None:
    for said in ranks.run("tests.parallel.test_adapters:refused", 2, name, method, ParallelPart(**part)):
        assert why in said


def prepared(name: str, method: str, part: ParallelPart, policy: str) -> tuple[str, list[float]]:
    """What hidden states are held in, and losses of three steps, in bfloat16 with blocks that are made again."""
    config = TrainConfig(budget=Budget(steps=1), precision="bfloat16", checkpointing=policy)
    spread = prepare(cases.fresh(name, method), Mesh.of(part), middle=lambda model: prepare_model(model, config))
    tokens, _, positions = cases.rows(0, spread.model.config)
    model, optimiser = spread.model, cases.moved(spread)
    see = spread.mesh.packed(model.config, positions)
    if spread.pipeline is None:
        dtype = str(model.hidden(model.embed(tokens), positions, see).dtype)
    else:
        end = spread.pipeline.forward(tokens, positions)
        dtype = "elsewhere" if end is None else str(end.embed(tokens).dtype)
    return dtype, [cases._step(spread, optimiser, *cases.rows(step, model.config))[0] for step in range(3)]


@pytest.mark.parametrize(
    ("name", "method", "policy", "spread"),
    [
        ("llama3", "full", "attention", {"tp": 2}),
        pytest.param("llama3", "full", "full", {"tp": 2}, marks=pytest.mark.slow),
        pytest.param("llama4", "full", "none", {"tp": 2, "experts": "number"}, marks=pytest.mark.slow),
        pytest.param("llama4", "experts", "full", {"tp": 2, "experts": "number"}, marks=pytest.mark.slow),
        pytest.param("llama4", "experts", "attention", {"tp": 2}, marks=pytest.mark.slow),
        pytest.param("llama3", "prompt", "full", {"pp": 2}, marks=pytest.mark.slow),
        pytest.param("llama3", "prompt", "attention", {"pp": 2, "tp": 2}, marks=pytest.mark.slow),
        pytest.param("llama3", "prefix", "attention", {"pp": 2}, marks=pytest.mark.slow),
    ],
    ids=_name,
)
def test_bfloat16_and_checkpointing(ranks: Crew, name: str, method: str, policy: str, spread: dict[str, Any]) -> None:
    part = ParallelPart(**spread)
    dtype, expected = prepared(name, method, ParallelPart(), policy)
    assert dtype == "torch.bfloat16"
    for found, losses in ranks.run("tests.parallel.test_adapters:prepared", part.world, name, method, part, policy):
        assert found in (dtype, "elsewhere")
        assert losses == pytest.approx(expected, rel=ROUNDED)
