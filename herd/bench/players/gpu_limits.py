"""A GPU as a player: how fast it copies and multiplies, in the same rounds as the programs that are measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from herd.bench.players.base import Setup

__all__ = ["SHAPE", "GpuLimits"]

SHAPE = (8192, 8192, 8192)
"""Rows, depth and columns of the product whose rate is the compute limit: large enough for every tensor core."""


class GpuLimits:
    """Copies and reads of device memory, and matrix products of torch's libraries, on random numbers (zeros cost less power)."""

    def __init__(self, setup: Setup, shape: tuple[int, int, int] = SHAPE) -> None:
        self._device, self._shape, self._bytes = torch.device(setup.device), shape, setup.length
        self._values = torch.randn(self._bytes // 4, device=self._device)
        self._copy = torch.empty_like(self._values)

    def facts(self) -> dict[str, Any]:
        cuda = self._device.type == "cuda"
        name = torch.cuda.get_device_name(self._device) if cuda else str(self._device)
        return {"torch": torch.__version__, "device": name, "bytes": self._bytes, "product": self._shape}

    def bandwidth(self) -> dict[str, float]:
        """GB/s of a copy (reading and writing counted) and of reading alone, the better of two passes."""
        ways = {
            "copy": (2, lambda: self._copy.copy_(self._values)),
            "maximum of float32": (1, lambda: self._values.max()),
        }
        return {
            name: times * self._bytes / min(self._seconds(way) for _ in range(2)) / 1e9
            for name, (times, way) in ways.items()
        }

    def peaks(self) -> dict[str, float]:
        """10^9 operations per second of float32, bfloat16, int8 and, where the device has it, fp8 products, median of 7."""
        rows, depth, columns = self._shape
        a, b = torch.randn(rows, depth, device=self._device), torch.randn(columns, depth, device=self._device)
        found = {}
        for name, kind in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            x, y = a.to(kind), b.to(kind)
            found[name] = self._rate(lambda x=x, y=y: x @ y.t())
        x, y = (a * 30).clamp(-99, 99).to(torch.int8), (b * 30).clamp(-99, 99).to(torch.int8)
        int_mm = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
        found["int8"] = self._rate(lambda: int_mm(x, y.t()))
        if self._device.type == "cuda" and torch.cuda.get_device_capability(self._device) >= (8, 9):
            eights = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
            one = torch.ones((), device=self._device)
            scaled_mm = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
            found["fp8"] = self._rate(
                lambda: scaled_mm(
                    eights[0], eights[1].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
                )
            )
        return found

    def _rate(self, call: Callable[[], object]) -> float:
        call()
        rows, depth, columns = self._shape
        return 2 * rows * depth * columns / statistics.median(self._seconds(call) for _ in range(7)) / 1e9

    def _seconds(self, call: Callable[[], object]) -> float:
        """Of the device's own clock; of the host's where it has none."""
        if self._device.type != "cuda":
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
