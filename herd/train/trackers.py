"""Trackers that are packages of their own: trackio, Weights & Biases, MLflow. Imported when a run names them in `report.to`.

A run that goes on from a checkpoint goes on in the tracker, too: what names it there is kept in `report.json` of the run's
folder. Trackers only add: steps that were lost with a kill and done again stay in their history; `log.jsonl` is what holds.
One that cannot begin is an error before the first step; one that fails later is told and the run goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from herd.errors import ConfigError
from herd.files import read_json
from herd.train.config import ReportPart, RunConfig
from herd.train.metrics import LOG, Figures, tags
from herd.train.typed import plain
from herd.train.watch import Begin, Silent, StepReport, Watcher

__all__ = ["Mlflow", "Trackio", "Wandb", "check_trackers", "trackers_of"]


class _Tracker(Silent):
    """What they share: the package, the run's name, where it goes on."""

    package = ""

    def __init__(self, config: RunConfig, out: Path, figures: Figures) -> None:
        self.config, self.figures = config, figures
        self.name = config.report.name or out.resolve().name
        self.kept = out / "report.json"
        self.api: Any = _imported(self.package)

    @property
    def project(self) -> str:
        return self.config.report.project

    def _remembered(self) -> str | None:
        known = read_json(self.kept) if self.kept.exists() else {}
        return known.get(self.package)

    def _remember(self, name: str) -> None:
        known = read_json(self.kept) if self.kept.exists() else {}
        partial = self.kept.with_name(".report.json.new")
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({**known, self.package: name}), encoding="utf-8")
        os.replace(partial, self.kept)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def on_step(self, report: StepReport) -> None:
        self._log(report.step, tags(report, self.figures.of(report)))

    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self._log(step, {f"eval/{name}": value for name, value in figures.items()})


class Trackio(_Tracker):
    """https://pypi.org/project/trackio: a local dashboard with the words of wandb."""

    package = "trackio"

    def on_begin(self, info: Begin) -> None:
        self.api.init(
            project=self.project, name=self.name, config=plain(self.config), resume="allow" if info.step else "never"
        )

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self.api.log(dict(values), step=step)

    def on_end(self, figures: Mapping[str, float]) -> None:
        self.api.finish()


class Wandb(_Tracker):
    """https://pypi.org/project/wandb. Its own environment says where to (WANDB_MODE=offline keeps everything here)."""

    package = "wandb"
    run: Any = None

    def on_begin(self, info: Begin) -> None:
        self.run = self.api.init(
            project=self.project,
            name=self.name,
            dir=str(self.kept.parent),
            config=plain(self.config),
            id=self._remembered() if info.step else None,
            resume="allow",
        )
        self._remember(self.run.id)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def on_text(self, step: int, prompt: str, reply: str) -> None:
        self.run.log({f"samples/{prompt[:60]}": self.api.Html(f"<pre>{_escaped(reply)}</pre>")}, step=step)

    def on_end(self, figures: Mapping[str, float]) -> None:
        self.run.finish()


class Mlflow(_Tracker):
    """https://pypi.org/project/mlflow. MLFLOW_TRACKING_URI says where to."""

    package = "mlflow"

    def on_begin(self, info: Begin) -> None:
        self.api.set_experiment(self.project)
        before = self._remembered() if info.step else None
        run = self.api.start_run(run_id=before) if before else self.api.start_run(run_name=self.name)
        self._remember(run.info.run_id)
        if before is None:
            flat = dict(_flat(plain(self.config)))
            self.api.log_params({key: str(value)[:500] for key, value in flat.items()})

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self.api.log_metrics(dict(values), step=step)

    def on_text(self, step: int, prompt: str, reply: str) -> None:
        self.api.log_text(f"{prompt}\n\n{reply}\n", f"samples/step-{step:08d}-{zlib.crc32(prompt.encode()):08x}.txt")

    def on_end(self, figures: Mapping[str, float]) -> None:
        self.api.end_run()


class _Patient(Silent):
    """A tracker whose failures do not end a run that has begun: the first is told when it happens, their number at the end."""

    def __init__(self, tracker: _Tracker, tell: Callable[[str], None]) -> None:
        self.tracker, self.tell = tracker, tell
        self.asked = self.failed = 0

    def on_begin(self, info: Begin) -> None:
        try:
            self.tracker.on_begin(info)
        except Exception as error:
            name = self.tracker.package
            raise ConfigError(
                f"report.to: {name} cannot begin: {_line(error)}. Repair what it says, or take {name} out of report.to"
            ) from error

    def on_step(self, report: StepReport) -> None:
        self._ask(self.tracker.on_step, report)

    def on_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        self._ask(self.tracker.on_evaluation, step, figures)

    def on_text(self, step: int, prompt: str, reply: str) -> None:
        self._ask(self.tracker.on_text, step, prompt, reply)

    def on_note(self, text: str) -> None:
        self._ask(self.tracker.on_note, text)

    def on_end(self, figures: Mapping[str, float]) -> None:
        self._ask(self.tracker.on_end, figures)
        if self.failed:
            self.tell(
                f"{self.tracker.package} did not take {self.failed} of {self.asked} reports: {LOG} has all of them"
            )

    def _ask(self, call: Callable[..., None], *given: Any) -> None:
        self.asked += 1
        try:
            call(*given)
        except Exception as error:
            self.failed += 1
            if self.failed == 1:
                self.tell(
                    f"{self.tracker.package} did not take a report ({_line(error)}): the run goes on, {LOG} has all"
                )


TRACKERS: dict[str, type[_Tracker]] = {"trackio": Trackio, "wandb": Wandb, "mlflow": Mlflow}


def trackers_of(config: RunConfig, out: Path, figures: Figures, tell: Callable[[str], None]) -> Sequence[Watcher]:
    """The trackers that `report.to` names; `tell` is told what they do not take. Raises ConfigError for one whose package is not
    installed."""
    return [_Patient(TRACKERS[name](config, out, figures), tell) for name in config.report.to]


def check_trackers(report: ReportPart) -> None:
    """Raises ConfigError for a tracker whose package is not installed, before anything is loaded."""
    for name in report.to:
        if importlib.util.find_spec(name) is None:
            raise _missing(name)


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise _missing(package) from error


def _missing(package: str) -> ConfigError:
    return ConfigError(
        f'report.to: {package} is not installed: pip install "herd[{package}]", or take it out of report.to'
    )


def _line(error: Exception) -> str:
    """What another package says may have many lines, and links."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(" .")


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(prefix, value)]
    return [item for key, inner in value.items() for item in _flat(inner, f"{prefix}.{key}" if prefix else key)]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
