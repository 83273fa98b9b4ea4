"""Which tile a product is computed in: a small table with reasons, and no search at run time.

What decides, for an H200 (132 multiprocessors, about 4.3 TB/s): to keep the memory busy every multiprocessor needs about 26 KB of
loads on their way (Little: 4.3 TB/s x 0.8 us / 132), so small products want many programs, or few with many stages. No number
here has been measured on a device yet; `benchmarks/gpu.py` does that.
"""

from __future__ import annotations

from dataclasses import dataclass

from herd.kernels.paged import CORES
from herd.kernels.triton.launch import power

__all__ = ["DEQUANTIZE_FROM", "RowTile", "Tile", "row_tile", "tile"]

DEQUANTIZE_FROM = (
    {"plain": 17} | dict.fromkeys(("fp8", "int8"), 512) | dict.fromkeys(("q8", "q4", "q4k", "q5k", "q6k"), 512)
)
"""Rows from which on a product is torch's own, with a weight that was dequantized for it: writing and reading the numbers once
(2 x 2 bytes a weight) then costs less than the difference between these tiles and cuBLAS. Plain weights have nothing to
dequantize, and cuBLAS is better from the second tile of rows on."""

SMALLEST = 16
"""Rows of x in a tile: what a matrix unit takes at least."""

BITS = {"plain": 16, "fp8": 8, "int8": 8, "q8": 8, "q5k": 8, "q6k": 8, "q4": 4, "q4k": 4}
"""Of the codes."""


@dataclass(frozen=True, slots=True)
class RowTile:
    """For one row of x: `rows` of the weight and `columns` at a time."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tile:
    """`tokens` of x, `rows` of the weight, `columns` at a time, in `splits` parts of the columns."""

    tokens: int
    rows: int
    columns: int
    splits: int
    warps: int
    stages: int


def row_tile(kind: str, n: int, k: int) -> RowTile:
    """For `row_kernel`: 8 KiB of codes an iteration, and at least four programs a multiprocessor where rows allow it."""
    columns = min({16: 1024, 8: 2048, 4: 2048}[BITS[kind]], power(k, 64))
    rows = 8 if BITS[kind] == 4 else 4
    while rows > 1 and n < 4 * CORES * rows:
        rows //= 2
    return RowTile(rows, columns, warps=4, stages=2)


def tile(kind: str, m: int, n: int, k: int, element_size: int, *, fixed: bool = False, experts: bool = False) -> Tile:
    """For `tile_kernel` with `m` rows of x, of `element_size` bytes. `fixed`: a choice that does not depend on m."""
    if element_size == 4:  # float32 has no matrix units here: it is for tests
        return Tile(16, 16, 64 if kind != "q4k" else 128, 1, warps=4, stages=1)
    if fixed:
        return Tile(64, 64, 64, 1, warps=4, stages=4)
    tokens = min(power(m, SMALLEST), 128)
    if tokens == SMALLEST:
        # 16 KiB of codes a program in flight; narrow tiles of the weight, so that all multiprocessors have some.
        rows = 32 if n >= 32 * CORES else 16
        columns = min(256, power(k, 64))
        programs = -(-n // rows)
        splits = 1
        while not experts and programs * splits * 2 <= 2 * CORES and k // (splits * 2) >= 4 * columns:
            splits *= 2
        return Tile(tokens, rows, columns, splits, warps=4, stages=4 if BITS[kind] == 16 else 5)
    if tokens <= 64:
        return Tile(tokens, 64, 128, 1, warps=4, stages=3)
    return Tile(128, 128, 64, 1, warps=8, stages=3)
