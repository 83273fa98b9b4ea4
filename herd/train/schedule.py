"""The learning rate over a run, as a multiplier of every peak.

All shapes are functions of (step, progress), so a resumed run needs no state, and a budget of minutes works as one of steps does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch.optim import Optimizer

from herd.train.config import ScheduleConfig

__all__ = ["rate", "set_rate"]


def rate(config: ScheduleConfig, step: int, progress: float) -> float:
    """Multiplier of every learning rate at `step` (from 0) when `progress` (0 to 1) of the budget is used.

    Warm-up is (step + 1) / warmup_steps, up to 1. wsd: 1, then linear to `final` over the last `decay_fraction` of the budget.
    cosine and linear: from 1 at the end of the warm-up to `final` at the end of the budget, along half a cosine or a line.
    constant: 1. With a budget of N steps the warm-up ends at the share warmup_steps / N, exactly; with one of minutes where the
    speed so far says that it did.
    """
    warm = 1.0 if config.warmup_steps == 0 else min(1.0, (step + 1) / config.warmup_steps)
    match config.kind:
        case "constant":
            return warm
        case "wsd":
            if config.decay_fraction == 0 or progress <= 1 - config.decay_fraction:
                return warm
            left = (1 - progress) / config.decay_fraction
            return warm * (config.final + (1 - config.final) * left)
        case "cosine":
            left = (1 + math.cos(math.pi * _after_warm_up(config, step, progress))) / 2
        case "linear":
            left = 1 - _after_warm_up(config, step, progress)
    return warm * (config.final + (1 - config.final) * left)


def _after_warm_up(config: ScheduleConfig, step: int, progress: float) -> float:
    """How much of what comes after the warm-up is done, 0 to 1."""
    if step <= config.warmup_steps:
        return 0.0 if config.warmup_steps else min(1.0, progress)
    warmed = config.warmup_steps * progress / step
    return 1.0 if warmed >= 1 else min(1.0, (progress - warmed) / (1 - warmed))


def set_rate(optimisers: Iterable[Optimizer], scale: float) -> None:
    """Set every group's learning rate to `scale` times its peak."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * scale
