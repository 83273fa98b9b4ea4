"""How to sample: pure data, shared by engines and APIs. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from herd.errors import ConfigError

__all__ = ["SamplingParams"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Sampling controls; the defaults are Meta's generation defaults (temperature 0.6, top_p 0.9).

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 switch those filters off. `max_tokens` None means up to
    the end of the context. `stop` strings end the reply and are not part of it. `seed` None draws a fresh one.
    `ignore_stop_ids` runs to max_tokens whatever the model says. Raises ConfigError naming the field.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    seed: int | None = None
    ignore_stop_ids: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise ConfigError(f"stop is the string {self.stop!r}: give a tuple of strings, ({self.stop!r},)")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_ids", frozenset(self.stop_ids))
        _within("temperature", self.temperature, 0, math.inf)
        _within("top_p", self.top_p, 0, 1, open_low=True)
        _within("top_k", self.top_k, 0, math.inf, whole=True)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 0, math.inf, open_low=True)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, math.inf, whole=True)
        if self.seed is not None:
            _within("seed", self.seed, 0, 2**63 - 1, whole=True)
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise ConfigError("stop strings must be non-empty text")


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False, whole: bool = False) -> None:
    number = isinstance(value, int) if whole else isinstance(value, int | float)
    if (
        isinstance(value, bool)
        or not number
        or not math.isfinite(value)
        or not low <= value <= high
        or (open_low and value == low)
    ):
        kind = "an integer" if whole else "a number"
        above = f"above {low:g}" if open_low else f"at least {low:g}"
        upto = "" if high == math.inf else f" and at most {high:g}"
        raise ConfigError(f"{name} is {value!r}: expected {kind} {above}{upto}")
