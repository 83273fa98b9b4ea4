"""Small files from outside, read with suspicion: JSON with limits, and names that stay inside their folder. New files that
appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NoReturn

from herd.errors import CheckpointError

__all__ = ["MAX_JSON", "flush_folder", "parse_json", "read_json", "safe_join", "short", "whole_file"]

MAX_JSON = 64 << 20
"""Bytes of the largest JSON side file worth reading: the index of a 100,000-tensor checkpoint is a tenth of it."""

_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}

_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxlist, _brief.maxtuple, _brief.maxdict = 2, 8, 8, 4
_brief.maxstring = _brief.maxlong = _brief.maxother = 60


def short(value: object) -> str:
    """`repr` for messages: bounded, whatever the file says."""
    if type(value) is int and value.bit_length() > 200:  # its decimal form alone could cost seconds
        return f"a number of {value.bit_length()} bits"
    return _brief.repr(value)


def safe_join(root: str | os.PathLike[str], name: str) -> Path:
    """`root / name` for a file name that came from outside. Raises CheckpointError unless it stays inside `root`.

    Refused: absolute and drive paths, backslashes, `..`, empty and reserved parts, control characters, long names, and
    symbolic links that lead out of the folder (links into the blob stores of the Hugging Face cache that the folder is in are
    what downloads look like and are allowed).
    """

    def refuse(why: str) -> NoReturn:
        raise CheckpointError(f"file name {short(name)} {why}", path=root)

    if not name or len(name) > 512 or any(len(part) > 255 for part in name.split("/")):
        refuse("is empty or too long")
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in name):
        refuse("holds control characters")
    if "\\" in name or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith("~"):
        refuse("leads outside of the checkpoint folder")
    parts = name.split("/")
    if any(part in ("", ".", "..") or part.split(".")[0].lower() in _RESERVED for part in parts):
        refuse("leads outside of the checkpoint folder")
    path = Path(root, name)
    home = Path(root).resolve()
    allowed = [home, *_blob_stores(home)]
    try:
        place = path.resolve()
    except (OSError, RuntimeError):  # RuntimeError is Python 3.11's word for links in a circle
        refuse("is a link that cannot be followed")
    if not any(place.is_relative_to(folder) for folder in allowed):
        refuse("is a link that leads outside of the checkpoint folder")
    return path


def _blob_stores(home: Path) -> list[Path]:
    """Where the links of a snapshot in a Hugging Face cache may lead: the repository's blobs, and those that all share."""
    for folder in (home, *home.parents[:2]):
        if folder.parent.name == "snapshots":
            repo = folder.parents[1]
            return [repo / "blobs", repo.parent / "blobs"]
    return []


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError for everything else: size, encoding, syntax, depth, repeated keys."""
    try:
        if not Path(path).is_file():
            raise CheckpointError(
                "there is no such file" if not Path(path).exists() else "is not a regular file", path=path
            )
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", path=path) from error
    if len(raw) > limit:
        raise CheckpointError(f"is larger than {limit} bytes, which no such file needs", path=path)
    return parse_json(raw, path)


def parse_json(raw: bytes, path: str | os.PathLike[str], offset: int | None = None) -> dict[str, Any]:
    """The JSON object in `raw`, strictly: UTF-8, no NaN, no repeated keys, no lone surrogates. Raises CheckpointError."""

    def fail(why: str) -> NoReturn:
        raise CheckpointError(why, path=path, offset=offset)

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError("is not UTF-8", path=path, offset=(offset or 0) + error.start) from error

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            fail(f"the key {short(twice)} is given twice")
        return found

    try:
        data = json.loads(text, object_pairs_hook=unique, parse_constant=lambda word: fail(f"{word} is not JSON"))
    except json.JSONDecodeError as error:
        fail(f"is not JSON: {error.msg} at character {error.pos}")
    except RecursionError:
        fail("is nested too deeply")
    except CheckpointError:
        raise
    except ValueError as error:  # integers of thousands of digits
        fail(f"is not JSON: {error}")
    if not isinstance(data, dict):
        fail("is not a JSON object")
    if "\\ud" in text.lower():
        _refuse_surrogates(data, fail)
    return data


def _refuse_surrogates(data: Any, fail: Any) -> None:
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        fail("a string holds half a surrogate pair")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], size: int = 0) -> Iterator[IO[bytes]]:
    """A binary file to write, which becomes `path` when the block ends without an exception, flushed to the disk.

    A process that is killed leaves a hidden `.name.*.part` beside it, and `path` as it was. `size` is the number of bytes to
    come, held against the free space first. Raises CheckpointError naming `path` when the disk refuses.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise CheckpointError(f"needs {size} bytes, but only {free} are free on this disk", path=path)
        descriptor, part = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror or error}", path=path) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
        flush_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror or error}", path=path) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def flush_folder(folder: Path) -> None:
    """The names in `folder` onto the disk, where the system lets that be asked for."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have no such thing
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
