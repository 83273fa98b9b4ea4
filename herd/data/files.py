"""Which files a data path means, and their bytes, unpacked: a file, a folder or a pattern. No torch."""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from herd.errors import DataError

__all__ = ["Form", "find_files", "form_of", "open_bytes"]

Form = Literal["lines", "array", "parquet", "text"]
"""How a file holds rows: JSON lines, one JSON array, a Parquet table, or plain text."""

FORMS: dict[str, Form] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "array",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
PACKED = (".gz", ".zst")

NAMED = 5
"""Files that are passed over and named."""

ZSTD_WINDOW = 1 << 27
"""Largest Zstandard window accepted, bytes (128 MiB): more could be a memory bomb."""

ZSTD_FEED = 2048
"""Compressed bytes given to Zstandard at once. A block of 4 bytes can stand for 128 KiB, so this bounds one step to 64 MiB."""

_HELD_OUT = {"test", "valid", "validation", "val", "dev", "eval", "heldout", "held_out"}


def form_of(path: Path) -> Form | None:
    """How the file called `path` holds rows, by the end of its name; None for a name that says nothing."""
    name = path.name.lower()
    for end in PACKED:
        name = name.removesuffix(end)
    return FORMS.get(os.path.splitext(name)[1])


def find_files(path: Path | str, note: Callable[[str], None] = lambda text: None) -> tuple[Path, ...]:
    """The data files that `path` means, in an order that depends on their names alone.

    A file is itself. A folder is every file in it and in its folders whose name ends as one of FORMS (packed or not); files
    with other names are passed over and said through `note`, hidden ones silently. A pattern (`*`, `?`, `[`, `**`) is what it
    matches. Raises DataError when nothing is found, for a file of an unknown form, and for a folder that holds both training
    and held-out files (by their names: train and test, valid, dev, ...): name the one that is meant.
    """
    given = str(path)
    path = Path(path).expanduser()
    if path.is_dir():
        return _of_folder(path, note)
    if path.exists():
        if not path.is_file():
            raise DataError(f"{given}: is neither a file nor a folder")
        if form_of(path) is None:
            raise DataError(f"{given}: files are read by the end of their names: {_known()}")
        return (path,)
    if glob.has_magic(given):
        found = sorted((Path(match) for match in glob.glob(str(path), recursive=True)), key=lambda p: p.as_posix())
        files = tuple(match for match in found if match.is_file() and form_of(match))
        _say_passed(given, [match for match in found if match.is_file() and not form_of(match)], note)
        if not files:
            raise DataError(f"{given}: no data file matches; names end in {_known()}")
        return files
    raise DataError(f"{given}: no such data file")


def _of_folder(folder: Path, note: Callable[[str], None]) -> tuple[Path, ...]:
    found: list[Path] = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(base, name) for name in names if not name.startswith(".")]
    found.sort(key=lambda match: match.relative_to(folder).as_posix())
    files = tuple(match for match in found if form_of(match) and match.is_file())
    _say_passed(str(folder), [match for match in found if not form_of(match)], note)
    if not files:
        raise DataError(f"{folder}: no data file in this folder; names end in {_known()}")
    splits: dict[str, Path] = {}
    for match in files:
        for part in match.relative_to(folder).parts:
            splits.setdefault(re.split(r"[-.]", part.lower())[0], match)
    if "train" in splits and (held := sorted(_HELD_OUT & splits.keys())):
        raise DataError(
            f"{folder}: holds {splits['train'].name} and {splits[held[0]].name}: name the file or pattern that is meant, "
            "so that nothing is trained on what it is tested with"
        )
    return files


def _known() -> str:
    return f"{', '.join(FORMS)} (also with {' or '.join(PACKED)})"


def _say_passed(where: str, passed: list[Path], note: Callable[[str], None]) -> None:
    if passed:
        named = ", ".join(match.name for match in passed[:NAMED])
        more = f", and {len(passed) - NAMED:,} more" if len(passed) > NAMED else ""
        note(f"{where}: files that are no data by their names are passed over: {named}{more}")


def open_bytes(path: Path, at: Callable[[int], None] = lambda position: None) -> BinaryIO:
    """Open `path` for reading bytes, unpacking `.gz` and `.zst` by file name. `at` is told the bytes of the file read so far.

    Reading may raise what `DAMAGE` names, when the packed stream is damaged or ends early.
    """
    try:
        raw = io.BufferedReader(_Told(path, at), BUFFER)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(_Gzip(raw), BUFFER)
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstandard(path, raw), BUFFER)
    return raw


BUFFER = 1 << 18


class _Told(io.FileIO):
    """A file that says how far it was read."""

    def __init__(self, path: Path, at: Callable[[int], None]) -> None:
        super().__init__(path)
        self._at, self._position = at, 0

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer) or 0
        self._position += count
        self._at(self._position)
        return count


class _Gzip(gzip.GzipFile):
    """A gzip file that closes what it reads from."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__(fileobj=raw, mode="rb")
        self._beneath = raw

    def close(self) -> None:
        super().close()
        self._beneath.close()


class StreamError(Exception):
    """A Zstandard stream that is damaged, ends early or wants too much memory."""


DAMAGE = (EOFError, zlib.error, OSError, StreamError)
"""What reading a packed stream raises when it is damaged."""


class _Zstandard(io.RawIOBase):
    """A Zstandard file as a raw stream. Unlike zstandard's own reader it takes several frames and notices a missing end."""

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raw.close()
            raise DataError(f"{path}: Zstandard data needs the data extra: pip install 'herd[data]'") from error
        self._error = zstandard.ZstdError
        self._make = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj
        self._file = raw
        self._pieces = self._unpack()
        self._held = memoryview(b"")

    def _unpack(self) -> Iterator[bytes]:
        frame: Any = None
        while chunk := self._file.read(ZSTD_FEED):
            while chunk:
                frame = self._make() if frame is None else frame
                try:
                    piece = frame.decompress(chunk)
                except self._error as error:
                    raise StreamError(str(error)) from error
                chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
                if piece:
                    yield piece
        if frame is not None:
            raise StreamError("the stream ends early")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._held:
            self._held = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
