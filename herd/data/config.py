"""What a run is told about its data: sources, their shares over the run, rows and packing. Plain values, no torch.

`herd.data.open.open_data` makes a loader of it; `herd.train.config` puts it into a run's file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, get_args

from herd.errors import ConfigError

__all__ = ["DataPart", "Kind", "LongRows", "PackKind", "SourcePart", "StagePart"]

Kind = Literal["text", "messages", "sharegpt", "alpaca", "completion"]
"""Kinds of rows (`herd.data.adapt`) that a next-token objective learns from."""

PackKind = Literal["best-fit", "concat", "none"]
"""best-fit: whole documents, each row as full as it goes. concat: text back to back, cut where a row ends, conversations as in
best-fit. none: one document a row, padded."""

LongRows = Literal["stop", "skip"]
"""Conversations longer than a row: refused by name, or left out, counted and named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcePart:
    """Rows of one origin. Raises ConfigError for values out of range."""

    path: str
    """A file, a folder or a glob of rows (jsonl, jsonl.gz, jsonl.zst, parquet, text)."""

    name: str = ""
    """What stages and reports call it. Empty: the last part of the path without its endings."""

    weight: float = 1.0
    """Its share of the rows of the run, relative to the other sources. 0 leaves it to the stages that name it."""

    kind: Kind | None = None
    """What its rows are, one of text, messages, sharegpt, alpaca, completion. None: found out from each file, and said."""

    max_epochs: float | None = None
    """How often the run may read it before that is said aloud. None: once."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("data.sources: a source needs a path")
        if not self.name:
            last = PurePath(self.path).name or self.path
            object.__setattr__(self, "name", re.sub(r"(\.(jsonl|json|txt|md|parquet|gz|zst))+$", "", last) or last)
        where = f"data.sources, {self.name}"
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"{where}: weight is {self.weight}; a share is 0 or more")
        if self.kind is not None and self.kind not in get_args(Kind):
            raise ConfigError(f"{where}: kind is {self.kind!r}; choose one of {', '.join(get_args(Kind))}")
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ConfigError(f"{where}: max_epochs is {self.max_epochs}; it must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePart:
    """A stretch of the run with shares of its own: a step of a curriculum, or an annealing phase."""

    until: float
    """The share of the budget at which it ends, above 0 and at most 1. The first stage begins at 0, the last ends at 1."""

    weights: dict[str, float]
    """The share of each source, by its name. A source that is not named has none in this stage."""

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ConfigError(f"data.stages: until is {self.until}; it is a share of the budget, above 0 and at most 1")
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ConfigError(f"data.stages until {self.until}: the weight of {name} is {weight}; use 0 or more")
        if not any(self.weights.values()):
            raise ConfigError(f"data.stages until {self.until}: no source has a weight above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataPart:
    """The data of a run. Raises ConfigError for values out of range or names that are not there."""

    sources: tuple[SourcePart, ...]
    """What is read."""

    stages: tuple[StagePart, ...] = ()
    """Stretches of the run with shares of their own. Empty: the weights of the sources hold from start to end."""

    length: int = 2048
    """S, the positions of a row."""

    rows: int = 1
    """Rows of one micro-batch of one rank."""

    pack: PackKind = "best-fit"
    """How documents become rows. best-fit: whole documents, rows as full as they go. concat: text back to back, cut where a
    row ends; conversations as in best-fit. none: one document a row, padded."""

    chat_format: str | None = None
    """The prompt format of conversations. None: the model's own."""

    bad_rows: Literal["stop", "skip"] = "stop"
    """Stop at the first row that cannot be used, or skip such rows, counted and named."""

    long_rows: LongRows = "stop"
    """What conversations and completions longer than a row do: stop the run, or skip (counted and named). Text is split."""

    held_out: str | None = None
    """For evaluation: a file, folder or glob, or a share as "1%" (documents kept from training in every source)."""

    shards: str | None = None
    """The folder of tokenized files. None: `data` in herd's cache folder."""

    seed: int = 0
    """Of the order of rows."""

    workers: int = 1
    """Threads that prepare batches ahead of the model. 0: batches are made when they are asked for. The order is the same."""

    processes: int | None = None
    """Processes that tokenize. None: one per core."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data.sources is empty: name at least one file")
        names = [source.name for source in self.sources]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"data.sources: two sources are called {twice}; give one of them another name")
        if not self.stages and not any(source.weight for source in self.sources):
            raise ConfigError("data.sources: every weight is 0, so there is nothing to draw")
        for key, value, least in (("length", self.length, 2), ("rows", self.rows, 1), ("seed", self.seed, 0)):
            if value < least:
                raise ConfigError(f"data.{key} is {value}; it must be at least {least}")
        for key, value, known in (
            ("pack", self.pack, get_args(PackKind)),
            ("bad_rows", self.bad_rows, ("stop", "skip")),
            ("long_rows", self.long_rows, get_args(LongRows)),
        ):
            if value not in known:
                raise ConfigError(f"data.{key} is {value!r}; choose one of {', '.join(known)}")
        if self.workers < 0 or (self.processes is not None and self.processes < 1):
            raise ConfigError(f"data: workers {self.workers}, processes {self.processes}: use 0 or more, and 1 or more")
        self._check_stages(names)
        _ = self.held_out_share

    def _check_stages(self, names: list[str]) -> None:
        before = 0.0
        for stage in self.stages:
            if stage.until <= before:
                raise ConfigError(f"data.stages: until {stage.until} comes after {before}; stages follow each other")
            before = stage.until
            if unknown := [name for name in stage.weights if name not in names]:
                raise ConfigError(f"data.stages: there is no source {unknown[0]}; the sources are {', '.join(names)}")
        if self.stages and before != 1:
            raise ConfigError(f"data.stages end at {before} of the budget; the last one ends at 1")

    @property
    def held_out_share(self) -> float | None:
        """The share of documents kept from training, when `held_out` is one ("1%"); None when it is a path or nothing."""
        return None if self.held_out is None else _share(self.held_out)


def _share(text: str) -> float | None:
    """0.01 of "1%"; None for a path."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None:
        if re.fullmatch(r"\s*\d*\.?\d+\s*", text):
            raise ConfigError(f"data.held_out is {text}: a share has a percent sign, as in 2%, and a file has a name")
        return None
    share = float(match[1]) / 100
    if not 0 < share < 0.5:
        raise ConfigError(f"data.held_out is {text}; keep between 0 % and 50 % from training")
    return share
