"""The data of a run, from its description to a loader: what recipes call.

Files are tokenized once (`herd.data.build`), documents arranged in rows (`herd.data.arrange`), sources mixed
(`herd.data.mix`), batches drawn (`herd.data.batch`). Everything that happened to rows on the way is in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from herd.chat.base import BaseFormat
from herd.chat.format import ChatFormat
from herd.chat.formats import format_named
from herd.data.arrange import Arranged, Arrangement, arrange
from herd.data.batch import Loader
from herd.data.build import Build, Built, Progress, shards_folder
from herd.data.config import DataPart, SourcePart
from herd.data.files import find_files
from herd.data.heldout import HeldOut
from herd.data.mix import Mixture, MixtureSource
from herd.data.report import RowReport, counted
from herd.data.shards import Documents
from herd.data.tokenworker import Encoder
from herd.errors import DataError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["DataReport", "SourceReport", "open_data"]

SHOWN = 5
"""Rows that a line of the report names."""


@dataclass(slots=True)
class SourceReport:
    """One source: its files and their kinds, what reading did, and what became of its documents.

    share: of the rows of the run (of the last stage, when stages differ: see `DataReport.shares`). epochs: how often the run
    will read it, when its length is known, and `often` that this is more than was asked for. padding: share of
    positions that hold nothing.
    """

    name: str
    kinds: tuple[str, ...]
    files: int
    documents: int
    tokens: int
    learned: int
    rows: int
    padding: float
    split: int
    too_long: int
    held_out: int
    reading: RowReport
    named: tuple[str, ...] = ()
    epochs: float | None = None
    often: str = ""

    def lines(self) -> list[str]:
        """For people."""
        kinds = "/".join(self.kinds)
        size = f"{counted(self.documents, 'document')}, {self.tokens:,} tokens ({self.learned / max(1, self.tokens):.0%} learned)"
        lines = [f"{self.name}: {kinds}, {size}, {counted(self.rows, 'row')} with {self.padding:.1%} padding"]
        if self.epochs is not None:
            lines[0] += f", read {self.epochs:.2f} times{self.often}"
        if self.split:
            lines.append(f"{self.name}: {_documents(self.split)} longer than a row and split over several")
        if self.too_long:
            lines.append(
                f"{self.name}: {_documents(self.too_long)} longer than a row and left out: {_some(self.named, self.too_long)}"
            )
        if self.held_out:
            lines.append(f"{self.name}: {_documents(self.held_out)} held out for evaluation")
        if self.reading.bad_count:
            bad = [str(row) for row in self.reading.bad[:SHOWN]]
            lines.append(
                f"{self.name}: {counted(self.reading.bad_count, 'row')} left out as bad: {_some(bad, self.reading.bad_count)}"
            )
        lines += [
            f"{self.name}: {counted(count, 'row')} changed: {what}"
            for what, count in sorted(self.reading.changed.items())
        ]
        return lines


def _documents(count: int) -> str:
    return "1 document is" if count == 1 else f"{count:,} documents are"


def _some(named: Sequence[str], count: int) -> str:
    return "; ".join(named) + ("; ..." if count > len(named) else "")


@dataclass(slots=True)
class DataReport:
    """What a run's data is. `content` is one SHA-256 for all that the order and the rows depend on."""

    sources: list[SourceReport]
    content: str
    held_out: tuple[int, int] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of all sources, once."""
        return sum(source.tokens for source in self.sources)

    def lines(self) -> list[str]:
        """For people: what is read, and what happened to rows on the way."""
        lines = [line for source in self.sources for line in source.lines()]
        if self.held_out is not None:
            lines.append(f"held out: {counted(self.held_out[0], 'document')} in {counted(self.held_out[1], 'row')}")
        return lines + self.notes


def open_data(
    config: DataPart,
    tokenizer: Tokenizer,
    format: ChatFormat | None = None,
    rank: int = 0,
    world: int = 1,
    *,
    total: int | None = None,
    tick: Callable[[Progress], None] = lambda progress: None,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[Loader, HeldOut | None, DataReport]:
    """The loader of rank `rank` of `world`, what is held out, and a report.

    `format` is the model's prompt format; `config.chat_format` overrules it. `total` counts the rows that all ranks together
    will draw in the whole run, when that is known: stages then begin at fixed rows, and the report says how often each source is
    read. Without it `Loader.advance` has to be called. `tick` is told how far tokenizing is, `tell` what happens meanwhile.

    Every rank may call this at the same time: one builds the shards, the others wait. Raises DataError for data that cannot
    be used, naming rows, and PromptError for a prompt format that the vocabulary cannot write.
    """
    if config.chat_format is not None:
        format = format_named(config.chat_format, tokenizer)
    if isinstance(format, BaseFormat):
        format = None  # it writes no conversations: one among the rows is then no bad row, but asks for a format
    root = Path(config.shards).expanduser() if config.shards is not None else shards_folder()
    build = Build(
        root, Encoder(tokenizer, format), bad=config.bad_rows, processes=config.processes, tick=tick, tell=tell
    )
    notes: list[str] = []
    parts = list(config.sources)
    share = config.held_out_share
    if config.held_out is not None and share is None:
        parts.append(SourcePart(path=config.held_out, name="held out"))
    files = [find_files(part.path, notes.append) for part in parts]
    built = iter(build([(file, part.kind) for part, found in zip(parts, files, strict=True) for file in found]))
    made = [[next(built) for _ in found] for found in files]
    pad = tokenizer.special.pad if tokenizer.special.pad is not None else tokenizer.special.eos
    documents = [Documents([shard for one in ones for shard in one.open()]) for ones in made]
    for part, ones, found in zip(parts, made, documents, strict=True):
        if not len(found):
            shown = [str(row) for one in ones for row in one.report.bad[:SHOWN]]
            raise DataError(
                f"{part.path}: none of the rows can be used: {_some(shown[:SHOWN], sum(o.report.bad_count for o in ones))}"
            )

    count = len(config.sources)
    how = Arrangement(config.length, config.pack, config.long_rows, share or 0.0)
    arranged = [arrange(found, how, pad, root) for found in documents[:count]]
    mixture = Mixture(
        [
            MixtureSource(part.name, rows.rows, part.weight, part.max_epochs)
            for part, rows in zip(config.sources, arranged, strict=True)
        ],
        seed=config.seed,
        stages=config.stages,
        total=total,
    )
    report = DataReport(
        [_told(part.name, ones, rows) for part, ones, rows in zip(config.sources, made[:count], arranged, strict=True)],
        mixture.content,
        notes=notes,
    )
    if total is not None:
        _tell_epochs(report, mixture, total)
    held_out = None
    if config.held_out is not None:
        held_out = _held_out(config, documents, pad, root, tokenizer, report)
    loader = Loader(mixture, config.rows, rank=rank, world=world, workers=config.workers)
    return loader, held_out, report


def _told(name: str, ones: Sequence[Built], rows: Arranged) -> SourceReport:
    reading = RowReport()
    for one in ones:
        reading.add(one.report)
    return SourceReport(
        name=name,
        kinds=tuple(sorted({str(one.kind) for one in ones if one.documents})),
        files=len(ones),
        documents=sum(one.documents for one in ones),
        tokens=sum(one.tokens for one in ones),
        learned=sum(one.learned for one in ones),
        rows=len(rows.rows),
        padding=rows.padding,
        split=rows.split,
        too_long=rows.too_long,
        held_out=rows.held_out,
        named=rows.named,
        reading=reading,
    )


def _tell_epochs(report: DataReport, mixture: Mixture, total: int) -> None:
    epochs = mixture.epochs(total, mixture.starts)
    for told, source in zip(report.sources, mixture.sources, strict=True):
        told.epochs = epochs.get(source.name, 0.0)
        most = 1.0 if source.max_epochs is None else source.max_epochs
        if told.epochs > most:
            asked = f"max_epochs is {most:g}" if source.max_epochs is not None else "max_epochs says how often is fine"
            told.often = f" ({asked})"


def _held_out(
    config: DataPart, documents: Sequence[Documents], pad: int, root: Path, tokenizer: Tokenizer, report: DataReport
) -> HeldOut | None:
    """The documents for evaluation; says when there are none, or some of them are trained on."""
    share = config.held_out_share
    if share is not None:
        how = Arrangement(config.length, config.pack, config.long_rows, share, inverse=True)
        arranged = [arrange(found, how, pad, root) for found in documents]
        names = [part.name for part in config.sources]
        count = sum(len(one.rows.chosen) for one in arranged)
    else:
        how = Arrangement(config.length, config.pack, config.long_rows)
        arranged, names = [arrange(documents[-1], how, pad, root)], [str(config.held_out)]
        marks = documents[-1].marks()
        count = len(marks)
        for part, found in zip(config.sources, documents, strict=False):
            if both := int(np.isin(marks, found.marks()).sum()):
                report.notes.append(
                    f"held out: {both:,} of its {count:,} documents are in {part.name}, too, and trained on"
                )
    if not count:
        report.notes.append(
            f"held out: {config.held_out} of {sum(map(len, documents)):,} documents are none, so nothing is held out and "
            "measured; hold out a larger share"
        )
        return None
    report.held_out = sum(len(one.rows.chosen) for one in arranged), sum(len(one.rows) for one in arranged)
    if left := sum(one.too_long for one in arranged):
        report.notes.append(f"held out: {_documents(left)} longer than a row and left out")
    return HeldOut([one.rows for one in arranged], tokenizer, names, config.rows)
