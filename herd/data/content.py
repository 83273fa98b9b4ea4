"""What files hold, as SHA-256: read once, and remembered for as long as a file is left alone. No torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from herd.errors import CheckpointError, DataError
from herd.files import read_json, whole_file

__all__ = ["contents", "stat_of", "write_json"]

TRUSTED_AGE = 2_000_000_000
"""Nanoseconds that a file must have been left alone before its size and time are taken for its content."""


def contents(files: Sequence[Path], memory: Path, tick: Callable[[int, int], None]) -> list[str]:
    """SHA-256 of each file, from the folder `memory` where size and time are those of then.

    `tick` is told the bytes that are done, of how many, while files are read. Raises DataError for a file that cannot be read, or
    changes meanwhile.
    """
    sizes = [stat_of(file).st_size for file in files]
    done, found = 0, []
    for file, size in zip(files, sizes, strict=True):
        found.append(_content(file, memory, lambda count, done=done: tick(done + count, sum(sizes))))
        done += size
    return found


def _content(file: Path, memory: Path, tick: Callable[[int], None]) -> str:
    stat = stat_of(file)
    mark = {"path": str(file.resolve()), "size": stat.st_size, "modified": stat.st_mtime_ns}
    kept = memory / f"{sha256(mark['path'].encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
    try:
        known = read_json(kept)
        if all(known.get(key) == value for key, value in mark.items()) and len(str(known.get("sha256"))) == 64:
            return str(known["sha256"])
    except CheckpointError:
        pass
    digest, count = sha256(), 0
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 22):
            digest.update(chunk)
            count += len(chunk)
            tick(count)
    after = stat_of(file)
    if (after.st_size, after.st_mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        raise DataError(f"{file}: has changed while it was read; try again when it is finished")
    if time.time_ns() - stat.st_mtime_ns > TRUSTED_AGE:  # else a change within the clock's step could go unnoticed
        with suppress(DataError):  # a folder that is read only: the file is read again the next time
            write_json(kept, {**mark, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def stat_of(file: Path) -> os.stat_result:
    """Size and times of a file. Raises DataError."""
    try:
        return file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value`, whole or not at all. Raises DataError."""
    try:
        with whole_file(path) as file:
            file.write(json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    except CheckpointError as error:
        raise DataError(str(error)) from error
