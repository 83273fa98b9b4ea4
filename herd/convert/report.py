"""What a conversion or comparison found: data first (JSON), and the same as text of 80 columns."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from herd.convert.lost import Quality

__all__ = ["Check", "FileEntry", "Report", "Side", "Status", "TensorResult"]

Status = Literal["exact", "encoded", "within", "failed"]
"""exact: the same numbers, nothing lost. encoded: B is, bit for bit, what herd's encoder or cast makes of A. within: another
encoder's work inside the scheme's bound. failed: anything else."""

WIDTH = 80
SHOWN = 8
"""Failed tensors and lines of a check that the text shows; the JSON has all of them."""


@dataclass(frozen=True, slots=True)
class TensorResult:
    """One tensor of A held against B. `max_error` and `bound` are absolute, at `index` (where the error is largest or, in a
    failed tensor, where it exceeds the bound most); `why` says in words what failed."""

    name: str
    shape: tuple[int, ...]
    stored_a: str
    stored_b: str
    status: Status
    max_error: float = 0.0
    bound: float | None = None
    index: tuple[int, ...] | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One part of the proof. `passed` is None when it could not be made; `lines` say what was found, `figures` hold numbers."""

    name: str
    passed: bool | None
    lines: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file by name, with its size; `sha256` is None where it was not computed."""

    name: str
    nbytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two checkpoints: where, which format, its weights' bytes and stored types (type -> number of tensors)."""

    path: str
    kind: str
    parameters: int
    weight_bytes: int
    stored: Mapping[str, int]
    files: tuple[FileEntry, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits of the files' tensor data per parameter."""
        return 8 * self.weight_bytes / max(self.parameters, 1)


@dataclass(frozen=True, slots=True)
class Report:
    """The proof. `passed` needs every tensor and every check that could be made; `notes` say what was decided on the way.

    `quality` says how much B lost, where that was measured; no verdict depends on it.
    """

    title: str
    a: Side
    b: Side
    tensors: tuple[TensorResult, ...]
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    quality: Quality | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing failed. A check that could not be made is named in the text; it does not fail."""
        return not self.failed_tensors and all(check.passed is not False for check in self.checks)

    @property
    def failed_tensors(self) -> tuple[TensorResult, ...]:
        """Tensors that are missing, extra, or outside of their bound."""
        return tuple(t for t in self.tensors if t.status == "failed")

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors by status."""
        found = Counter(t.status for t in self.tensors)
        return {status: found[status] for status in ("exact", "encoded", "within", "failed")}

    @property
    def worst(self) -> TensorResult | None:
        """The tensor with the largest absolute error; None when there is none at all."""
        return max(self.tensors, key=lambda t: _rank(t.max_error), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinite and undefined numbers become strings."""
        sides = {
            name: {**asdict(side), "bits_per_weight": round(side.bits_per_weight, 4)}
            for name, side in (("a", self.a), ("b", self.b))
        }
        data = {
            "report": self.title,
            "passed": self.passed,
            **sides,
            "counts": self.counts,
            "checks": [asdict(check) for check in self.checks],
            "quality": None if self.quality is None else self.quality.as_dict(),
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "notes": list(self.notes),
            "command": self.command,
            "versions": dict(self.versions),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }
        return _plain(data)

    def text(self) -> str:
        """The report for people, at most 80 columns wide (paths excepted)."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterable[str]:
        yield f"{'PASS' if self.passed else 'FAIL'}  {self.title}"
        yield ""
        for name, side in (("A", self.a), ("B", self.b)):
            yield f"  {name}  {side.path}"
            types = ", ".join(f"{count} {stored}" for stored, count in side.stored.items())
            size = f"{side.kind}, {_bytes(side.weight_bytes)}, {side.bits_per_weight:.2f} bits per weight"
            yield from _wrapped(f"{size}; tensors: {types}", "     ")
        yield ""
        yield from self._tensor_lines()
        for check in self.checks:
            yield f"  {_mark(check.passed)}  {check.name}"
            shown = check.lines if check.passed is not False else check.lines[:SHOWN]
            for line in shown:
                yield from _wrapped(line, "        ")
            if len(check.lines) > len(shown):
                yield f"        and {len(check.lines) - len(shown)} more, in the JSON report"
        if self.quality is not None:
            yield ""
            yield "  quality"
            for line in self.quality.lines():
                yield f"    {line}".rstrip()
        if self.notes:
            yield ""
            for note in self.notes:
                yield from _wrapped(f"note: {note}", "  ")
        if self.seconds:
            yield ""
            yield from _wrapped(", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items()), "  ")

    def _tensor_lines(self) -> Iterable[str]:
        counts = self.counts
        yield f"  {_mark(not self.failed_tensors)}  tensors"
        words = {"exact": "exact", "encoded": "as encoded from A", "within": "within bound", "failed": "FAILED"}
        yield "        " + ", ".join(f"{counts[s]} {word}" for s, word in words.items() if counts[s] or s == "exact")
        worst = self.worst
        if worst is not None and worst.max_error:
            bound = "" if worst.bound is None else f" (bound there {worst.bound:.3g})"
            yield from _wrapped(f"largest error {worst.max_error:.3g}{bound} in {worst.name}", "        ")
        for tensor in self.failed_tensors[:SHOWN]:
            yield from _wrapped(f"{tensor.name}: {tensor.why}", "        ")
        if len(self.failed_tensors) > SHOWN:
            yield f"        and {len(self.failed_tensors) - SHOWN} more, in the JSON report"


def _mark(passed: bool | None) -> str:
    return {True: "ok  ", False: "FAIL", None: "  - "}[passed]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    ) or [indent]


def _rank(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _bytes(count: int) -> str:
    for size, letter in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return f"{count} bytes"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
