"""A file as memory: tensors that are views of the page cache.

The mapping is private and copy-on-write: reading costs no memory of our own, writing into a tensor never reaches the file.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from herd.errors import CheckpointError
from herd.files import short

if TYPE_CHECKING:
    import torch

__all__ = ["SLICE", "MappedFile", "Span", "same_bytes", "slices"]

SLICE = 8 << 20
"""Bytes of a large tensor worked on at a time, so that passing copies and file pages stay few."""

# Linux: a private writable mapping larger than the memory is refused unless it reserves none.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0)


class Span(NamedTuple):
    """A byte range of a file."""

    start: int
    size: int


class MappedFile:
    """`path` mapped as a whole. Raises CheckpointError when it cannot be opened or is empty."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):  # opening a pipe would wait for ever
                raise CheckpointError("is not a regular file", path=self.path)
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise CheckpointError("the file is empty", path=self.path)
                self._map = _map(file.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot be opened: {error.strerror or error}", path=self.path) from error

    def bytes(self, offset: int, size: int) -> bytes:
        """A copy of `size` bytes at `offset`; the caller has checked both."""
        return self._map[offset : offset + size]

    def view(self) -> memoryview:
        """The whole file, read-only."""
        return memoryview(self._map).toreadonly()

    def large_pages(self) -> None:
        """Ask for large pages where the system has them for files: what is read from front to back is then read faster."""
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)

    def find_last(self, needle: bytes, start: int) -> int:
        """Offset of the last `needle` at or after `start`, or -1."""
        return self._map.rfind(needle, start)

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor stored row-major at `offset`: a view, or a copy where the file misaligns it. No bounds are assumed.

        Raises CheckpointError when it does not lie inside the file.
        """
        import torch

        count = math.prod(shape)
        nbytes = count * dtype.itemsize
        if offset < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                f"{nbytes} bytes at {offset} reach past the end of the file ({self.size} bytes)",
                path=self.path,
                offset=offset,
            )
        if count == 0:
            return self._empty(offset, dtype, shape)
        if offset % dtype.itemsize:  # kernels may assume natural alignment
            raw = bytearray(self._map[offset : offset + nbytes])
            return torch.frombuffer(raw, dtype=dtype).view(shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)

    def _empty(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        try:
            return torch.empty(shape, dtype=dtype)
        except (RuntimeError, OverflowError):  # sizes beside the zero may be absurd
            raise CheckpointError(f"shape {short(shape)} overflows", path=self.path, offset=offset) from None

    def release(self, offset: int, nbytes: int) -> None:
        """Let go of the memory behind a range that has been copied; it is read again from the file when touched."""
        page = mmap.PAGESIZE
        start, stop = -(-offset // page) * page, (offset + nbytes) // page * page
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one shape and dtype and the same bytes; NaN equals NaN, and any dtype may be asked about."""
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(a, b)


def slices(tensor: torch.Tensor, nbytes: int = SLICE) -> Iterator[slice]:
    """Runs of rows (indices of the first dimension) of about `nbytes` bytes, covering `tensor` in order."""
    rows = tensor.shape[0]
    step = max(1, nbytes * rows // max(tensor.numel() * tensor.element_size(), 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def _map(descriptor: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        flags = mmap.MAP_PRIVATE | _NO_RESERVE
        return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
