"""What the trainer tells whoever watches: the start, every step, evaluations, sample texts, notes, the end.

Watchers are told by the main rank alone and change nothing: a run with them and one without have the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from herd.train.config import TrainConfig

__all__ = ["Begin", "Recorder", "Silent", "StepReport", "Watcher"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Begin:
    """A run as it starts or goes on. `step` steps are done already; what a log holds of later ones will be done again."""

    step: int
    tokens: int
    seconds: float
    parameters: int
    trained: int
    config: TrainConfig
    out: Path | None
    resumed: Path | None
    world: int
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """One optimiser step. Counts are those of all ranks.

    `step` counts from 1. `loss` is in nats a supervised token; `norm` is that of the gradients before clipping; `rate` the
    learning rate (the schedule's share times `config.optim.lr`). `tokens` and `supervised` were seen in this step, `seconds` is
    its time; `all_tokens` and `all_seconds` since the run began; `progress` is the share of the budget used after it.
    `memory_bytes` is the peak so far (of the device, or of the process on a CPU).
    """

    step: int
    loss: float
    norm: float
    rate: float
    tokens: int
    supervised: int
    seconds: float
    all_tokens: int
    all_seconds: float
    progress: float
    memory_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Watcher(Protocol):
    """Whoever wants to know. What it raises stops the run.

    During an evaluation `on_evaluating` is told how many held-out rows are done, of how many.
    """

    def on_begin(self, info: Begin) -> None: ...
    def on_step(self, report: StepReport) -> None: ...
    def on_evaluating(self, done: int, total: int) -> None: ...
    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None: ...
    def on_text(self, step: int, prompt: str, reply: str) -> None: ...
    def on_note(self, text: str) -> None: ...
    def on_end(self, figures: Mapping[str, float]) -> None: ...


class Silent:
    """A watcher that does nothing: the base of those that care for one thing."""

    def on_begin(self, info: Begin) -> None: ...
    def on_step(self, report: StepReport) -> None: ...
    def on_evaluating(self, done: int, total: int) -> None: ...
    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None: ...
    def on_text(self, step: int, prompt: str, reply: str) -> None: ...
    def on_note(self, text: str) -> None: ...
    def on_end(self, figures: Mapping[str, float]) -> None: ...


class Recorder(Silent):
    """Keeps what it is told: for notebooks and proofs."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        self.texts: list[tuple[int, str, str]] = []
        self.notes: list[str] = []

    def on_step(self, report: StepReport) -> None:
        self.steps.append(report)

    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self.evaluations.append((step, dict(figures)))

    def on_text(self, step: int, prompt: str, reply: str) -> None:
        self.texts.append((step, prompt, reply))

    def on_note(self, text: str) -> None:
        self.notes.append(text)
