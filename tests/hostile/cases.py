"""One hostile checkpoint, and what herd does with many of them: refuse with an error that says where, or load what is there."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from herd.errors import CheckpointError

__all__ = ["LIMIT", "MEMORY", "Case", "survive"]

LIMIT = 1.0
"""Seconds of processor time for one file."""
MEMORY = 256
"""MiB that the process may grow by, over all files."""


@dataclass(frozen=True)
class Case:
    """Files of one folder; `target` is the one to open ("" for the folder). `must_fail` when no reader may accept it."""

    name: str
    files: Mapping[str, bytes]
    target: str = ""
    must_fail: bool = False


def survive(
    cases: Iterable[Case],
    folder: Path,
    examine: Callable[[Path], None],
    refusals: tuple[type[Exception], ...] = (CheckpointError,),
) -> Counter[str]:
    """Examine every case; how many were refused and loaded, the slowest and the memory.

    A refusal is a CheckpointError with the file's path (or one of `refusals`, which must name the file in its message). Every
    other exception is a failed test.
    """
    figures, slowest, culprit = Counter[str](), 0.0, ""
    before = _reset_peak()
    written: set[str] = set()
    for case in cases:
        for stale in written - case.files.keys():
            (folder / stale).unlink()
        for name, data in case.files.items():
            (folder / name).write_bytes(data)
        written = set(case.files)
        start = time.process_time()
        error = _attempt(examine, folder / case.target, refusals, case.name)
        taken = time.process_time() - start
        assert taken < LIMIT, f"{case.name}: {taken:.2f} s"
        if taken > slowest:
            slowest, culprit = taken, case.name
        figures["refused" if error else "loaded"] += 1
        assert error or not case.must_fail, f"{case.name} was accepted"
        if error:
            assert str(folder) in str(error), f"{case.name}: names no file: {error}"
            assert len(str(error)) < 2_000, f"{case.name}: {len(str(error))} characters of message"
            if isinstance(error, CheckpointError):
                assert error.path is not None, f"{case.name}: {error}"
                _offset_is_inside(error, case.name)
    grown = (_peak() - before) >> 10
    assert grown < MEMORY, f"{grown} MiB"
    figures["slowest, ms"] = round(slowest * 1000)
    figures["memory growth, MiB"] = grown
    assert culprit or not figures
    return figures


def _attempt(
    examine: Callable[[Path], None], path: Path, refusals: tuple[type[Exception], ...], name: str
) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd but harmless content is reported to the user, and goes on
        try:
            examine(path)
        except refusals as error:
            return error
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    return None


def _offset_is_inside(error: CheckpointError, name: str) -> None:
    path = Path(str(error.path))
    if error.offset is not None and path.is_file():
        assert 0 <= error.offset <= path.stat().st_size, f"{name}: {error}"


def _reset_peak() -> int:
    """Forget the highest memory so far (Linux); the memory now, in KiB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise AssertionError(key)
