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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from herd.adapters.apply import trained
from herd.data.batch import TokenBatch
from herd.errors import CheckpointError, ConfigError, DataError
from herd.model.llama import Llama
from herd.parallel.mesh import Mesh
from herd.parallel.prepare import Spread
from herd.train.average import Average
from herd.train.config import TrainConfig
from herd.train.finite import culprit
from herd.train.keeper import Keeper, Resume, Source, from_main, load_weights
from herd.train.lock import alone
from herd.train.moment import Counters, RandomStates, seed_everything
from herd.train.objective import Loss, Objective, at_the_end
from herd.train.optim import make_optimisers, rate, set_rate
from herd.train.payload import Payload
from herd.train.router import FIGURES, Staged
from herd.train.stop import NonFiniteError, Stopped, Stopper
from herd.train.watch import Begin, StepReport, Watcher

__all__ = ["Evaluate", "Resume", "Source", "Trainer", "exact_on", "load_weights"]

CLIP_EPS = 1e-6
"""Added to the norm that gradients are divided by, as `torch.nn.utils.clip_grad_norm_` does."""

Evaluate = Callable[[Llama], Mapping[str, float]]
"""Figures of a model, such as held-out bits per byte. With a method `texts(model) -> [(prompt, reply)]` it gives samples, too."""


class Trainer:
    """Trains `model` in place on the batches of `loader` until the budget is used up.

    `out` is the run's folder: without one nothing is saved. `resume` says what to do with checkpoints in it: "auto" goes on from
    the newest whole one, "never" refuses a folder that has any, a path goes on from that one. A checkpoint of another model,
    configuration or machine is refused with the differences; `exact=False` goes on in spite of those that leave it fitting.
    `facts` are JSON values that have to be the same as well: the vocabulary's fingerprint, the data's, the method. With several
    ranks `spread` is what `herd.parallel.prepare` made of the model and `payload` writes each rank's part. `watchers` are told on
    the main rank. With `config.average`, `average` holds averaged weights; evaluations are of those.
    """

    def __init__(
        self,
        model: Llama,
        objective: Objective,
        loader: Source,
        config: TrainConfig,
        *,
        out: Path | None = None,
        spread: Spread | None = None,
        optimisers: Sequence[Optimizer] | None = None,
        watchers: Sequence[Watcher] = (),
        evaluate: Evaluate | None = None,
        resume: Resume = "auto",
        exact: bool = True,
        facts: Mapping[str, Any] | None = None,
        payload: Payload | None = None,
    ) -> None:
        self.spread = spread or Spread(model, Mesh.single(next(model.parameters()).device))
        self.model, self.objective, self.loader, self.config = model, objective, loader, config
        self.mesh, self.out, self.evaluate = self.spread.mesh, out, evaluate
        self.resume: Resume = resume
        part = self.spread.pipeline is not None
        self.optimisers = make_optimisers(model, config.optim, part=part) if optimisers is None else list(optimisers)
        self.average = None if config.average is None else Average(model, config.average)
        self._staged = _staged(self.spread, objective)
        if config.exact_accumulation:
            _row_by_row(loader, self.mesh)
        self.watchers = list(watchers) if self.mesh.is_main else []
        follow = getattr(evaluate, "follow", None)
        if follow is not None:
            follow(self._evaluating)
        self.counters = Counters()
        self.stopper = Stopper()
        self.keeper = Keeper(
            model,
            self.optimisers,
            loader,
            self.average,
            config,
            self.mesh,
            out=out,
            exact=exact,
            facts=facts or {},
            payload=payload,
            tell=self.note,
        )
        self._begun = False
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
            if done and self._due(self.config.save, self._saved) and self.out is not None:
                self.save()
                saved_at = self.step
        if self.evaluate is not None and evaluated_at != self.step and self.progress >= 1:
            figures = self._evaluate()
        if self.out is not None and saved_at != self.step:
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
        if self.config.exact_accumulation:
            batches = [row for batch in batches for row in batch.each()]
        totals = self._backward(batches, supervised)
        if totals is None:
            self._forget_gradients()
            self.loader.restore(place)
            moment.restore()
            return False
        norm = self._clip(totals["loss"], batches, moment)
        for optimiser in self.optimisers:
            optimiser.step()
        self._forget_gradients()
        done = self.counters
        self.counters = Counters(
            step=done.step + 1,
            tokens=done.tokens + tokens,
            supervised=done.supervised + supervised,
            seconds=self._now(),
        )
        if self.average is not None:
            self.spread.give_back()
            self.average.update(self.step, self.progress)
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
        seen = sum(batch.tokens.numel() if batch.seen is None else batch.seen / self.mesh.part.cp for batch in batches)
        both = self.mesh.sum(torch.tensor([supervised, seen], dtype=torch.float64))
        if int(both[0]) == 0:
            raise DataError(
                f"step {self.step + 1}: no token carries loss{_rows(self.loader, batches)}: are all replies cut off, or all "
                "labels masked? herd data lint shows the rows"
            )
        return int(both[0]), round(float(both[1]))

    def _backward(self, batches: Sequence[TokenBatch], supervised: int) -> dict[str, float] | None:
        """Gradients of the step's loss; returns means over the supervised tokens of all ranks: the loss and metrics.

        None when a signal came first. Sums are in float64, so that no order of adding shows in what is told.
        """
        losses: list[Loss] = []
        pipeline = self.spread.pipeline
        if pipeline is not None:
            end = at_the_end(self.objective)
            learned = [self.objective.count(batch) for batch in batches]
            for staged in self._staged or ():
                staged.shares = [count / supervised / self.mesh.part.tp for count in learned]

            def piece(model: Llama, i: int) -> tuple[Tensor, Loss]:
                loss = end(model, batches[i])
                return self._descended(loss) / supervised, loss

            losses = pipeline.backward([(batch.tokens, batch.positions) for batch in batches], piece)
            told = {"loss": sum(float(loss.total.detach()) for loss in losses)}
            if self._staged is not None:
                told |= dict.fromkeys(FIGURES, 0.0)
                for staged in self._staged:
                    for i, count in enumerate(learned):
                        for name, value in staged.figures[i].items():
                            told[name] += float(value) * count
            values = torch.tensor(list(told.values()), dtype=torch.float64, device=self.mesh.device)
            values = self.mesh.sum(pipeline.whole(values)).cpu()
            return {name: float(value) / supervised for name, value in zip(told, values, strict=True)}
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            if i and self.mesh.world == 1 and self.stopper.asked is not None:
                return None
            self.spread.last(i == len(batches) - 1)
            loss = self.objective(self.model, batch)
            (self._descended(loss) / supervised).backward()
            for name, value in {"loss": loss.total, **loss.metrics}.items():
                sums[name] = sums.get(name, 0) + value.detach().double()  # type: ignore[operator]
        values = self.mesh.sum(torch.stack([value.cpu() for value in sums.values()]))
        return {name: float(value) / supervised for name, value in zip(sums, values, strict=True)}

    def _descended(self, loss: Loss) -> Tensor:
        """Every rank of a tensor-parallel group computes the routers' losses, and their gradients are added."""
        return loss.total if loss.extra is None else loss.total + loss.extra / self.mesh.part.tp

    def _clip(self, loss: float, batches: Sequence[TokenBatch], moment: RandomStates) -> float:
        """Cut the norm of all gradients; returns it as it was. Raises NonFiniteError, naming what began it."""
        norm = float(self.spread.clip(None))
        if math.isfinite(norm) and math.isfinite(loss):
            limit = self.config.optim.clip
            if limit is not None and norm > limit:
                _scale(self.spread.parameters(), limit / (norm + CLIP_EPS))
            return norm

        def again() -> Tensor:
            moment.restore()
            return sum((self.objective(self.model, batch).descended for batch in batches), torch.zeros(()))

        # With several ranks the model cannot be asked again: each would stop at a layer of its own, and wait for the others.
        where, why = culprit(self.model, again if self.mesh.world == 1 else None)
        self._forget_gradients()
        raise NonFiniteError(
            f"step {self.step + 1}: loss {loss}, gradient norm {norm}: {why}{_rows(self.loader, batches)}. The step was not "
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
            with torch.no_grad(), self._averaged():
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
        self._evaluated = self._now()
        return figures

    def _evaluating(self, done: int, total: int) -> None:
        for watcher in self.watchers:
            watcher.on_evaluating(done, total)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model has the average inside, if there is one. Parts of it that were put together are put together anew."""
        if self.average is None:
            yield
            return
        self.spread.give_back()
        with self.average.swapped():
            try:
                yield
            finally:
                self.spread.give_back()

    # Agreement of ranks, saving, leaving

    def _now(self) -> float:
        """Seconds of the run, by the main rank's clock."""
        return from_main(self.mesh, time.monotonic() - self._clock)

    def _asked(self) -> bool:
        return self.mesh.any(self.stopper.asked is not None)

    def _due(self, part: Any, last: float) -> bool:
        """Whether it is time to evaluate or to save."""
        by_step = part.every_steps is not None and self.step % part.every_steps == 0
        return by_step or (part.every_minutes is not None and self.counters.seconds - last > 60 * part.every_minutes)

    def save(self) -> Path:
        """Write a checkpoint of this moment, whole or not at all. Raises SaveError, and NonFiniteError for spoiled weights."""
        self.spread.give_back()
        place = self.keeper.save(self.counters)
        self._saved = self._now()
        return place

    def adopt(self, place: Path) -> None:
        """Take weights and optimiser states from the checkpoint of another run, and count anew: the next phase of a schedule."""
        self.keeper.adopt(place)

    def _leave(self) -> None:
        """Save and raise Stopped."""
        name = self.stopper.asked or "a signal to another rank"
        where = "nothing was saved, for the run has no folder"
        if self.out is not None:
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
        place = self.keeper.find(self.resume)
        seed_everything(self.config.seed, self.mesh.draws)
        if place is not None:
            self.counters = self.keeper.restore(place)
        self.keeper.prepare()
        self._clock = time.monotonic() - self.counters.seconds
        self._saved = self._evaluated = self.counters.seconds
        self._begun = True
        info = Begin(
            step=self.step,
            tokens=self.counters.tokens,
            seconds=self.counters.seconds,
            parameters=self._numbers(dict(self.model.named_parameters())),
            trained=self._numbers(trained(self.model)),
            config=self.config,
            out=self.out,
            resumed=place,
            world=self.mesh.world,
            threads=torch.get_num_threads(),
        )
        for watcher in self.watchers:
            watcher.on_begin(info)

    def _numbers(self, weights: Mapping[str, Tensor]) -> int:
        """How many numbers all stages of a pipeline hold together; a tied matrix, which two of them have, once."""
        pipeline = self.spread.pipeline
        if pipeline is None:
            return sum(weight.numel() for weight in weights.values())
        tied = self.model.config.tie_embeddings
        own = sum(w.numel() for name, w in weights.items() if not (tied and name.startswith("output.")))
        return int(pipeline.whole(torch.tensor(own, device=self.mesh.device)))


def exact_on(device: torch.device) -> None:
    """Raise ConfigError where nobody knows whether `exact_accumulation` is exact."""
    if device.type != "cpu":
        raise ConfigError(
            f"train.exact_accumulation: kernels of {device.type} may add in another order each time, which nobody has "
            "measured: set it to false, or device=cpu"
        )


def _row_by_row(loader: Source, mesh: Mesh) -> None:
    """What makes the order of all sums independent of how many rows a micro-batch has. Raises ConfigError."""
    exact_on(mesh.device)
    deal = getattr(loader, "deal_rows", None)
    if deal is not None:
        deal()
    elif mesh.dp_size > 1:
        raise ConfigError(
            "train.exact_accumulation: this loader cannot deal rows to ranks one by one (it has no deal_rows): give it a "
            "herd.data.batch.Loader, or set it to false"
        )


def _staged(spread: Spread, objective: Objective) -> list[Staged] | None:
    """What watches the routers of each stage of a pipeline that is here; None when there is nothing to watch on any rank."""
    routers = getattr(objective, "routers", None)
    if spread.pipeline is None or not routers:
        return None
    found = []
    for stage in spread.pipeline.stages:
        staged = Staged(stage, routers)
        if staged.own.top_k:
            stage.beside = staged
            found.append(staged)
    return found


def _scale(parameters: Iterator[torch.nn.Parameter], factor: float) -> None:
    for gradient in [p.grad for p in parameters if p.grad is not None]:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)


def _rows(loader: Source, batches: Sequence[TokenBatch]) -> str:
    """Where the rows of a step come from, when the loader knows."""
    where = getattr(loader, "where", None)
    ids = [row for batch in batches for row in getattr(batch, "ids", ())]
    if not ids:
        return ""
    named = [str(where(row)) for row in ids[:3]] if where is not None else [str(row) for row in ids[:3]]
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return f" (rows {', '.join(named)}{more})"


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
