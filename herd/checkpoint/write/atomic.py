"""A file or folder appears at its name whole or not at all, whatever happens while it is written.

Results grow in a hidden folder beside the destination and move to their name in one step when they are complete and on the
disk. A lock on that hidden folder ends with its process, even after kill -9: what a dead run left is deleted by the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from herd.errors import CheckpointError, HerdError
from herd.files import flush_folder

try:
    import fcntl
except ImportError:  # Windows: there a file that is open cannot be deleted, which is lock enough
    fcntl = None  # type: ignore[assignment]

__all__ = ["PREFIX", "check_destination", "new_file", "new_folder", "remove_leftovers"]

PREFIX = ".herd-new-"
"""How the hidden folders of unfinished results are called."""

RESERVE = 1 << 20
"""Bytes to leave free: directories and the small files beside the weights."""

YOUNG = 60.0
"""Seconds in which a hidden folder without a lock may belong to a run that is just starting."""

_LOCK, _OLD = "herd.lock", "herd.old"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MARKS = ("config.json", "params.json", "adapter_config.json", "tokenizer.json", "tokenizer.model")

PathLike = str | os.PathLike[str]


@contextmanager
def new_file(
    dst: PathLike, *, size: int = 0, overwrite: bool = False, inputs: Sequence[PathLike] = ()
) -> Iterator[Path]:
    """A path to write a file to, which becomes `dst` when the block ends without an exception.

    `size` is the number of bytes to come, held against the free space first; `inputs` are files and folders being read, which
    `dst` must not touch. With `overwrite` an existing file stays in place until the new one replaces it. Raises
    CheckpointError for a destination that cannot be used, a full disk and every other failure to write.
    """
    with _growing(Path(dst), folder=False, size=size, overwrite=overwrite, inputs=inputs) as path:
        yield path


@contextmanager
def new_folder(
    dst: PathLike, *, size: int = 0, overwrite: bool = False, inputs: Sequence[PathLike] = ()
) -> Iterator[Path]:
    """A new empty folder to fill, which becomes `dst` when the block ends without an exception; otherwise as `new_file`.

    With `overwrite`, only a folder that looks like a checkpoint, or is empty, is replaced.
    """
    with _growing(Path(dst), folder=True, size=size, overwrite=overwrite, inputs=inputs) as path:
        path.mkdir()
        yield path


def check_destination(dst: PathLike, *, folder: bool, overwrite: bool = False, inputs: Sequence[PathLike] = ()) -> None:
    """Refuse a destination that must not be written: existing ones, links, and what lies inside of or around an input.

    Raises CheckpointError saying what to change.
    """
    place = Path(dst)
    if place.name in ("", ".."):
        raise CheckpointError("is no name for a new file or folder", path=dst)
    if place.is_symlink():
        raise CheckpointError("is a symbolic link: name the place that it leads to, or another one", path=dst)
    real = _real(place)
    for given in inputs:
        source = Path(given).resolve()
        if real == source:
            raise CheckpointError("is also the source: choose another destination", path=dst)
        if real.is_relative_to(source) and source.is_dir():
            raise CheckpointError(f"lies inside of the source {given}: choose a destination outside of it", path=dst)
        if source.is_relative_to(real):
            raise CheckpointError(f"holds the source {given}: choose another destination", path=dst)
    if not os.path.lexists(place):
        return
    if not overwrite:
        raise CheckpointError("exists already: choose another name, or replace it with --overwrite", path=dst)
    if folder != place.is_dir():
        kinds = ("a folder", "a file") if place.is_dir() else ("a file", "a folder")
        raise CheckpointError(f"is {kinds[0]}, and the result is {kinds[1]}: choose another name", path=dst)
    if folder and not _expendable(place):
        why = "does not look like a checkpoint, and --overwrite would delete everything in it: delete it yourself"
        raise CheckpointError(why, path=dst)


def remove_leftovers(folder: PathLike) -> int:
    """Delete what killed runs left in `folder`, and put back what they were about to replace. Returns how many there were."""
    count = 0
    for hidden in sorted(Path(folder).glob(PREFIX + "*")):
        if hidden.is_dir() and not hidden.is_symlink() and _abandoned(hidden):
            _put_back(hidden)
            shutil.rmtree(hidden, ignore_errors=True)
            count += 1
    return count


@contextmanager
def _growing(dst: Path, *, folder: bool, size: int, overwrite: bool, inputs: Sequence[PathLike]) -> Iterator[Path]:
    check_destination(dst, folder=folder, overwrite=overwrite, inputs=inputs)
    with _named(dst, size):
        dst.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(dst.parent)
    check_destination(dst, folder=folder, overwrite=overwrite, inputs=inputs)  # a leftover may have been put back
    free = shutil.disk_usage(dst.parent).free
    if size + RESERVE > free:
        raise CheckpointError(f"needs {_amount(size)}, but only {_amount(free)} are free on this disk", path=dst)
    with _named(dst, size):
        hidden, lock = _hidden(dst)
        try:
            new = hidden / dst.name
            with _shown(new, dst):
                yield new
            _flush(new)
            check_destination(dst, folder=folder, overwrite=overwrite, inputs=inputs)  # it may have appeared meanwhile
            _move(new, dst, hidden)
            flush_folder(dst.parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            lock.close()
            shutil.rmtree(hidden, ignore_errors=True)  # where an open file cannot be deleted


@contextmanager
def _named(dst: Path, size: int) -> Iterator[None]:
    """Every OSError as a CheckpointError about `dst`; a full disk says how much is needed and free."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise CheckpointError(f"cannot be written: {error.strerror or error}", path=dst) from error
        with contextlib.suppress(OSError):
            free = f", {_amount(shutil.disk_usage(dst.parent).free)} are free now"
            needed = f" The result needs {_amount(size)}{free}." if size else f" Now{free[1:-4]}."
            raise CheckpointError(
                f"the disk is full ({error.strerror}), nothing was left behind.{needed}", path=dst
            ) from error
        raise


@contextmanager
def _shown(new: Path, dst: Path) -> Iterator[None]:
    """Errors of the writers speak of `dst`: the hidden place means nothing to anybody and is gone when it is read."""
    try:
        yield
    except HerdError as error:
        error.args = tuple(str(arg).replace(str(new), str(dst)) for arg in error.args)
        if isinstance(error, CheckpointError) and error.path is not None:
            error.path = error.path.replace(str(new), str(dst))
        raise


def _hidden(dst: Path) -> tuple[Path, IO[str]]:
    """A hidden folder beside `dst` and its lock, held until closed; the lock says which name the result is to have."""
    while True:
        hidden = Path(tempfile.mkdtemp(prefix=PREFIX, dir=dst.parent))
        lock = open(hidden / _LOCK, "w", encoding="utf-8")  # noqa: SIM115  held open on purpose
        lock.write(dst.name)
        lock.flush()
        if fcntl is not None:
            with contextlib.suppress(OSError):  # file systems without locks: youth has to protect it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (hidden / _LOCK).exists():  # a run that starts at the same moment may have taken it for a leftover
            return hidden, lock
        lock.close()


def _abandoned(hidden: Path) -> bool:
    """Whether the run that made this folder is gone: its lock can be taken."""
    try:
        if fcntl is None:
            (hidden / _LOCK).unlink()
            return True
        with open(hidden / _LOCK, encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            return time.time() - hidden.stat().st_mtime > YOUNG
        return False
    except OSError:
        return False


def _put_back(hidden: Path) -> None:
    """A run killed between two renames: the old result goes back to its name."""
    with contextlib.suppress(OSError):
        name = Path((hidden / _LOCK).read_text(encoding="utf-8")).name
        if name and (hidden / _OLD).exists() and not os.path.lexists(hidden.parent / name):
            (hidden / _OLD).rename(hidden.parent / name)


def _move(new: Path, dst: Path, hidden: Path) -> None:
    """Give `new` its name. What was there is replaced in one step where the system can do that."""
    if not dst.exists():
        if new.is_file():
            _link(new, dst)
        else:
            new.rename(dst)  # refuses a folder that has appeared with something in it
    elif new.is_file():
        new.replace(dst)
    elif not _exchange(new, dst):
        dst.rename(hidden / _OLD)
        new.rename(dst)


def _link(new: Path, dst: Path) -> None:
    """Rename, but never over a file that has appeared meanwhile."""
    try:
        os.link(new, dst)
    except FileExistsError:
        raise CheckpointError("has appeared while it was being written: nothing was replaced", path=dst) from None
    except OSError:  # a file system without hard links
        new.rename(dst)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux: renameat2); False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _flush(path: Path) -> None:
    """Everything below `path` onto the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            _flush(entry)
        flush_folder(path)
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _expendable(folder: Path) -> bool:
    names = [entry.name for entry in folder.iterdir()]
    weights = any(name.endswith((".safetensors", ".gguf", ".pth", ".bin")) for name in names)
    return not names or weights or any(mark in names for mark in _MARKS)


def _real(place: Path) -> Path:
    """`place` with every link in its parents resolved."""
    return place.parent.resolve() / place.name


def _amount(size: int) -> str:
    if size < 10_000_000:
        return f"{size:,} bytes"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
