"""What a training run is told: budget, rates, batch, and when to log, evaluate and save."""

from __future__ import annotations

from dataclasses import dataclass, field

from herd.errors import ConfigError

__all__ = ["Budget", "OptimConfig", "ScheduleConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """When the run ends: after `steps` optimiser steps or `minutes` of wall clock, whichever comes first.

    A run limited by steps is reproducible bit for bit; one limited by minutes ends on time whatever the machine does.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ConfigError("budget: give steps, minutes, or both")
        if (self.steps is not None and self.steps < 1) or (self.minutes is not None and self.minutes <= 0):
            raise ConfigError(f"budget: {self.steps} steps and {self.minutes} minutes: both must be positive")

    def progress(self, step: int, seconds: float) -> float:
        """How much of the budget is used, 0 to 1."""
        by_step = 0.0 if self.steps is None else step / self.steps
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(1.0, max(by_step, by_time))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Warm-up, stable, decay (WSD): linear up over `warmup_steps`, 1, then linear to `final` over the last part.

    `decay_fraction` of the budget is decay: 0 keeps the rate constant, 1 decays from the start.
    """

    warmup_steps: int = 100
    decay_fraction: float = 0.3
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay_fraction <= 1 or self.warmup_steps < 0 or not 0 <= self.final <= 1:
            raise ConfigError(f"schedule out of range: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW for embeddings and norms; Muon for the other matrices unless `muon` is off (then AdamW for all)."""

    muon: bool = True
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    adam_lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One run. A step sees `accumulate` batches of the loader. `compile` turns on torch.compile for the loss."""

    budget: Budget
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    accumulate: int = 1
    loss_chunk: int | None = None
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    eval_minutes: float = 10.0
    save_minutes: float = 4.0

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.log_every < 1:
            raise ConfigError("accumulate and log_every must be at least 1")
