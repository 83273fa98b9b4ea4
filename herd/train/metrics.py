"""Watchers that keep what a run tells: `log.jsonl` and TensorBoard's files, always; trackers are in `herd.train.trackers`.

`log.jsonl` has one object a line, with `event` (begin, step, evaluation, text, note, end), `step` and `time` (since 1970).
Lines of steps are `StepReport` with three figures more: tokens_per_second, mfu and mfu_attention (shares of the peak, by the
two countings of `herd.train.throughput`; null where the device's peak is not known). A run that goes on from a checkpoint
first drops the lines of steps that it will do again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from herd.train.events import EventFile
from herd.train.stop import SaveError
from herd.train.throughput import Peak, Work
from herd.train.typed import plain
from herd.train.watch import Begin, Silent, StepReport

__all__ = ["LOG", "Board", "Figures", "JsonLines", "kept", "read_log", "tags"]

LOG = "log.jsonl"


@contextlib.contextmanager
def kept(path: Path) -> Iterator[None]:
    """A file beside the checkpoints that cannot be written, on a full disk for example, ends the run as they do: SaveError."""
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"cannot be written: {error.strerror or error}. The last checkpoint is whole: make room or repair it, then go on "
            "with --resume auto",
            path=path,
        ) from error


@dataclass(frozen=True, slots=True)
class Figures:
    """What turns a step's counts into speeds: work of a token, peak of one device, devices."""

    work: Work
    peak: Peak | None
    world: int = 1

    def of(self, report: StepReport) -> dict[str, float | None]:
        """tokens_per_second, mfu (weights), mfu_attention (weights and causal attention) of one step."""
        speed = report.tokens / max(report.seconds, 1e-9)
        if self.peak is None:
            return {"tokens_per_second": speed, "mfu": None, "mfu_attention": None}
        peak = self.peak.flops * self.world
        return {
            "tokens_per_second": speed,
            "mfu": speed * self.work.weights / peak,
            "mfu_attention": speed * self.work.attention / peak,
        }


def tags(report: StepReport, figures: Mapping[str, float | None]) -> dict[str, float]:
    """A step under the names that dashboards expect (train/loss, train/grad_norm, train/learning_rate, ...)."""
    named: dict[str, float | None] = {
        "train/loss": report.loss,
        "train/grad_norm": report.norm,
        "train/learning_rate": report.rate,
        "train/tokens": float(report.all_tokens),
        "train/supervised_tokens": float(report.supervised),
        "train/tokens_per_second": figures["tokens_per_second"],
        "train/mfu": figures["mfu"],
        "train/mfu_attention": figures["mfu_attention"],
        "train/memory_gb": report.memory_bytes / 1e9,
        **{f"train/{name}": value for name, value in report.metrics.items()},
    }
    return {name: value for name, value in named.items() if value is not None}


class JsonLines(Silent):
    """Writes `log.jsonl` in the run's folder, each line at once. Raises SaveError."""

    def __init__(self, path: Path, figures: Figures) -> None:
        self.path, self.figures = path, figures
        self._step = 0

    def on_begin(self, info: Begin) -> None:
        with kept(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                _keep(self.path, info.step)
        self._step = info.step
        peak = self.figures.peak
        facts = {
            "tokens": info.tokens,
            "seconds": info.seconds,
            "parameters": info.parameters,
            "trained": info.trained,
            "resumed": None if info.resumed is None else str(info.resumed),
            "world": info.world,
            "threads": info.threads,
            "flops_per_token": asdict(self.figures.work),
            "peak_flops": None if peak is None else peak.flops,
            "peak_source": None if peak is None else peak.source,
            "config": plain(info.config),
        }
        self._line("begin", facts)

    def on_step(self, report: StepReport) -> None:
        self._step = report.step
        self._line("step", asdict(replace(report, metrics=dict(report.metrics))) | self.figures.of(report))

    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self._line("evaluation", {"step": step, "figures": dict(figures)})

    def on_text(self, step: int, prompt: str, reply: str) -> None:
        self._line("text", {"step": step, "prompt": prompt, "reply": reply})

    def on_note(self, text: str) -> None:
        self._line("note", {"text": text})

    def on_end(self, figures: Mapping[str, float]) -> None:
        self._line("end", {"figures": dict(figures)})

    def _line(self, event: str, facts: Mapping[str, Any]) -> None:
        line = {"event": event, "step": self._step, "time": round(time.time(), 3), **facts}
        with kept(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), ensure_ascii=False) + "\n")


class Board(Silent):
    """Writes TensorBoard's files into `folder`: scalars of steps and evaluations, and samples as texts. Raises SaveError."""

    def __init__(self, folder: Path, figures: Figures) -> None:
        self.folder, self.figures = folder, figures
        self._file: EventFile | None = None

    def on_begin(self, info: Begin) -> None:
        with kept(self.folder):
            self._file = EventFile(self.folder, info.step)

    def on_step(self, report: StepReport) -> None:
        assert self._file is not None
        with kept(self.folder):
            self._file.scalars(report.step, tags(report, self.figures.of(report)))

    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        assert self._file is not None
        with kept(self.folder):
            self._file.scalars(step, {f"eval/{name}": value for name, value in figures.items()})

    def on_text(self, step: int, prompt: str, reply: str) -> None:
        assert self._file is not None
        quoted = "\n".join("    " + line for line in reply.splitlines())
        with kept(self.folder):
            self._file.text(step, f"samples/{prompt[:60]}", f"**{prompt}**\n\n{quoted}")


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log as they are now. A last line that is only half written, by a run that was killed, ends it."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                return
            if isinstance(value, dict):
                yield value


def _keep(path: Path, step: int) -> None:
    """Drop the lines of steps after `step` in place: whole or not at all."""
    kept = [line for line in read_log(path) if line.get("step", 0) <= step and line.get("event") != "end"]
    partial = path.with_name(f".{path.name}.new")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    os.replace(partial, path)


def _finite(value: Any) -> Any:
    """JSON has no NaN: such numbers become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
