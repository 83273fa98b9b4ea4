"""The one training loop: draw, accumulate, clip, step, log, evaluate, save, resume. One process.

Letters: B rows, S row length.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.data.batch import Loader, LoaderState, TokenBatch
from herd.data.encode import IGNORE
from herd.errors import CheckpointError, HerdError
from herd.model.attend import Packed
from herd.model.llama import Llama
from herd.train.config import TrainConfig
from herd.train.losses import next_token_loss
from herd.train.optim import make_optimisers, rate, set_rate

__all__ = ["Trainer"]

Log = Callable[[str], None]


def _due(minutes: float | None, seconds: float) -> bool:
    return minutes is not None and seconds > 60 * minutes


def _print(line: str) -> None:
    print(line, flush=True)


class Trainer:
    """Trains `model` in place on the batches of `loader`.

    `evaluate` is called now and then and at the end; its figures are logged. `path` is the checkpoint file: written every
    few minutes and at the end (atomically), and continued from when it exists.
    """

    def __init__(
        self,
        model: Llama,
        loader: Loader,
        config: TrainConfig,
        *,
        path: Path | None = None,
        evaluate: Callable[[Llama], dict[str, float]] | None = None,
        log: Log = _print,
    ) -> None:
        self.model, self.loader, self.config, self.path = model, loader, config, path
        self.evaluate, self.log = evaluate, log
        self.optimisers = make_optimisers(model, config.optim)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.history: list[dict[str, float]] = []
        self._loss = torch.compile(self._summed_loss, dynamic=False) if config.compile else self._summed_loss
        if path is not None and path.exists():
            self.restore(path)

    def _summed_loss(self, tokens: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        see = Packed(positions)
        see.mask(None)
        hidden = self.model.hidden(self.model.embed(tokens), positions, [see] * len(self.model.layers))
        return next_token_loss(hidden, labels, self.model.output, self.config.loss_chunk)

    @property
    def progress(self) -> float:
        """Share of the budget used, 0 to 1."""
        return self.config.budget.progress(self.step, self.seconds, self.tokens)

    def run(self) -> dict[str, float]:
        """Train until the budget is used up; returns the last evaluation."""
        started = time.monotonic() - self.seconds
        saved = evaluated = logged = self.seconds
        losses: list[float] = []
        norms: list[float] = []
        fresh = 0
        while self.progress < 1:
            loss, norm, seen = self.train_step()
            self.seconds = time.monotonic() - started
            losses.append(loss)
            norms.append(norm)
            fresh += seen
            if self.step % self.config.log_every == 0:
                self._report(losses, norms, fresh / max(1e-9, self.seconds - logged))
                losses, norms, fresh, logged = [], [], 0, self.seconds
            if self.evaluate is not None and _due(self.config.evaluate.every_minutes, self.seconds - evaluated):
                self._evaluate()
                evaluated = time.monotonic() - started
            if self.path is not None and _due(self.config.save.every_minutes, self.seconds - saved):
                self.save(self.path)
                saved = self.seconds
        figures = self._evaluate() if self.evaluate is not None else {}
        if self.path is not None:
            self.save(self.path)
        return figures

    def train_step(self) -> tuple[float, float, int]:
        """One optimiser step; returns mean loss (nats a learned token), gradient norm and tokens seen."""
        set_rate(self.optimisers, rate(self.config.schedule, self.step, self.progress))
        batches = [self.loader.draw() for _ in range(self.config.accumulate)]
        learned = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            total += self._backward(batch, max(1, learned))
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip or math.inf))
        if not math.isfinite(norm):
            raise HerdError(
                f"step {self.step}: the gradient norm is {norm}, so the step was not taken: "
                "lower the learning rate or go on from the last checkpoint"
            )
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seen = sum(batch.tokens.numel() for batch in batches)
        self.step += 1
        self.tokens += seen
        return total, norm, seen

    def _backward(self, batch: TokenBatch, learned: int) -> float:
        loss = self._loss(batch.tokens, batch.labels, batch.positions) / learned
        loss.backward()
        return float(loss.detach())

    def _report(self, losses: list[float], norms: list[float], speed: float) -> None:
        done = self.progress
        left = self.seconds * (1 - done) / max(done, 1e-9)
        scale = rate(self.config.schedule, self.step - 1, done)
        loss, norm = sum(losses) / len(losses), sum(norms) / len(norms)
        self.log(
            f"step {self.step} loss {loss:.4f} norm {norm:.2f} rate {scale:.3f} tokens {self.tokens / 1e6:.2f}M "
            f"{speed:.0f} tok/s epoch {self.loader.state.epoch} {done:.1%} eta {left / 60:.1f} min"
        )
        self.history.append({"step": self.step, "seconds": self.seconds, "loss": loss})

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluate is not None
        self.model.eval()
        with torch.no_grad():
            figures = self.evaluate(self.model)
        self.model.train()
        self.log(f"step {self.step} evaluation " + " ".join(f"{key} {value:.4f}" for key, value in figures.items()))
        return figures

    def save(self, path: Path) -> None:
        """Write weights, optimiser, loader and counters; a crash while writing leaves the old file."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "loader": asdict(self.loader.state),
            "counters": {"step": self.step, "seconds": self.seconds, "tokens": self.tokens},
            "history": self.history,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def adopt(self, path: Path) -> None:
        """Take weights and optimiser state from another run's file, and start counting anew: the next phase of a schedule."""
        self._load(path)
        self.log(f"starting from {path}")

    def restore(self, path: Path) -> None:
        """Continue from a file written by `save`. Only tensors and plain values are read from it, never code."""
        state = self._load(path)
        self.loader.restore(LoaderState(**state["loader"]))
        counters = state["counters"]
        self.step, self.seconds, self.tokens = counters["step"], counters["seconds"], counters["tokens"]
        self.history = state["history"]
        self.log(f"continuing from {path} at step {self.step}")

    def _load(self, path: Path) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
                peaks = [group["peak"] for group in optimiser.param_groups]
                optimiser.load_state_dict(kept)
                for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                    group["peak"] = peak  # the rates are this run's, not those of the run that wrote the file
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"not a checkpoint of this model and optimiser: {error}", path=path) from error
        return state
