"""y = x W^T with weights that stay packed: a kernel for one row, and tiles on matrix units for more, with or without experts.

One row is bound by the bytes of the weight: `row_kernel` multiplies in registers, right where the loads arrive. For more rows
`tile_kernel` turns codes into numbers of x's dtype on their way to the matrix units. Its bits for a row depend on the tile
and not on the other rows, so a fixed tile makes results that no company changes.

Columns are read in pieces; where a kind has two nibbles a byte, the low and the high halves meet their own columns of x, and no
number has to change place. See `herd.kernels.packed` for the kinds.
"""

# pyright: reportCallIssue=false, reportAssignmentType=false
# A launch takes options that no kernel has as parameters.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from herd.kernels import grouped
from herd.kernels.packed import Packed
from herd.kernels.triton.launch import device_of, power
from herd.kernels.triton.tiles import DEQUANTIZE_FROM, RowTile, Tile, row_tile, tile

__all__ = ["expert_product_out", "grouped_linear", "product_out", "row_kernel", "sum_kernel", "tile_kernel"]


@triton.jit
def _nibbles(codes, OFFSET: tl.constexpr):
    """Bytes -> their low and high halves less OFFSET, as float32. A float32 with the bits 0x4B000000 + q is 2^23 + q."""
    wide = codes.to(tl.int32)
    low = ((wide & 15) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)
    high = ((wide >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)
    return low, high


@triton.jit
def _eighths(codes):
    """Bytes of float8_e4m3fn -> float32, exactly: the bits in place, and the bias made good. Not for NaN, which no weight is."""
    bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -2014314496  # 0x87F00000: the sign, and seven bits
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def _scales(scale, sub, n, at, K: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, SUPER: tl.constexpr):
    """[len(n), RUNS] float32: the scales of the runs of RUN columns from column `at` on."""
    g = at // RUN + tl.arange(0, RUNS)
    inside = (g < K // RUN)[None, :]
    if SUPER:
        fine = tl.load(sub + n[:, None] * (K // RUN) + g[None, :], inside, 0).to(tl.float32)
        coarse = tl.load(scale + n[:, None] * (K // 256) + (g * RUN // 256)[None, :], inside, 0.0).to(tl.float32)
        scales = coarse * fine
    else:
        scales = tl.load(scale + n[:, None] * (K // RUN) + g[None, :], inside, 0.0).to(tl.float32)
    return scales


@triton.jit
def row_kernel(
    x,
    codes,
    scale,
    sub,
    minimum,
    sub_minimum,
    out,
    N,
    K: tl.constexpr,
    KIND: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row of x: a program has ROWS rows of the weight and goes through them COLUMNS at a time."""
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    kept = n < N
    n = tl.where(kept, n, 0)
    NIBBLES: tl.constexpr = KIND == "q4" or KIND == "q4k"
    SUPER: tl.constexpr = KIND == "q4k" or KIND == "q5k" or KIND == "q6k"
    RUN: tl.constexpr = 16 if KIND == "q6k" else 32
    GROUPED: tl.constexpr = NIBBLES or SUPER or KIND == "q8"
    RUNS: tl.constexpr = COLUMNS // RUN
    if GROUPED:
        sums = tl.zeros([ROWS, RUNS], tl.float32)
    else:
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in tl.range(0, K, COLUMNS, num_stages=STAGES):
        if NIBBLES:
            j = at // 2 + tl.arange(0, COLUMNS // 2)
            inside = j < K // 2
            c = tl.load(codes + n[:, None] * (K // 2) + j[None, :], inside[None, :], 0)
            first = j // 16 * 32 + j % 16
            x_low = tl.load(x + first, inside, 0.0).to(tl.float32)
            x_high = tl.load(x + first + 16, inside, 0.0).to(tl.float32)
            low, high = _nibbles(c, 8 if KIND == "q4" else 0)
            both = low * x_low[None, :] + high * x_high[None, :]
            met = tl.sum(tl.reshape(both, (ROWS, RUNS, 16)), 2)
            sums += met * _scales(scale, sub, n, at, K, RUN, RUNS, SUPER)
            if KIND == "q4k":
                seen = tl.sum(tl.reshape(x_low + x_high, (RUNS, 16)), 1)
                sums -= seen[None, :] * _scales(minimum, sub_minimum, n, at, K, RUN, RUNS, True)
        else:
            k = at + tl.arange(0, COLUMNS)
            inside = k < K
            c = tl.load(codes + n[:, None] * K + k[None, :], inside[None, :], 0)
            here = tl.load(x + k, inside, 0.0).to(tl.float32)
            if KIND == "fp8":
                met = _eighths(c) * here[None, :]
            else:
                met = c.to(tl.float32) * here[None, :]
            if GROUPED:
                met = tl.sum(tl.reshape(met, (ROWS, RUNS, RUN)), 2)
                sums += met * _scales(scale, sub, n, at, K, RUN, RUNS, SUPER)
                if KIND == "q5k":
                    seen = tl.sum(tl.reshape(here, (RUNS, RUN)), 1)
                    sums -= seen[None, :] * _scales(minimum, sub_minimum, n, at, K, RUN, RUNS, True)
            else:
                sums += met
    total = tl.sum(sums, 1)
    if KIND == "fp8" or KIND == "int8":
        total *= tl.load(scale + n)
    tl.store(out + n, total.to(out.dtype.element_ty), kept)


@triton.jit
def _scaled(values, scales, ROWS: tl.constexpr, WIDTH: tl.constexpr, RUNS: tl.constexpr):
    """values [ROWS, WIDTH], every run multiplied by its own of scales [ROWS, RUNS]."""
    runs = tl.reshape(values, (ROWS, RUNS, WIDTH // RUNS)) * scales[:, :, None]
    return tl.reshape(runs, (ROWS, WIDTH))


@triton.jit
def _lowered(values, minima, ROWS: tl.constexpr, WIDTH: tl.constexpr, RUNS: tl.constexpr):
    """values less the minimum of their run."""
    runs = tl.reshape(values, (ROWS, RUNS, WIDTH // RUNS)) - minima[:, :, None]
    return tl.reshape(runs, (ROWS, WIDTH))


@triton.jit
def tile_kernel(
    x,
    codes,
    scale,
    sub,
    minimum,
    sub_minimum,
    counts,
    out,
    M,
    N,
    x_stride,
    out_stride,
    K: tl.constexpr,
    KIND: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERT_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """TOKENS rows of x times ROWS rows of the weight. SPLITS > 1: program_id(1) has a part of the columns, and `out` is
    [SPLITS, M, N] float32. EXPERTS > 0: rows of x are sorted by expert, and every tile finds its own on the device."""
    NIBBLES: tl.constexpr = KIND == "q4" or KIND == "q4k"
    SUPER: tl.constexpr = KIND == "q4k" or KIND == "q5k" or KIND == "q6k"
    RUN: tl.constexpr = 16 if KIND == "q6k" else 32
    GROUPED: tl.constexpr = NIBBLES or SUPER or KIND == "q8"
    RUNS: tl.constexpr = COLUMNS // RUN
    split = tl.program_id(1)
    across = tl.cdiv(N, ROWS)
    expert = tl.zeros([], tl.int64)
    first = 0
    stop = M
    if EXPERTS:
        tile_m = tl.program_id(0) // across
        tile_n = tl.program_id(0) % across
        i = tl.arange(0, EXPERT_BLOCK)
        rows = tl.load(counts + i, i < EXPERTS, 0).to(tl.int32)
        tiles = (rows + TOKENS - 1) // TOKENS
        expert = tl.sum((tl.cumsum(tiles, 0) <= tile_m).to(tl.int64), 0)
        earlier = i < expert
        first = tl.sum(tl.where(earlier, rows, 0), 0)
        stop = first + tl.sum(tl.where(i == expert, rows, 0), 0)
        first += (tile_m - tl.sum(tl.where(earlier, tiles, 0), 0)) * TOKENS
    else:
        # Neighbouring programs share rows of x and of the weight while both are in the second-level cache.
        down = tl.cdiv(M, TOKENS)
        block = tl.program_id(0) // (TOGETHER * across)
        height = tl.minimum(down - block * TOGETHER, TOGETHER)
        inner = tl.program_id(0) % (TOGETHER * across)
        first = (block * TOGETHER + inner % height) * TOKENS
        tile_n = inner // height
    if expert < tl.maximum(EXPERTS, 1):
        m = first + tl.arange(0, TOKENS)
        row = tl.where(m < stop, m, 0).to(tl.int64)[:, None] * x_stride
        kept = tile_n * ROWS + tl.arange(0, ROWS)
        n = tl.where(kept < N, kept, 0).to(tl.int64) + expert * N
        sums = tl.zeros([TOKENS, ROWS], tl.float32)
        part: tl.constexpr = (K + COLUMNS * SPLITS - 1) // (COLUMNS * SPLITS) * COLUMNS
        for at in range(split * part, tl.minimum(split * part + part, K), COLUMNS):
            if NIBBLES:
                j = at // 2 + tl.arange(0, COLUMNS // 2)
                inside = (j < K // 2)[None, :]
                column = (j // 16 * 32 + j % 16)[None, :]
                c = tl.load(codes + n[:, None] * (K // 2) + j[None, :], inside, 0)
                x_low = tl.load(x + row + column, inside, 0.0)
                x_high = tl.load(x + row + column + 16, inside, 0.0)
                scales = _scales(scale, sub, n, at, K, RUN, RUNS, SUPER)
                low, high = _nibbles(c, 8 if KIND == "q4" else 0)
                low = _scaled(low, scales, ROWS, COLUMNS // 2, RUNS)
                high = _scaled(high, scales, ROWS, COLUMNS // 2, RUNS)
                if KIND == "q4k":
                    minima = _scales(minimum, sub_minimum, n, at, K, RUN, RUNS, True)
                    low = _lowered(low, minima, ROWS, COLUMNS // 2, RUNS)
                    high = _lowered(high, minima, ROWS, COLUMNS // 2, RUNS)
                sums = tl.dot(x_low, tl.trans(low.to(x_low.dtype)), sums, input_precision="ieee")
                sums = tl.dot(x_high, tl.trans(high.to(x_low.dtype)), sums, input_precision="ieee")
            else:
                k = at + tl.arange(0, COLUMNS)
                inside = (k < K)[None, :]
                c = tl.load(codes + n[:, None] * K + k[None, :], inside, 0)
                here = tl.load(x + row + k[None, :], inside, 0.0)
                if KIND == "fp8":
                    w = _eighths(c).to(here.dtype)
                elif GROUPED:
                    w = _scaled(c.to(tl.float32), _scales(scale, sub, n, at, K, RUN, RUNS, SUPER), ROWS, COLUMNS, RUNS)
                    if KIND == "q5k":
                        minima = _scales(minimum, sub_minimum, n, at, K, RUN, RUNS, True)
                        w = _lowered(w, minima, ROWS, COLUMNS, RUNS)
                    w = w.to(here.dtype)
                else:
                    w = c.to(here.dtype)
                sums = tl.dot(here, tl.trans(w), sums, input_precision="ieee")
        if KIND == "fp8" or KIND == "int8":
            sums *= tl.load(scale + n)[None, :]
        place = m.to(tl.int64)[:, None] * out_stride + kept[None, :]
        if SPLITS > 1:
            place += split.to(tl.int64) * M * out_stride
        tl.store(out + place, sums.to(out.dtype.element_ty), (m < stop)[:, None] & (kept < N)[None, :])


@triton.jit
def sum_kernel(parts, out, M, N, out_stride, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [M, N] = the sum of parts [SPLITS, M, N], in order."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + (split * M + row) * N + n, n < N, 0.0)
    tl.store(out + row * out_stride + n, total.to(out.dtype.element_ty), n < N)


def product_out(
    x: Tensor,
    kind: str,
    codes: Tensor,
    scale: Tensor | None,
    sub: Tensor | None,
    minimum: Tensor | None,
    sub_minimum: Tensor | None,
    fixed: bool,
    out: Tensor,
) -> None:
    """See herd.kernels.products.product."""
    rows, (n, k) = x.shape[0], (codes.shape[0], x.shape[1])
    if rows == 0:
        return
    if not fixed and rows >= DEQUANTIZE_FROM[kind]:
        weight = Packed(kind, n, k, codes, scale, sub, minimum, sub_minimum)
        out.copy_(linear(x, weight.dequantize(x.dtype)))
        return
    parts = (scale, sub, minimum, sub_minimum)
    if rows == 1 and not fixed and x.stride(1) == 1:
        launch_row(x, kind, codes, parts, out, row_tile(kind, n, k))
    else:
        launch_tiles(x, kind, codes, parts, None, out, tile(kind, rows, n, k, x.element_size(), fixed=fixed))


def expert_product_out(
    x: Tensor,
    kind: str,
    codes: Tensor,
    scale: Tensor | None,
    sub: Tensor | None,
    minimum: Tensor | None,
    sub_minimum: Tensor | None,
    counts: Tensor,
    fixed: bool,
    out: Tensor,
) -> None:
    """See herd.kernels.products.expert_product."""
    experts, n = codes.shape[:2]
    if x.shape[0] == 0:
        return
    each = max(1, x.shape[0] // experts)  # rows of an expert, when all have the same
    chosen = tile(kind, each, n, x.shape[1], x.element_size(), fixed=fixed, experts=True)
    launch_tiles(x, kind, codes, (scale, sub, minimum, sub_minimum), counts, out, chosen)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See herd.kernels.grouped: the same with plain weights. The host does not wait for `counts`."""
    if x.element_size() != 2:  # no matrix units for these: torch's own products, one expert after the other
        return grouped.grouped_linear.__wrapped__(x, weight, counts)  # type: ignore[attr-defined]
    out = x.new_zeros(x.shape[0], weight.shape[1])
    codes = weight.contiguous()  # the transposed weight of a gradient is copied
    expert_product_out(x.contiguous(), "plain", codes, None, None, None, None, counts, False, out)
    return out


def _bytes(codes: Tensor) -> Tensor:
    """Devices without fp8 refuse its type, not its bits."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


def launch_row(
    x: Tensor, kind: str, codes: Tensor, parts: tuple[Tensor | None, ...], out: Tensor, chosen: RowTile
) -> None:
    """One row through `row_kernel`."""
    n, k = codes.shape[0], x.shape[1]
    codes = _bytes(codes)
    scale, sub, minimum, sub_minimum = (codes if part is None else part for part in parts)
    with device_of(x):
        row_kernel[(triton.cdiv(n, chosen.rows),)](
            x,
            codes,
            scale,
            sub,
            minimum,
            sub_minimum,
            out,
            n,
            K=k,
            KIND=kind,
            COLUMNS=chosen.columns,
            ROWS=chosen.rows,
            STAGES=chosen.stages,
            num_warps=chosen.warps,
        )


def launch_tiles(
    x: Tensor,
    kind: str,
    codes: Tensor,
    parts: tuple[Tensor | None, ...],
    counts: Tensor | None,
    out: Tensor,
    chosen: Tile,
) -> None:
    """Rows through `tile_kernel`, and `sum_kernel` when columns are split."""
    rows, k = x.shape
    n, experts = codes.shape[-2], 0 if counts is None else codes.shape[0]
    assert x.stride(1) == out.stride(1) == 1
    codes = _bytes(codes)
    scale, sub, minimum, sub_minimum = (codes if part is None else part for part in parts)
    # With experts, every one may have a tile that is not full, and only those with rows have tiles.
    down = rows // chosen.tokens + min(experts, rows) if experts else triton.cdiv(rows, chosen.tokens)
    target = x.new_empty(chosen.splits, rows, n, dtype=torch.float32) if chosen.splits > 1 else out
    with device_of(x):
        tile_kernel[(down * triton.cdiv(n, chosen.rows), chosen.splits)](
            x,
            codes,
            scale,
            sub,
            minimum,
            sub_minimum,
            codes if counts is None else counts,
            target,
            rows,
            n,
            x.stride(0),
            target.stride(-2),
            K=k,
            KIND=kind,
            EXPERTS=experts,
            EXPERT_BLOCK=power(experts),
            TOKENS=chosen.tokens,
            ROWS=chosen.rows,
            COLUMNS=chosen.columns,
            SPLITS=chosen.splits,
            TOGETHER=8,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
        )
        if chosen.splits > 1:
            block = min(1024, power(n))
            sum_kernel[(rows, triton.cdiv(n, block))](
                target, out, rows, n, out.stride(0), SPLITS=chosen.splits, BLOCK=block, num_warps=4
            )
