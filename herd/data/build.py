"""Source files to shards: in parallel, once, resumable, the same bytes however many work on it. No torch.

    SHARDS/<name>-<key>/00000.rows, 00001.rows, ...     documents of up to SHARD_ROWS rows or SHARD_CHARACTERS characters
    SHARDS/<name>-<key>/index.json                      what the folder holds; written last

The key stands for everything that can change the tokens: the content of the file, the kind of its rows, the vocabulary, the
prompt format, and the version of this module. A changed file gets a new folder; an unchanged one is found again, wherever
it was moved to. The rows of a shard depend on the rows of its file alone, so a run that was killed goes on with the shards that
are missing, and parts of a file can be built on different machines.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from herd.data.adapt import kind_of
from herd.data.content import contents as contents_of
from herd.data.content import stat_of, write_json
from herd.data.fingerprint import format_fingerprint, tokenizer_fingerprint
from herd.data.kinds import Kind, one_kind
from herd.data.read import Row, read_file
from herd.data.report import BadRow, BadRows, RowReport
from herd.data.shards import Shard, Tokenized, write_shard
from herd.data.tokenworker import Encoder, Job, Outcome, in_order
from herd.errors import CheckpointError, DataError
from herd.files import read_json
from herd.hub.lock import locked

__all__ = ["Build", "Built", "Part", "Progress", "ShardSize", "shards_folder"]

FORMAT = 1
"""Raised whenever the same rows would give other shards."""

ABANDONED = 600.0
"""Seconds after which a half-written file is nobody's: writing a shard takes less than one."""

SMALL = 1 << 20
"""Bytes of sources below which starting processes costs more than it brings."""


@dataclass(frozen=True, slots=True)
class ShardSize:
    """Where a shard ends: after `rows` rows, or the row with which its texts reach `characters`. A job is a part of a shard."""

    rows: int = 1 << 16
    characters: int = 1 << 26
    job_rows: int = 256
    job_characters: int = 1 << 18


@dataclass(frozen=True, slots=True)
class Part:
    """One of `of` machines that build together; `number` counts from 1.

    With at least as many files as machines, each takes whole files and reads no other; otherwise each reads all and takes every
    n-th shard of every file.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise DataError(f"part {self.number}/{self.of}: the first number is between 1 and the second")

    def whole(self, files: int) -> bool:
        """Whether the parts of so many files are whole files."""
        return files >= self.of

    def has(self, number: int) -> bool:
        """Whether the file or shard of that number, from 0, is this part's."""
        return number % self.of == self.number - 1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a build is: bytes of the sources that were read, of how many; documents and tokens made by this run so far."""

    doing: str
    done: int
    total: int
    documents: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Built:
    """One source file as shards, of a `kind` that the caller named or that was `recognised`. `report` is what reading it did,
    `made` how many shards this run wrote.

    `missing` names shards that other parts have to make; then there is no index yet, and the rest may not be used.
    """

    file: Path
    folder: Path
    kind: Kind
    recognised: bool = False
    shards: list[Path] = field(default_factory=list)
    contents: list[str] = field(default_factory=list)
    report: RowReport = field(default_factory=RowReport)
    documents: int = 0
    tokens: int = 0
    learned: int = 0
    made: int = 0
    missing: list[str] = field(default_factory=list)

    def open(self) -> list[Shard]:
        """The shards, mapped. Raises DataError for one that is damaged, or not the one that the index names."""
        opened = [Shard(path, str(self.file)) for path in self.shards]
        for shard, content in zip(opened, self.contents, strict=True):
            if shard.file.content != content:
                raise DataError(
                    f"{shard.path}: is not the shard that index.json names; delete the folder and build it again"
                )
        return opened


def shards_folder() -> Path:
    """Where shards are kept by default: `herd/data` in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "herd" / "data"


class Build:
    """Makes the shards of files in the folder `root`; `processes` tokenize (None: one per core).

    `tick` is told how far it is, `tell` what a person should know. `check` reads every byte of the shards that are there, and
    makes those again that are damaged. `joining` only writes the indexes of files whose shards other parts have made; what is
    missing is then a DataError.
    """

    def __init__(
        self,
        root: Path,
        encoder: Encoder,
        *,
        bad: BadRows = "stop",
        processes: int | None = None,
        part: Part | None = None,
        size: ShardSize | None = None,
        joining: bool = False,
        check: bool = False,
        tick: Callable[[Progress], None] = lambda progress: None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.root, self.encoder, self.check = root, encoder, check
        self.bad: BadRows = bad
        self.joining = joining
        self.processes = processes or _cores()
        self.part, self.size = part or Part(), size or ShardSize()
        self.tick, self.tell = tick, tell
        self._made_with = {
            "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
            "prompt_format": format_fingerprint(encoder.format),
        }
        self._documents = self._tokens = 0
        self._behind = self._sum = 0

    def __call__(self, files: Sequence[tuple[Path, Kind | None]]) -> list[Built]:
        """The shards of `files`, each with the kind of its rows (None: recognised), in that order.

        Bad rows raise DataError with their `file:line`, or are entered in the reports (`bad="skip"`). Files of which no row at
        all can be used raise DataError either way, and so do rows of another kind where it was recognised. A part of whole files
        gives only its own.
        """
        by_shards = not self.part.whole(len(files))
        if not by_shards and not self.joining:
            files = [file for number, file in enumerate(files) if self.part.has(number)]
        contents = contents_of(
            [file for file, _ in files],
            self.root / "contents",
            lambda done, total: self.tick(Progress("reading", done, total)),
        )
        # A file without a row that can be read has no kind: reading it says what is wrong with it.
        kinds: list[Kind] = [kind or kind_of(file) or "text" for file, kind in files]
        built = [
            Built(file, self.root / _folder_name(file, self._key(content, kind)), kind, named is None)
            for (file, named), content, kind in zip(files, contents, kinds, strict=True)
        ]
        todo = [i for i, one in enumerate(built) if not self._finished(one)]
        if todo:
            with self._alone(built):
                todo = [i for i in todo if not self._finished(built[i])]
                self._make(built, todo, self.part if by_shards else Part())
        for one in built:
            _check_kind(one, ((row.line, row.reason) for row in one.report.bad))
            if self.bad == "stop" and one.report.bad_count:
                raise DataError(
                    f"{one.report.bad[0]} ({one.report.bad_count} such rows; bad rows can be skipped: bad_rows: skip)"
                )
        if built and self.part.of == 1 and not any(one.missing or one.documents for one in built):
            shown = "\n  ".join([str(row) for one in built for row in one.report.bad[:5]][:5])
            raise DataError(f"{_named(built)}: none of the rows can be used" + (f":\n  {shown}" if shown else ""))
        return built

    @contextmanager
    def _alone(self, built: Sequence[Built]) -> Iterator[None]:
        """Only one process at a time builds these files: of the ranks of a run, one builds and the others find it done."""
        name = sha256(" ".join(sorted({one.folder.name for one in built})).encode()).hexdigest()[:20]
        lock = self.root / "locks" / f"{name}.{self.part.number}-{self.part.of}"
        with ExitStack() as held:
            try:
                held.enter_context(
                    locked(lock, time.sleep, lambda: self.tell("waiting: another process tokenizes these files"))
                )
            except OSError as error:
                raise DataError(f"{self.root}: shards cannot be written here: {error.strerror or error}") from error
            yield

    def _key(self, content: str, kind: Kind) -> str:
        size = self.size
        made = {
            **self._made_with,
            "format": FORMAT,
            "content": content,
            "kind": kind,
            "size": [size.rows, size.characters],
        }
        if kind == "text":
            del made["prompt_format"]
        return sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:20]

    def _finished(self, one: Built) -> bool:
        """Whether all shards of a file are there; fills in what the index says of them."""
        try:
            index = read_json(one.folder / "index.json")
        except CheckpointError:
            return False
        try:
            one.shards = [one.folder / str(shard["name"]) for shard in index["shards"]]
            one.contents = [str(shard["content"]) for shard in index["shards"]]
            one.documents, one.tokens, one.learned = (int(index[key]) for key in ("documents", "tokens", "learned"))
            one.report = _report(index["report"], one.file)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{one.folder / 'index.json'}: is not as it was written ({error!r}); delete the folder"
            ) from error
        named = zip(one.shards, one.contents, strict=True)
        # All of them: each damaged one is said.
        whole = [self._whole(shard, one.file, content) for shard, content in named]
        return all(whole)

    def _whole(self, path: Path, file: Path, content: str | None = None) -> bool:
        """Whether a shard is there and undamaged (as far as `check` looks). A damaged one is said and removed."""
        if not path.exists():
            return False
        try:
            shard = Shard(path, str(file))
            if self.check:
                shard.file.verify()
            if content is not None and shard.file.content != content:
                raise DataError(f"{path}: is not the shard that index.json names")
        except DataError as error:
            self.tell(f"{error}: it is built again")
            path.unlink(missing_ok=True)
            return False
        return True

    def _make(self, built: Sequence[Built], todo: Sequence[int], part: Part) -> None:
        """Tokenize what is missing of the shards that are `part`'s of the files `todo`."""
        sizes = {i: stat_of(built[i].file).st_size for i in todo}
        self._behind, self._sum = 0, sum(sizes.values())
        ends: dict[int, tuple[int, RowReport]] = {}  # of files that were read to the end: shards, report
        begun: tuple[int, int] | None = None
        parts: list[Outcome] = []
        processes = 1 if self._sum < SMALL else self.processes
        for outcome in in_order(self.encoder, self._jobs(built, todo, part, sizes, ends), processes):
            if outcome.tag != begun:
                self._close(built, begun, parts)
                begun, parts = outcome.tag, []
            one = built[outcome.tag[0]]
            if outcome.bad and self.bad == "stop":
                line, why = outcome.bad[0]
                raise DataError(f"{one.file}:{line}: {(one_kind(why) if one.recognised else None) or why}")
            _check_kind(one, outcome.bad)
            parts.append(outcome)
            self._documents += len(outcome.documents.sizes)
            self._tokens += len(outcome.documents.tokens)
            self.tick(Progress("tokenizing", self._behind, self._sum, self._documents, self._tokens))
        self._close(built, begun, parts)
        self.tick(Progress("tokenizing", self._sum, self._sum, self._documents, self._tokens))
        for i in todo:
            self._finish(built[i], *ends[i])

    def _jobs(
        self,
        built: Sequence[Built],
        todo: Sequence[int],
        part: Part,
        sizes: Mapping[int, int],
        ends: dict[int, tuple[int, RowReport]],
    ) -> Iterator[Job]:
        """The rows of all shards that are missing and the part's, in order."""
        done = 0
        for i in todo:
            one, report, number = built[i], RowReport(), 0
            before = done
            rows = read_file(one.file, report, bad=self.bad, at=partial(self._is_at, before))
            while (row := next(rows, None)) is not None:
                wanted = part.has(number) and not self._whole(self._path(one, number), one.file)
                wanted = wanted and not self.joining
                for batch in self._batches(chain([row], rows)):
                    if wanted:
                        yield Job((i, number), one.kind, batch)
                number += 1
            done = before + sizes[i]
            self._behind = done
            ends[i] = number, report

    def _is_at(self, before: int, position: int) -> None:
        self._behind = before + position

    def _batches(self, rows: Iterator[Row]) -> Iterator[list[Row]]:
        """Rows up to the end of a shard, in jobs."""
        size = self.size
        batch: list[Row] = []
        count = characters = held = 0
        for row in rows:
            weight = _characters(row.fields)
            batch.append(row)
            count, characters, held = count + 1, characters + weight, held + weight
            last = count >= size.rows or characters >= size.characters
            if last or len(batch) >= size.job_rows or held >= size.job_characters:
                yield batch
                batch, held = [], 0
            if last:
                return
        if batch:
            yield batch

    @staticmethod
    def _path(one: Built, number: int) -> Path:
        return one.folder / f"{number:05d}.rows"

    def _close(self, built: Sequence[Built], begun: tuple[int, int] | None, parts: Sequence[Outcome]) -> None:
        """Write the shard of which `parts` are all outcomes."""
        if begun is None:
            return
        one, number = built[begun[0]], begun[1]
        masked = one.kind != "text"
        documents = Tokenized.joined([part.documents for part in parts], self.encoder.dtype, masked)
        changed: dict[str, int] = {}
        for part in parts:
            for what, count in part.changed.items():
                changed[what] = changed.get(what, 0) + count
        about = {
            **self._made_with,
            "format": FORMAT,
            "kind": one.kind,
            "vocab_size": self.encoder.tokenizer.vocab_size,
            "shard": number,
            "bad": [list(bad) for part in parts for bad in part.bad],
            "changed": changed,
        }
        write_shard(self._path(one, number), about, documents)
        one.made += 1

    def _finish(self, one: Built, shards: int, report: RowReport) -> None:
        """Write the index of a file whose shards are all there."""
        one.shards = [self._path(one, number) for number in range(shards)]
        one.missing = [path.name for path in one.shards if not path.exists()]
        if one.missing and self.joining:
            shown = ", ".join(one.missing[:3]) + (", ..." if len(one.missing) > 3 else "")
            raise DataError(
                f"{one.file}: {len(one.missing)} of {shards} shards are missing in {one.folder} ({shown}): has every part "
                "been built there, with the same vocabulary and format?"
            )
        if one.missing:
            return
        for left in one.folder.glob(".*.part"):  # of runs that were killed
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()
        opened = [Shard(path, str(one.file)) for path in one.shards]
        for shard in opened:
            for line, why in shard.file.about["bad"]:
                report.good -= 1
                report.reject(one.file, int(line), str(why))
            report.changed.update({str(what): int(count) for what, count in shard.file.about["changed"].items()})
        if opened:
            report.note(f"{one.file}: read as {one.kind}")
        one.contents = [shard.file.content for shard in opened]
        one.documents = sum(shard.documents for shard in opened)
        one.tokens = sum(shard.tokens for shard in opened)
        one.learned = sum(int(shard.file.about["learned"]) for shard in opened)
        one.report = report
        write_json(
            one.folder / "index.json",
            {
                **self._made_with,
                "format": FORMAT,
                "source": one.file.name,
                "kind": one.kind,
                "documents": one.documents,
                "tokens": one.tokens,
                "learned": one.learned,
                "report": {
                    "good": report.good,
                    "bad": [[row.line, row.reason] for row in report.bad],
                    "bad_count": report.bad_count,
                    "reasons": dict(sorted(report.reasons.items())),
                    "changed": dict(sorted(report.changed.items())),
                    "notes": [note.replace(str(one.file), "{file}") for note in report.notes],
                },
                "shards": [
                    {
                        "name": shard.path.name,
                        "content": shard.file.content,
                        "documents": shard.documents,
                        "tokens": shard.tokens,
                    }
                    for shard in opened
                ],
            },
        )


def _check_kind(one: Built, bad: Iterable[tuple[int, str]]) -> None:
    """Raise DataError when a row among the bad ones is of another kind than its file was taken for."""
    if one.recognised:
        for line, why in bad:
            if (mixed := one_kind(why)) is not None:
                raise DataError(f"{one.file}:{line}: {mixed}")


def _report(kept: Mapping[str, Any], file: Path) -> RowReport:
    report = RowReport(int(kept["good"]), [BadRow(str(file), int(line), str(why)) for line, why in kept["bad"]])
    report.bad_count = int(kept["bad_count"])
    report.reasons.update(kept["reasons"])
    report.changed.update(kept["changed"])
    report.notes = [str(note).replace("{file}", str(file)) for note in kept["notes"]]
    return report


def _named(built: Sequence[Built]) -> str:
    files = [str(one.file) for one in built]
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files"


def _folder_name(file: Path, key: str) -> str:
    name = file.name
    while (
        (stem := os.path.splitext(name)[0])
        and stem != name
        and os.path.splitext(name)[1] in (".gz", ".zst", ".jsonl", ".json")
    ):
        name = stem
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[:40]}-{key}"


def _characters(value: Any) -> int:
    """How much text there is in the fields of a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
