"""What every player does, whoever it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Player", "Seconds", "Setup", "Watch"]

Seconds = tuple[float, float]
"""By the clock, and of CPU time of all threads of the process."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How a player is built. `path`: its checkpoint; room for `sequences` of `length` tokens each.

    `device` is torch's name of where it runs; `weights` the form that weights get while loading, where that is not the file's.
    """

    path: str
    threads: int
    sequences: int
    length: int
    device: str = "cpu"
    weights: str | None = None


class Watch:
    """Measures from when it is made."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> Seconds:
        """Since then."""
        clock, cpu = self._began
        return time.perf_counter() - clock, time.process_time() - cpu


class Player(Protocol):
    """A program with a model in memory. Ids in, greedy choices inside, nothing printed."""

    def facts(self) -> dict[str, Any]:
        """Versions and what is behind the figures (instruction set, kernels)."""
        ...

    def logits(self, prompt: list[int]) -> Any:
        """Logits [V] float32 (numpy) after `prompt`, from an empty cache."""
        ...

    def prefill(self, prompt: list[int]) -> None:
        """Read `prompt` from an empty cache and choose a token."""
        ...

    def start(self, prompts: list[list[int]]) -> None:
        """Read `prompts` of one length into the cache, as sequences that `decode` continues."""
        ...

    def decode(self, steps: int) -> list[Seconds]:
        """Continue every sequence of `start` by `steps` tokens, from the end of its prompt; seconds of each step."""
        ...
