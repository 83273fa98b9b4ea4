"""What the recipes share around the loop: the run's folder, its facts, its threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from herd.chat.base import BaseFormat
from herd.convert.merge import merge
from herd.data.build import Progress
from herd.data.fingerprint import format_fingerprint, tokenizer_fingerprint
from herd.data.open import DataReport
from herd.errors import CheckpointError, HerdError, RanksError
from herd.model.config import ModelConfig
from herd.model.late import room
from herd.model.llama import Llama
from herd.parallel import launch
from herd.parallel.mesh import Mesh
from herd.parallel.parting import main_alone
from herd.train.config import RunConfig
from herd.train.export import export
from herd.train.identity import NEUTRAL, differences
from herd.train.keeper import fill_weights, promise_weights
from herd.train.lock import alone
from herd.train.memory import keep_freed_memory
from herd.train.metrics import LOG, Board, Figures, JsonLines, kept
from herd.train.overrides import dump_config
from herd.train.payload import Payload, Ranks
from herd.train.prepare import unprepared
from herd.train.qat import remove_qat
from herd.train.start import Start, adapt, device_of, start
from herd.train.throughput import peak_of, work_of
from herd.train.trackers import trackers_of
from herd.train.trainer import Resume, Trainer, exact_on
from herd.train.typed import plain
from herd.train.watch import Begin, Silent, Watcher

__all__ = [
    "CONFIG",
    "ConfigFile",
    "Resume",
    "budget_rows",
    "facts_of",
    "payload_of",
    "result",
    "run_recipe",
    "settle",
    "unlike",
    "watchers_of",
]

CONFIG = "config.yaml"

NEUTRAL_DATA = ("workers", "processes", "shards")
"""Keys of `data` that change no row and no order."""


def run_recipe(
    config: RunConfig,
    *,
    resume: Resume = "auto",
    exact: bool = True,
    watchers: Sequence[Watcher] = (),
    tell: Callable[[str], None] = print,
    tick: Callable[[Progress], None] = lambda progress: None,
    until: int | None = None,
) -> dict[str, float]:
    """The run of `config` by the recipe that it names; see `herd.train.recipes.pretrain.run`.

    Raises RanksError, too, when another rank is gone.
    """
    recipe = import_module(f"herd.train.recipes.{config.recipe}")
    try:
        return recipe.run(config, resume=resume, exact=exact, watchers=watchers, tell=tell, tick=tick, until=until)
    except Exception as error:
        lost = launch.lost(error)
        if lost is None:
            raise
        raise RanksError(f"{lost}. The same command goes on from the last checkpoint, if there is one") from error


def budget_rows(config: RunConfig, dp: int) -> int | None:
    """Rows that the whole run draws, over all ranks; None when that is not known, or not well enough for where stages begin.

    Minutes say nothing of rows. Tokens say how many there are at least: padding is not counted.
    """
    budget = config.train.budget
    if budget.minutes is not None or (budget.tokens is not None and config.data.stages):
        return None
    step = config.train.accumulate * config.data.rows * dp
    if budget.tokens is None:
        assert budget.steps is not None
        return budget.steps * step
    steps = -(-budget.tokens // (step * config.data.length))
    return min(steps, budget.steps or steps) * step


def facts_of(config: RunConfig, begun: Start, report: DataReport) -> dict[str, Any]:
    """What a checkpoint of this run must find the same again: vocabulary, prompt format, method, and the data in their order."""
    form = None if isinstance(begun.format, BaseFormat) else format_fingerprint(begun.format)
    data = _without(plain(config.data), *NEUTRAL_DATA)
    return {
        "recipe": config.recipe,
        "model": plain(config.model),
        "method": plain(config.method),
        "data": data,
        "tokenizer": tokenizer_fingerprint(begun.tokenizer),
        "format": form,
        "digest": report.content,
    }


def unlike(kept: RunConfig, now: RunConfig) -> list[str]:
    """A line for every setting in which two runs differ, but for those that change no weight, or only its rounding."""

    def told(config: RunConfig) -> dict[str, Any]:
        whole = _without(plain(config), "out", "report", "device", "threads", "parallel")
        return whole | {
            "data": _without(whole["data"], *NEUTRAL_DATA),
            "train": _without(whole["train"], *NEUTRAL),
        }

    return differences(told(kept), told(now))[0]


def _without(part: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in part.items() if key not in names}


def watchers_of(config: RunConfig, model: Llama, mesh: Mesh, more: Sequence[Watcher]) -> list[Watcher]:
    """Those that every run has (its configuration, its log, TensorBoard's files, the trackers it names) and `more`.

    One of `more` that has `on_figures` is given what speeds are computed with.
    """
    if not mesh.is_main:
        return []
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    work = work_of(model.config, config.data.length, trained if config.method.adapts else None)
    dtype = torch.float32 if config.train.precision == "float32" else torch.bfloat16
    if config.train.precision == "float8" and mesh.device.type == "cuda":
        dtype = torch.float8_e4m3fn
    figures, out = Figures(work, peak_of(mesh.device, dtype), mesh.world), Path(config.out)
    own: list[Watcher] = [ConfigFile(config), JsonLines(out / LOG, figures), Board(out / "tensorboard", figures)]
    for watcher in more:
        tell = getattr(watcher, "on_figures", None)
        if tell is not None:
            tell(figures)

    def note(text: str) -> None:
        for watcher in (*own, *more):
            watcher.on_note(text)

    return [*own, *trackers_of(config, out, figures, note), *more]


class ConfigFile(Silent):
    """Writes the whole configuration into the run's folder, where `herd train FOLDER` finds it, once the run has begun.

    Raises SaveError.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def on_begin(self, info: Begin) -> None:
        out = Path(self.config.out)
        partial = out / f".{CONFIG}.new"
        with kept(out / CONFIG):
            partial.write_text(dump_config(self.config), encoding="utf-8")
            os.replace(partial, out / CONFIG)


def payload_of(config: ModelConfig, mesh: Mesh) -> Payload:
    """Who writes the tensors of a checkpoint: every rank its part, when there are several."""
    return Ranks(mesh.world, tied=config.tie_embeddings)


def result(
    trainer: Trainer,
    begun: Start,
    config: RunConfig,
    tell: Callable[[str], None],
    tick: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Write what a run that is over has made, and say where; a run that is not over has no result.

    Several ranks leave their group here: the main one alone reads their last checkpoint, one tensor at a time as it is written
    (ADR 16), and the others stay until it is done. It holds the run's folder, so that no other run removes that checkpoint. When
    it fails, the same command makes another attempt. Raises ConfigError when another run has taken the folder, and RanksError on
    ranks whose main one failed.
    """
    if trainer.progress < 1:
        launch.stop()
        return
    with main_alone(trainer.mesh):
        if trainer.mesh.is_main:
            with alone(Path(config.out), lambda text: None):  # the loop has told of a file system without locks
                _result(trainer, begun, config, tell, tick)


def _result(
    trainer: Trainer,
    begun: Start,
    config: RunConfig,
    tell: Callable[[str], None],
    tick: Callable[[Progress], None],
) -> None:
    mesh, model = trainer.mesh, trainer.model
    if trainer.average is not None and not trainer.average.count:
        tell(
            "train.average: the run was over before anything was averaged (start, every_steps): this is the last weights"
        )
    if mesh.world > 1:
        begun = start(config, torch.device("cpu"), later=True)
        model = adapt(begun.model, config.method, config.model.seed)
        assert trainer.keeper.saves is not None
        place = trainer.keeper.saves.current  # checksums and all: it was written just now, or the run began from it
        assert place is not None
        averaged, payload = config.train.average is not None, payload_of(model.config, mesh)
        if config.method.adapts:
            room(model)
            fill_weights(place, model, payload, averaged=averaged)
        else:
            promise_weights(place, model, payload, averaged=averaged)
        _write(model, begun, config, tell, tick)
        return
    averaged = contextlib.nullcontext() if trainer.average is None else trainer.average.swapped()
    unprepared(model)
    if config.method.qat is not None:
        remove_qat(model)
    with averaged:
        _write(model, begun, config, tell, tick)


def _write(
    model: Llama,
    begun: Start,
    config: RunConfig,
    tell: Callable[[str], None],
    tick: Callable[[Progress], None],
) -> None:
    """The result, and the merged model beside an adapter when that is asked for."""

    def watch(doing: str, done: int, total: int) -> None:
        tick(Progress(doing, done, total))

    try:
        tell(str(export(model, begun, config, watch)))
    except HerdError:
        tell("the run is whole in its last checkpoint: the same command again makes the result of it")
        raise
    if config.method.save_merged:
        out = Path(config.out)
        proof = merge(begun.base, out / "adapter", out / "model", to="hf", overwrite=True, greedy=0, watch=watch)
        if not proof.passed:
            raise CheckpointError(
                "the merged model drifts too far from base and adapter: herd merge says how far", path=out / "model"
            )
        tell(f"merged model written to {out / 'model'}")


def settle(config: RunConfig) -> None:
    """The process as the run wants it: its threads, and on a CPU memory that is kept between steps. Raises ConfigError."""
    device = device_of(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    if config.train.exact_accumulation:
        exact_on(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
