"""What a training run is told. One `RunConfig` is one YAML file is one run; `herd.train.overrides` reads and writes it.

The text under a field is its documentation everywhere: `herd recipes cp --all` writes it as the comment of the key, errors show
it, and a test refuses a field without one. This module imports no torch, so a configuration is checked before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from herd.errors import ConfigError

__all__ = [
    "AveragePart", "Budget", "EvaluatePart", "OptimConfig", "SavePart", "ScheduleConfig", "TrainConfig",
]  # fmt: skip

Precision = Literal["float32", "bfloat16", "float8"]
Checkpointing = Literal["none", "full", "attention"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """When the run ends: whichever of these comes first; at least one is given.

    A run limited by steps or tokens is reproducible bit for bit; one limited by minutes ends on time whatever the machine does.
    """

    steps: int | None = None
    """Optimiser steps."""
    minutes: float | None = None
    """Minutes of wall clock, the time of earlier parts of a resumed run included."""
    tokens: int | None = None
    """Tokens read, all ranks together, padding not counted."""

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None and self.tokens is None:
            raise ConfigError(
                "train.budget: give steps, minutes or tokens (of several, the first that is reached ends the run)"
            )
        for name in ("steps", "minutes", "tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"train.budget.{name}: {value} must be positive")

    def progress(self, step: int, seconds: float, tokens: int = 0) -> float:
        """How much of the budget is used, 0 to 1."""
        by_step = 0.0 if self.steps is None else step / self.steps
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        by_token = 0.0 if self.tokens is None else tokens / self.tokens
        return min(1.0, max(by_step, by_time, by_token))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """The learning rate over the budget: warm-up, then the shape that `kind` names."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """wsd: constant, then linear decay over the last `decay_fraction`. cosine, linear: decay from the end of the warm-up on.
    constant: no decay."""
    warmup_steps: int = 100
    """Steps in which the rate climbs linearly from zero."""
    decay_fraction: float = 0.3
    """wsd: the share of the budget that is decay; 1 decays from the start."""
    final: float = 0.0
    """The rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        _one_of(self, "train.schedule", "kind", ("wsd", "cosine", "linear", "constant"))
        _from_to(self, "train.schedule", "decay_fraction", 0, 1)
        _from_to(self, "train.schedule", "final", 0, 1)
        _from_to(self, "train.schedule", "warmup_steps", 0, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimiser and its numbers."""

    kind: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw: fused where the device can. adamw8bit: the same with states of 8 bits. muon: Muon for the matrices inside layers,
    AdamW for embeddings, output and norms."""
    lr: float = 3e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """muon: peak rate of the matrices inside layers."""
    muon_momentum: float = 0.95
    """muon: momentum."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW: how slowly the means of gradients and of their squares move."""
    eps: float = 1e-8
    """AdamW: added to the root in the divisor."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices. Norms are never decayed."""
    decay_embeddings: bool = True
    """Decay the embedding table and the output matrix, too."""
    clip: float | None = 1.0
    """The norm of all gradients together is cut to this; null never cuts (the norm is still told)."""

    def __post_init__(self) -> None:
        _one_of(self, "train.optim", "kind", ("adamw", "adamw8bit", "muon"))
        for name in ("lr", "muon_lr", "weight_decay", "eps"):
            _from_to(self, "train.optim", name, 0, math.inf)
        _from_to(self, "train.optim", "muon_momentum", 0, 1)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.optim.betas: {self.betas}: both must be from 0 to below 1")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"train.optim.clip: {self.clip} must be positive (null for no clipping)")


@dataclass(frozen=True, kw_only=True, slots=True)
class SavePart:
    """When the run saves its state; it always does at the end, and on SIGTERM, SIGINT and SIGUSR1."""

    every_steps: int | None = None
    """Save after so many steps."""
    every_minutes: float | None = 15.0
    """Save after so many minutes."""
    keep: int = 2
    """How many of the newest states stay. The last good one is never removed."""

    def __post_init__(self) -> None:
        _every(self, "train.save")
        _from_to(self, "train.save", "keep", 1, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatePart:
    """When held-out text is measured and samples are written; always at the end."""

    every_steps: int | None = None
    """Evaluate after so many steps."""
    every_minutes: float | None = 10.0
    """Evaluate after so many minutes."""
    prompts: tuple[str, ...] = ()
    """Texts (for a chat model: questions) that are answered at each evaluation, greedily, and written to the log."""
    max_tokens: int = 64
    """Length of these answers, in tokens."""

    def __post_init__(self) -> None:
        _every(self, "train.evaluate")
        _from_to(self, "train.evaluate", "max_tokens", 1, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class AveragePart:
    """An average of the weights along the run, which is exported in place of the last ones."""

    kind: Literal["ema", "tail"] = "ema"
    """ema: exponential moving average. tail: the plain mean of the last part of the run."""
    decay: float = 0.999
    """ema: the share of the old average that stays at each update."""
    start: float = 0.8
    """tail: the share of the budget after which averaging begins."""
    every_steps: int = 1
    """Steps between updates."""

    def __post_init__(self) -> None:
        _one_of(self, "train.average", "kind", ("ema", "tail"))
        if not 0 <= self.decay < 1 or not 0 <= self.start < 1:
            raise ConfigError(f"train.average: decay {self.decay} and start {self.start} must be from 0 to below 1")
        _from_to(self, "train.average", "every_steps", 1, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What `Trainer` takes: everything about the loop, nothing about the model's or the data's origin."""

    budget: Budget
    """When the run ends."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over time."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    accumulate: int = 1
    """Micro-batches of one optimiser step. The loss is the mean over the learned tokens of all of them."""
    precision: Precision = "float32"
    """What matrix products are computed in: float32, bfloat16 (weights stay float32), float8 (needs a GPU that has it)."""
    compile: bool = False
    """torch.compile, block by block."""
    checkpointing: Checkpointing | int = "none"
    """Activations that are made again in the backward pass instead of kept: none, full (of every block), attention, or a
    number n for every n-th block."""
    loss_chunk: int | None = None
    """Logits are made for so many positions at a time; null makes all at once."""
    router_aux: float = 0.0
    """Experts: weight of the load-balancing loss."""
    router_z: float = 0.0
    """Experts: weight of the router's z-loss."""
    seed: int = 0
    """Of dropout and of everything random in the loop. Weights and data have their own."""
    save: SavePart = field(default_factory=SavePart)
    """When the state is saved."""
    evaluate: EvaluatePart = field(default_factory=EvaluatePart)
    """When held-out text is measured."""
    log_every: int = 10
    """Steps between printed lines. The log file has every step."""
    average: AveragePart | None = None
    """An average of the weights along the run; null exports the last weights."""

    def __post_init__(self) -> None:
        for name in ("accumulate", "log_every"):
            _from_to(self, "train", name, 1, math.inf)
        for name in ("router_aux", "router_z"):
            _from_to(self, "train", name, 0, math.inf)
        _one_of(self, "train", "precision", get_args(Precision))
        if isinstance(self.checkpointing, int):
            _from_to(self, "train", "checkpointing", 1, math.inf)
        else:
            _one_of(self, "train", "checkpointing", get_args(Checkpointing))
        if self.loss_chunk is not None:
            _from_to(self, "train", "loss_chunk", 1, math.inf)


def _from_to(part: Any, where: str, name: str, low: float, high: float) -> None:
    value = getattr(part, name)
    if not low <= value <= high:
        wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"{where}.{name}: {value} must be {wanted}")


def _one_of(part: Any, where: str, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(part, name)
    if value not in choices:
        raise ConfigError(f"{where}.{name}: {value!r} is not one of {', '.join(choices)}")


def _every(part: SavePart | EvaluatePart, where: str) -> None:
    for name in ("every_steps", "every_minutes"):
        value = getattr(part, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{where}.{name}: {value} must be positive (null for never)")
