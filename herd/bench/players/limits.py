"""The machine itself as a player: how fast it reads memory and multiplies, with the same threads, in the same rounds."""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from herd.bench.players.base import Setup
from herd.bench.players.gpu_limits import GpuLimits

__all__ = ["open_player"]

SHAPE = (512, 2048, 8192)
"""Rows, depth and columns of the product whose rate is the compute limit: a prompt of 512 through a feed-forward."""
SMALL_SHAPE = (128, 2048, 2048)
"""The same for models of a few million parameters, whose own products are smaller still: a sixteenth of the work, and no time."""
LARGE = 1 << 29
"""Bytes to read from which a setup belongs to a model that takes the large product."""


class Limits:
    """Streaming reads and matrix products of torch (oneDNN), the best of several ways of doing each."""

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._bytes = setup.length
        self._shape = SHAPE if setup.length >= LARGE else SMALL_SHAPE
        self._values = _floats(self._bytes // 4)
        matrix = self._values.view(-1, 2048)
        vector = torch.ones(2048)
        self._readers: dict[str, Callable[[], object]] = {
            "maximum of float32": lambda: self._values.max(),
            "float32 matrix times vector": lambda: matrix @ vector,
        }

    def facts(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "bytes": self._bytes, "product": self._shape}

    def bandwidth(self) -> dict[str, float]:
        """GB/s of each way to read, one pass each after another, the better of two passes."""
        return {name: self._bytes / min(_seconds(read) for _ in range(2)) / 1e9 for name, read in self._readers.items()}

    def peaks(self) -> dict[str, float]:
        """10^9 operations per second of int8, bfloat16 and float32 products, median of 7."""
        rows, depth, columns = self._shape
        a = torch.randint(-99, 99, (rows, depth), dtype=torch.int8)
        b = torch.randint(-99, 99, (columns, depth), dtype=torch.int8)
        product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
        found = {"int8": _rate(self._shape, lambda: product(a, b.t()))}
        for name, kind in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            x, y = a.to(kind), b.to(kind)
            found[name] = _rate(self._shape, lambda x=x, y=y: x @ y.t())
        return found


def _floats(count: int) -> Tensor:
    """Ones in large pages, where the system gives them on request: what weights lie in, and 4 KiB pages are slower to read."""
    memory = mmap.mmap(-1, 4 * count)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1.0)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _rate(shape: tuple[int, int, int], call: Callable[[], object]) -> float:
    call()
    rows, depth, columns = shape
    return 2 * rows * depth * columns / statistics.median(_seconds(call) for _ in range(7)) / 1e9


def open_player(setup: Setup) -> Limits | GpuLimits:
    """Allocate what is read: `setup.length` bytes."""
    return Limits(setup) if setup.device == "cpu" else GpuLimits(setup)
