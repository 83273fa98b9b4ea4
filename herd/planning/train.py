"""herd plan train: which layouts of a run fit on a cluster, how fast each is, how long the whole run takes. Imports no torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from herd.errors import ConfigError
from herd.model.accounting import active_parameters, parameters
from herd.model.config import ModelConfig
from herd.parallel.config import ParallelPart
from herd.planning.devices import Device, device
from herd.planning.train_layout import Checkpointing, Cluster, Estimate, Layout, Precision, Rates, check, estimate

__all__ = ["Budget", "TrainPlan", "cluster_of", "compute_optimal", "enough", "plan_train"]

MOST = 2**17
"""GPUs of the largest cluster that is looked at when fewer are not enough."""
GOODPUT = 0.9
"""Share of the time in which a long run makes progress. Llama 3's 54 days on 16,384 GPUs: over 0.9."""
LAW_A, LAW_ALPHA = 0.29, 0.53
"""Llama 3's law: the best number of tokens for C operations is 0.29 C^0.53 (section 3.2.1 of its paper)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A number of tokens, and what it is beside the compute-optimal one for the same operations (6 N D)."""

    tokens: float
    compute: float
    optimal_tokens: float
    optimal_parameters: float

    @property
    def ratio(self) -> float:
        """Tokens over the compute-optimal number: above 1 the model is over-trained, which serving repays."""
        return self.tokens / self.optimal_tokens


def compute_optimal(compute: float) -> tuple[float, float]:
    """(parameters, tokens) that Llama 3's law gives for `compute` operations."""
    tokens = LAW_A * compute**LAW_ALPHA
    return compute / (6 * tokens), tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan:
    """The layouts that fit, fastest first, and the run's length with the first. `nearest` is the best that does not fit."""

    name: str
    config: ModelConfig
    cluster: Cluster
    gpus: int
    batch: int
    length: int
    fits: tuple[Estimate, ...]
    nearest: Estimate | None
    budget: Budget | None
    assumptions: tuple[str, ...]

    def seconds(self, estimate: Estimate) -> float | None:
        """Of the whole run, with interruptions; None without a budget."""
        if self.budget is None:
            return None
        return self.budget.tokens / (estimate.tokens_per_second * self.gpus) / GOODPUT

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as --json prints it."""
        return {
            "schema": "herd.plan.train/1",
            "model": self.name,
            "parameters": parameters(self.config),
            "active_parameters": active_parameters(self.config),
            "gpu": self.cluster.device.name,
            "gpus": self.gpus,
            "batch_tokens": self.batch,
            "length": self.length,
            "budget": None
            if self.budget is None
            else {
                "tokens": self.budget.tokens,
                "compute": self.budget.compute,
                "optimal_tokens": self.budget.optimal_tokens,
                "optimal_parameters": self.budget.optimal_parameters,
                "ratio": self.budget.ratio,
            },
            "layouts": [self._layout(one) for one in self.fits],
            "nearest": None if self.nearest is None else self._layout(self.nearest),
            "assumptions": list(self.assumptions),
        }

    def _layout(self, one: Estimate) -> dict[str, Any]:
        part, layout = one.layout.part, one.layout
        return {
            **{name: getattr(part, name) for name in ("dp_replicate", "dp_shard", "tp", "cp", "pp", "stages")},
            "rows": layout.rows,
            "accumulate": layout.microbatches,
            "checkpointing": layout.checkpointing,
            "precision": layout.precision,
            "memory_bytes": {
                name: round(getattr(one.memory, name)) for name in (*one.memory.__dataclass_fields__, "total")
            },
            "seconds": {name: getattr(one.time, name) for name in (*one.time.__dataclass_fields__, "total")},
            "tokens_per_second_per_gpu": one.tokens_per_second,
            "mfu_causal": one.mfu,
            "mfu_full": one.mfu_full,
            "run_seconds": self.seconds(one),
        }


def cluster_of(gpu: str | Device, *, compiled: bool = True) -> Cluster:
    """What is known about machines of `gpu`: links and the rates that runs on it reached. Raises ConfigError."""
    own = device(gpu) if isinstance(gpu, str) else gpu
    rates = Rates(traffic=1.0 if compiled else 2.6)
    if own.name.startswith("a100"):
        # Fitted to one published run (Llama 3.2 3B on one A100): its clock does not fall under load as an H100's does.
        return Cluster(device=own, inside=300e9, between=25e9, rates=replace(rates, matrix=0.80, attention=0.42))
    if own.name in ("h100", "h200", "b200"):
        return Cluster(device=own, inside=900e9 if own.name == "b200" else 450e9, rates=rates)
    # Everything else: one device, or several on PCIe.
    return Cluster(device=own, inside=25e9, between=10e9, rates=rates)


def plan_train(
    name: str,
    config: ModelConfig,
    cluster: Cluster,
    gpus: int,
    *,
    length: int = 8192,
    batch: int | None = None,
    tokens: float | None = None,
    precision: Precision = "bfloat16",
    chunked: bool = True,
) -> TrainPlan:
    """Every sensible layout of `gpus`, those that fit fastest first. `batch` tokens a step (default: up to 16M).

    Raises ConfigError when `gpus`, `batch` and `length` cannot be brought together at all.
    """
    if batch is None:
        batch = min(2**24, max(gpus * length, 2**19))
    rows = max(1, batch // length)
    found = [
        estimate(config, layout, cluster)
        for layout in _layouts(config, cluster, gpus, length, rows, precision, chunked)
    ]
    if not found:
        raise ConfigError(
            f"no layout shares {rows} rows of {length} tokens evenly among {gpus} GPUs: choose --batch as a multiple of "
            f"{length} x the data-parallel ranks, or another number of GPUs"
        )
    fits = sorted((one for one in found if one.fits), key=lambda one: -one.tokens_per_second)
    budget = None
    if tokens is not None:
        compute = 6 * active_parameters(config) * tokens
        best, optimal = compute_optimal(compute)
        budget = Budget(tokens=tokens, compute=compute, optimal_tokens=optimal, optimal_parameters=best)
    return TrainPlan(
        name=name,
        config=config,
        cluster=cluster,
        gpus=gpus,
        batch=rows * length,
        length=length,
        fits=tuple(_distinct(fits)),
        nearest=None if fits else min(found, key=lambda one: one.memory.total),
        budget=budget,
        assumptions=_assumptions(cluster, precision, config),
    )


def enough(plan: TrainPlan, batch: int | None, precision: Precision) -> int | None:
    """The first power of two above the GPUs of `plan` on which something fits; None up to MOST. `batch`: as for `plan_train`."""
    gpus = 1 << plan.gpus.bit_length()
    while gpus <= MOST:
        with contextlib.suppress(ConfigError):  # so many cannot share the batch evenly
            more = plan_train(
                plan.name, plan.config, plan.cluster, gpus, length=plan.length, batch=batch, precision=precision
            )
            if more.fits:
                return gpus
        gpus *= 2
    return None


def _layouts(
    config: ModelConfig, cluster: Cluster, gpus: int, length: int, rows: int, precision: Precision, chunked: bool
) -> Iterator[Layout]:
    checkpoints: Sequence[Checkpointing] = ("none", "half", "full")
    tensor = [n for n in (1, 2, 4, 8) if n <= cluster.node]
    context = [n for n in (1, 2, 4, 8, 16, 32) if n == 1 or length // n >= 8192]
    pipes = [
        n for n in range(1, min(config.n_layers, gpus) + 1) if n == 1 or (gpus % n == 0 and n in (2, 4, 8, 16, 32))
    ]
    for tp, cp, pp in product(tensor, context, pipes):
        if gpus % (tp * cp * pp):
            continue
        dp = gpus // (tp * cp * pp)
        if rows % dp:
            continue
        mine = rows // dp
        for micro in (n for n in (1, 2, 4, 8, 16) if mine % n == 0):
            count = mine // micro
            for stages in (1,) if pp == 1 else (1, 2, 4):
                schedule = "interleaved" if stages > 1 else "1f1b"
                if pp > 1 and count < pp:
                    continue
                part = ParallelPart(dp_shard=dp, tp=tp, cp=cp, pp=pp, stages=stages, schedule=schedule)
                for kind in checkpoints:
                    layout = Layout(
                        part=part,
                        length=length,
                        rows=micro,
                        microbatches=count,
                        checkpointing=kind,
                        precision=precision,
                        logits=0.0 if chunked else 14.0,
                    )
                    if _possible(config, layout):
                        yield layout


def _possible(config: ModelConfig, layout: Layout) -> bool:
    try:
        check(config, layout)
    except ConfigError:
        return False
    return True


def _distinct(fits: Sequence[Estimate]) -> Iterator[Estimate]:
    """One of each way to share the ranks: the fastest."""
    seen = set()
    for one in fits:
        part = one.layout.part
        key = (part.tp, part.cp, part.pp)
        if key not in seen:
            seen.add(key)
            yield one


def _assumptions(cluster: Cluster, precision: Precision, config: ModelConfig) -> tuple[str, ...]:
    rates = cluster.rates
    said = [
        f"{rates.matrix:.0%} of the 16-bit peak in matrix products, {rates.attention:.0%} in attention, causal: what published "
        "runs on H100 and H200 reach (docs/train/planning.md)",
        f"links: {cluster.inside / 1e9:.0f} GB/s of a GPU inside a node of {cluster.node}, {cluster.between / 1e9:.0f} between",
        f"{GOODPUT:.0%} of a long run's time makes progress",
        "parameters, gradients and AdamW's two means in fp32 (16 bytes a parameter), blocks compiled",
    ]
    if precision == "float8":
        said.append(f"float8 in the layers at {rates.matrix_fp8:.0%} of its peak; the output stays in 16 bits")
    if config.moe is not None:
        said.append("tokens spread evenly over the experts; all experts are cut by tp or dealt out over it")
    if math.isclose(rates.matrix, Rates().matrix) and cluster.device.name not in ("h100", "h200"):
        said.append(
            f"{cluster.device.name}: the same shares of its peak as an H100; no measurement on it is known to herd"
        )
    return tuple(said)
