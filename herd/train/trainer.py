"""The one training loop: draw, accumulate, clip, step, tell, evaluate, save, resume; on one process or on many.

What a step does depends on nothing but the moment before it: a run that was killed and resumed has the bytes of one that was not
(docs/train/exactness.md says when).

Letters: B rows, S row length.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from herd.adapters.apply import trained
from herd.data.batch import TokenBatch
from herd.data.read import DataError
from herd.errors import CheckpointError, ConfigError
from herd.model.llama import Llama
from herd.parallel.mesh import Mesh
from herd.train.config import TrainConfig
from herd.train.finite import culprit
from herd.train.identity import differences, identity
from herd.train.lock import alone
from herd.train.moment import (
    Counters,
    RandomStates,
    describe,
    not_finite,
    restore_optimisers,
    seed_everything,
    targets,
    tensors_of,
)
from herd.train.objective import Objective
from herd.train.optim import make_optimisers, rate, set_rate
from herd.train.payload import OneFile, Payload
from herd.train.state import Checkpoints, damage, latest, read_state, step_of
from herd.train.stop import NonFiniteError, Stopped, Stopper
from herd.train.watch import Begin, StepReport, Watcher

__all__ = ["Evaluate", "Resume", "Source", "Trainer", "load_weights"]

Resume = Literal["auto", "never"] | Path
Evaluate = Callable[[Llama], Mapping[str, float]]
"""Figures of a model, such as held-out bits per byte. With a method `texts(model) -> [(prompt, reply)]` it gives samples, too."""


class Source(Protocol):
    """Endless batches in an order that depends on `state` alone; `herd.data.batch.Loader` is one."""

    @property
    def state(self) -> Any:
        """Where the next batch begins: JSON-able."""
        ...

    def draw(self) -> TokenBatch: ...
    def restore(self, state: Any) -> None: ...


class Trainer:
    """Trains `model` in place on the batches of `loader` until the budget is used up.

    `out` is the run's folder: without one nothing is saved. `resume` says what to do with checkpoints in it: "auto" goes on from
    the newest whole one, "never" refuses a folder that has any, a path goes on from that one. A checkpoint of another model,
    configuration or machine is refused with the differences; `exact=False` goes on in spite of those that leave it fitting.
    `facts` are JSON values that have to be the same as well: the vocabulary's fingerprint, the data's, the method. With several
    ranks `mesh` says who works together and `payload` who writes what. `watchers` are told on the main rank.
    """

    def __init__(
        self,
        model: Llama,
        objective: Objective,
        loader: Source,
        config: TrainConfig,
        *,
        out: Path | None = None,
        mesh: Mesh | None = None,
        optimisers: Sequence[Optimizer] | None = None,
        watchers: Sequence[Watcher] = (),
        evaluate: Evaluate | None = None,
        resume: Resume = "auto",
        exact: bool = True,
        facts: Mapping[str, Any] | None = None,
        payload: Payload | None = None,
    ) -> None:
        self.model, self.objective, self.loader, self.config = model, objective, loader, config
        self.out, self.evaluate, self.resume, self.exact = out, evaluate, resume, exact
        self.mesh = Mesh.single(next(model.parameters()).device) if mesh is None else mesh
        self.optimisers = make_optimisers(model, config.optim) if optimisers is None else list(optimisers)
        self.watchers = list(watchers) if self.mesh.is_main else []
        self.facts = dict(facts or {})
        self.counters = Counters()
        self.stopper = Stopper()
        self.saves = None
        if out is not None:
            self.saves = Checkpoints(out, payload or OneFile(), config.save.keep, self.mesh, self.note)
        self._begun = False
        self._known: dict[str, Any] | None = None
        self._clock = self._saved = self._evaluated = 0.0

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.counters.step

    @property
    def progress(self) -> float:
        """Share of the budget used, 0 to 1."""
        return self.config.budget.progress(self.counters.step, self.counters.seconds, self.counters.tokens)

    def note(self, text: str) -> None:
        """Tell every watcher something in words."""
        for watcher in self.watchers:
            watcher.on_note(text)

    def fit(self, until: int | None = None) -> dict[str, float]:
        """Train until the budget is used up, or `until` steps are done; returns the last evaluation.

        On SIGTERM, SIGINT and SIGUSR1 the state is saved and Stopped is raised. Raises NonFiniteError before a step that would
        spoil the weights, SaveError, ConfigError and CheckpointError for what cannot be resumed, DataError for a step in which no
        token carries loss.
        """
        with self._writing(), self.stopper.listening():
            if not self._begun:
                self._begin()
            figures = self._run(until)
        for watcher in self.watchers:
            watcher.on_end(figures)
        return figures

    def _run(self, until: int | None) -> dict[str, float]:
        self.model.train()
        evaluated_at = saved_at = -1
        figures: dict[str, float] = {}
        while self.progress < 1 and (until is None or self.step < until):
            done = self._step()
            if self._asked():
                self._leave()
            if done and self._due(self.config.evaluate, self._evaluated) and self.evaluate is not None:
                figures, evaluated_at = self._evaluate(), self.step
            if done and self._due(self.config.save, self._saved) and self.saves is not None:
                self.save()
                saved_at = self.step
        if self.evaluate is not None and evaluated_at != self.step and self.progress >= 1:
            figures = self._evaluate()
        if self.saves is not None and saved_at != self.step:
            self.save()
        return figures

    def _step(self) -> bool:
        """One optimiser step; False when a signal came before it was taken, with everything as it was."""
        began = time.monotonic()
        moment, place = RandomStates.now(), self.loader.state
        share = self.progress
        scale = rate(self.config.schedule, self.step, share)
        set_rate(self.optimisers, scale)
        advance = getattr(self.loader, "advance", None)
        if advance is not None:
            advance(share)
        batches = [self._draw() for _ in range(self.config.accumulate)]
        supervised, tokens = self._count(batches)
        sums: dict[str, Tensor] = {}
        for batch in batches:
            self._backward(batch, supervised, sums)
            if self.mesh.world == 1 and self.stopper.asked is not None and batch is not batches[-1]:
                self._forget_gradients()
                self.loader.restore(place)
                moment.restore()
                return False
        totals = self._totals(sums, supervised)
        norm = self._clip(totals["loss"], batches, moment)
        for optimiser in self.optimisers:
            optimiser.step()
        self._forget_gradients()
        done = self.counters
        seconds = self._agree(time.monotonic() - self._clock)
        self.counters = Counters(
            step=done.step + 1, tokens=done.tokens + tokens, supervised=done.supervised + supervised, seconds=seconds
        )
        self._tell(totals, norm, scale, tokens, supervised, time.monotonic() - began)
        return True

    def _draw(self) -> TokenBatch:
        """The next micro-batch, this rank's part of it, on its device."""
        batch = self.loader.draw()
        tokens, labels, positions = (
            self.mesh.cut(part).to(self.mesh.device, non_blocking=True)
            for part in (batch.tokens, batch.labels, batch.positions)
        )
        return replace(batch, tokens=tokens, labels=labels, positions=positions)

    def _count(self, batches: Sequence[TokenBatch]) -> tuple[int, int]:
        """(tokens that carry loss, tokens) of the step, of all ranks."""
        supervised = sum(self.objective.count(batch) for batch in batches)
        tokens = sum(batch.tokens.numel() for batch in batches)
        both = self.mesh.sum(torch.tensor([supervised, tokens]))
        if int(both[0]) == 0:
            raise DataError(
                f"step {self.step + 1}: no token carries loss{_rows(self.loader, batches)}: are all replies cut off, or all "
                "labels masked? herd data lint shows the rows"
            )
        return int(both[0]), int(both[1])

    def _backward(self, batch: TokenBatch, supervised: int, sums: dict[str, Tensor]) -> None:
        loss = self.objective(self.model, batch)
        (loss.descended / supervised).backward()
        for name, value in {"loss": loss.total, **loss.metrics}.items():
            sums[name] = sums.get(name, 0) + value.detach().double()  # type: ignore[operator]

    def _totals(self, sums: Mapping[str, Tensor], supervised: int) -> dict[str, float]:
        """Means over the supervised tokens of all ranks. Summed in float64, so that no order of adding shows."""
        values = self.mesh.sum(torch.stack([value.cpu() for value in sums.values()]))
        return {name: float(value) / supervised for name, value in zip(sums, values, strict=True)}

    def _clip(self, loss: float, batches: Sequence[TokenBatch], moment: RandomStates) -> float:
        """Cut the norm of all gradients; returns it as it was. Raises NonFiniteError, naming what began it."""
        limit = self.config.optim.clip
        weights = [p for group in self.optimisers for part in group.param_groups for p in part["params"]]
        norm = _norm(weights)
        value = float(norm)
        if math.isfinite(value) and math.isfinite(loss):
            if limit is not None:
                torch.nn.utils.clip_grads_with_norm_(weights, limit, norm)
            return value
        moment.restore()
        where, why = culprit(
            self.model, lambda: sum((self.objective(self.model, b).descended for b in batches), torch.zeros(()))
        )
        self._forget_gradients()
        raise NonFiniteError(
            f"step {self.step + 1}: loss {loss}, gradient norm {value}: {why}{_rows(self.loader, batches)}. The step was not "
            "taken and nothing was saved over: lower the learning rate, look at these rows, or go on from an earlier checkpoint",
            where,
        )

    def _forget_gradients(self) -> None:
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)

    def _tell(
        self, totals: Mapping[str, float], norm: float, scale: float, tokens: int, supervised: int, seconds: float
    ) -> None:
        if not self.watchers:
            return
        report = StepReport(
            step=self.step,
            loss=totals["loss"],
            norm=norm,
            rate=scale * self.config.optim.lr,
            tokens=tokens,
            supervised=supervised,
            seconds=seconds,
            all_tokens=self.counters.tokens,
            all_seconds=self.counters.seconds,
            progress=self.progress,
            memory_bytes=_peak(self.mesh.device),
            metrics={name: value for name, value in totals.items() if name != "loss"},
        )
        for watcher in self.watchers:
            watcher.on_step(report)
        notes = getattr(self.loader, "notes", None)
        for text in notes() if notes is not None else ():
            self.note(text)

    # Evaluation

    def _evaluate(self) -> dict[str, float]:
        """Figures and samples; no random state and no weight is another afterwards."""
        assert self.evaluate is not None
        moment = RandomStates.now()
        self.model.eval()
        try:
            with torch.no_grad():
                figures = dict(self.evaluate(self.model))
                texts = getattr(self.evaluate, "texts", None)
                samples = list(texts(self.model)) if texts is not None else []
        finally:
            self.model.train()
            moment.restore()
        for watcher in self.watchers:
            watcher.on_evaluation(self.step, figures)
            for prompt, reply in samples:
                watcher.on_text(self.step, prompt, reply)
        self._evaluated = self._agree(time.monotonic() - self._clock)
        return figures

    # Agreement of ranks

    def _agree(self, value: float) -> float:
        """The main rank's `value`, on every rank: clocks differ, and what follows from them must not."""
        if self.mesh.world == 1:
            return value
        said = torch.tensor([value], dtype=torch.float64, device=self.mesh.device)
        dist.broadcast(said, 0)
        return float(said)

    def _asked(self) -> bool:
        return self.mesh.any(self.stopper.asked is not None)

    def _due(self, part: Any, last: float) -> bool:
        """Whether it is time to evaluate or to save."""
        by_step = part.every_steps is not None and self.step % part.every_steps == 0
        return by_step or (part.every_minutes is not None and self.counters.seconds - last > 60 * part.every_minutes)

    # Saving, leaving, resuming

    def save(self) -> Path:
        """Write a checkpoint of this moment, whole or not at all. Raises SaveError, and NonFiniteError for spoiled weights."""
        assert self.saves is not None, "a trainer without `out` saves nothing"
        tensors = tensors_of(self.model, self.optimisers, {})
        bad = not_finite(tensors)
        if self.mesh.any(bad is not None):
            raise NonFiniteError(
                f"step {self.step}: {bad or 'a tensor of another rank'} is not finite: not saved", str(bad)
            )
        state = {
            "counters": asdict(self.counters),
            "loader": _plain_state(self.loader.state),
            "optimisers": describe(self.model, self.optimisers),
            "identity": self._identity(),
        }
        place = self.saves.save(self.step, tensors, state, RandomStates.now().as_json())
        self._saved = self._agree(time.monotonic() - self._clock)
        return place

    def _leave(self) -> None:
        """Save and raise Stopped."""
        name = self.stopper.asked or "a signal to another rank"
        where = "nothing was saved, for the run has no folder"
        if self.saves is not None:
            where = f"saved at {self.save()}: the same command with --resume auto goes on from there"
        raise Stopped(f"stopped by {name} after step {self.step}; {where}", name)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """The run's folder, held by the main rank."""
        with contextlib.ExitStack() as stack:
            error: Exception | None = None
            if self.out is not None and self.mesh.is_main:
                try:
                    stack.enter_context(alone(self.out, self.note))
                except (ConfigError, OSError) as raised:
                    error = raised
            if self.mesh.any(error is not None):
                if isinstance(error, OSError):
                    raise CheckpointError(f"cannot be written: {error.strerror or error}", path=self.out) from error
                raise error or ConfigError(f"{self.out}: the main rank could not take it")
            yield

    def _begin(self) -> None:
        """Start anew or from a checkpoint, and tell the watchers."""
        place = self._where_to_begin()
        seed_everything(self.config.seed, self.mesh.dp_rank)
        if place is not None:
            self.restore(place)
        if self.saves is not None:
            weights = sum(weight.numel() * weight.element_size() for weight in trained(self.model).values())
            self.saves.prepare(3 * weights)  # weights and two means of AdamW
        self._clock = time.monotonic() - self.counters.seconds
        self._saved = self._evaluated = self.counters.seconds
        self._begun = True
        info = Begin(
            step=self.step,
            tokens=self.counters.tokens,
            seconds=self.counters.seconds,
            parameters=sum(weight.numel() for weight in self.model.parameters()),
            trained=sum(weight.numel() for weight in trained(self.model).values()),
            config=self.config,
            out=self.out,
            resumed=place,
            world=self.mesh.world,
            threads=torch.get_num_threads(),
        )
        for watcher in self.watchers:
            watcher.on_begin(info)

    def _where_to_begin(self) -> Path | None:
        if self.out is None:
            return self.resume if isinstance(self.resume, Path) else None
        found: Path | None = None
        error: CheckpointError | None = None
        if self.mesh.is_main:  # checksums are read once, not by every rank
            try:
                found = latest(self.out, self.note)
            except CheckpointError as raised:
                error = raised
        if self.mesh.any(error is not None):
            raise error or CheckpointError("the main rank could not read the checkpoints", path=self.out)
        newest = self._agree(-1.0 if found is None else float(step_of(found) or 0))
        if self.resume == "never":
            if newest >= 0:
                raise ConfigError(
                    f"{self.out} holds checkpoints (up to step {newest:.0f}): go on with --resume auto, or choose another `out`"
                )
            return None
        if isinstance(self.resume, Path):
            step = step_of(self.resume)
            if newest >= 0 and (step is None or step < newest):
                raise ConfigError(
                    f"{self.out} holds checkpoints up to step {newest:.0f}, newer than {self.resume}: choose another `out`, so "
                    "that two runs do not mix"
                )
            return self.resume
        return self.out / "checkpoints" / f"step-{newest:08.0f}" if newest >= 0 else None

    def restore(self, place: Path) -> None:
        """Go on from the checkpoint folder `place`, as if its steps had been done here. Only tensors and plain values are read.

        Raises CheckpointError when it does not fit, ConfigError when going on would not be exact and has to be.
        """
        state, random = self._open(place)
        lines, fits = differences(state["identity"], self._identity())
        told = "\n  ".join(lines)
        if not fits:
            raise CheckpointError(f"is a checkpoint of another model:\n  {told}", path=place)
        if lines and self.exact:
            raise ConfigError(
                f"{place} was written by another run than this one:\n  {told}\nRestore these settings, or go on all the same, "
                "though not exactly (exact=False, --inexact), or choose another `out`"
            )
        for line in lines:
            self.note(f"not exact: {line}")
        self._fill(place, state)
        self.loader.restore(_state_of(self.loader, state["loader"]))
        if random is not None:
            RandomStates.of_json(random).restore()
        else:
            self.note(
                "not exact: this rank was not there when the checkpoint was written, so its random numbers start anew"
            )
        self.counters = Counters(**state["counters"])

    def adopt(self, place: Path) -> None:
        """Take weights and optimiser states from the checkpoint of another run, and count anew: the next phase of a schedule."""
        state, _ = self._open(place)
        kept, now = state["identity"], self._identity()
        lines, fits = differences(*({key: part[key] for key in ("model", "trained")} for part in (kept, now)))
        if not fits:
            raise CheckpointError("is a checkpoint of another model:\n  " + "\n  ".join(lines), path=place)
        self._fill(place, state)

    def _identity(self) -> dict[str, Any]:
        if self._known is None:  # what does not train is looked at once
            self._known = identity(self.model, self.config, self.mesh, self.facts)
        return self._known

    def _open(self, place: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
        why = damage(place, deep=self.mesh.is_main)
        if why is not None:
            raise CheckpointError(f"is no whole checkpoint of a training run: {why}", path=place)
        return read_state(place, self.mesh.rank)

    def _fill(self, place: Path, state: Mapping[str, Any]) -> None:
        assert self.saves is not None or isinstance(place, Path)
        payload = self.saves.payload if self.saves is not None else OneFile()
        try:
            room = targets(self.model, self.optimisers, state["optimisers"])
            payload.read(place, room)
            restore_optimisers(self.model, self.optimisers, state["optimisers"], room)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"state.json does not describe this optimiser: {error!r}", path=place) from error


def load_weights(out: Path, model: Llama) -> Path:
    """Fill `model` with the weights of the newest whole checkpoint of the run in `out`; returns its folder.

    Raises CheckpointError when there is none, or it is one of another model.
    """
    place = latest(out)
    if place is None:
        raise CheckpointError("holds no checkpoint of a training run", path=out)
    OneFile().read(place, targets(model, (), {}))
    return place


def _norm(weights: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together. Zero when there are none."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _rows(loader: Source, batches: Sequence[TokenBatch]) -> str:
    """Where the rows of a step come from, when the loader knows."""
    where = getattr(loader, "where", None)
    ids = [row for batch in batches for row in getattr(batch, "ids", ())]
    if not ids:
        return ""
    named = [str(where(row)) for row in ids[:3]] if where is not None else [str(row) for row in ids[:3]]
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return f" (rows {', '.join(named)}{more})"


def _plain_state(state: Any) -> Any:
    return asdict(state) if hasattr(state, "__dataclass_fields__") else state


def _state_of(loader: Source, kept: Any) -> Any:
    return type(loader.state)(**kept) if hasattr(loader.state, "__dataclass_fields__") else kept


def _peak(device: torch.device) -> int:
    """Most bytes in use so far: of the device, on a CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
