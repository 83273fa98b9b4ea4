"""The GPU kernels beside their limits and beside torch's own operations: `python benchmarks/gpu.py [--json FILE] [--only WORD]`.

Measured first, in the same run: what a copy and a read reach in bytes per second, and what large products reach in bfloat16, fp8
and int8 (random numbers: zeros are faster than the truth). Then every kernel with the shapes of a Llama 3.1 8B: its time, and its
share of the time that its bytes or its operations need at those rates. Kernels run from CUDA graphs over several copies of their
weights, so that no launch is counted and nothing is found in the second-level cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from herd.kernels import fused, packed, paged, products, triton

DIM, HIDDEN, HEADS, KV_HEADS, WIDTH, VOCABULARY = 4096, 14336, 32, 8, 128, 128256
BLOCK = 16
LARGE = 8192
"""Rows and columns of the products that the peaks are measured with."""

MEMORY = 4 << 30
"""Bytes of the copy that the bandwidth is measured with."""

DEVICE = "cuda"
COLD = 256 << 20
"""Bytes that the copies of what a kernel reads have together, at least: five times the second-level cache of an H200."""

ROUNDS = 7


def seconds(calls: list[Callable[[], Any]], repeats: int = 20) -> float:
    """The median time of one of `calls`, run one after the other from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # compiles
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(max(1, repeats // len(calls))):
            for call in calls:
                call()
    count = max(1, repeats // len(calls)) * len(calls)
    graph.replay()
    found = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1000 / count)
    return statistics.median(found)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def bind(function: Callable[..., Any], *args: Any, **named: Any) -> Callable[[], Any]:
    return lambda: function(*args, **named)


class Report:
    """Rows of a table, printed as they are measured."""

    def __init__(self, only: str) -> None:
        self.only, self.limits, self.rows = only, {}, []

    def limit(self, name: str, value: float, unit: str) -> None:
        self.limits[name] = value
        print(f"{name:<28}{value / 1e12:8.2f} T{unit}", flush=True)

    def row(
        self, name: str, calls: list[Callable[[], Any]], nbytes: float, operations: float = 0.0, peak: str = "bf16"
    ) -> None:
        """Measure `calls`; what they need at the limits is the larger of the time of the bytes and that of the operations."""
        if self.only not in name:
            return
        try:
            took = seconds(calls)
        except Exception as error:  # one kernel that fails must not hide the others
            self.rows.append({"name": name, "error": str(error)[:300]})
            print(f"{name:<44} failed: {str(error).splitlines()[0][:120] if str(error) else type(error).__name__}")
            return
        needed = max(nbytes / self.limits["read"], operations / self.limits.get(peak, float("inf")))
        self.rows.append({"name": name, "seconds": took, "share": needed / took, "bytes": nbytes, "ops": operations})
        print(
            f"{name:<44}{took * 1e6:10.1f} us {nbytes / took / 1e12:6.2f} TB/s {operations / took / 1e12:8.1f} T/s"
            f"   {needed / took:5.0%} of the limit",
            flush=True,
        )


def limits(report: Report) -> None:
    bandwidth(report)
    x, w = random(LARGE, LARGE), random(LARGE, LARGE)
    operations = 2.0 * LARGE**3
    report.limit("bf16", operations / seconds([bind(torch.mm, x, w.T)], 5), "op/s")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9):
        eight, x8 = packed.fp8(w), packed.fp8(x)
        assert eight.scale is not None
        assert x8.scale is not None
        scales = {"scale_a": x8.scale[:, None], "scale_b": eight.scale[None]}
        call = bind(torch._scaled_mm, x8.codes, eight.codes.T, **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
        report.limit("fp8", operations / seconds([call], 5), "op/s")
    xi, wi = packed.int8(x), packed.int8(w)
    report.limit("int8", operations / seconds([bind(torch._int_mm, xi.codes, wi.codes.T)], 5), "op/s")


def bandwidth(report: Report) -> None:
    a = torch.randint(0, 1 << 62, (MEMORY // 8,), device=DEVICE)
    b = torch.empty_like(a)
    report.limit("copy", 2 * a.nbytes / seconds([bind(b.copy_, a)], 5), "B/s")
    report.limit("read", max(a.nbytes / seconds([bind(torch.sum, a)], 5), report.limits["copy"]), "B/s")


def weights(kind: str, rows: int, columns: int) -> packed.Packed:
    """Random; grouped kinds straight from random codes, as their numbers do not matter here."""
    if kind in ("plain", "fp8", "int8"):
        return getattr(packed, kind)(random(rows, columns))
    half = lambda n: (torch.rand(rows, columns // n, device=DEVICE) * 0.01).half()  # noqa: E731
    byte = lambda n, dtype: torch.randint(0, 60, (rows, columns // n), device=DEVICE).to(dtype)  # noqa: E731
    codes = byte(2, torch.uint8) if kind in ("q4", "q4k") else byte(1, torch.int8)
    if kind in ("q8", "q4"):
        return packed.Packed(kind, rows, columns, codes, half(32))
    if kind == "q6k":
        return packed.Packed(kind, rows, columns, codes, half(256), byte(16, torch.int8))
    fine = byte(32, torch.uint8)
    return packed.Packed(kind, rows, columns, codes, half(256), fine, half(256), fine.clone())


def matrix_products(report: Report) -> None:
    shapes = {"qkv": (6144, DIM), "wo": (DIM, DIM), "gate+up": (2 * HIDDEN, DIM), "down": (DIM, HIDDEN)}
    shapes["output"] = (VOCABULARY, DIM)
    for name, (n, k) in shapes.items():
        for kind in packed.KINDS:
            copies = [weights(kind, n, k)]
            copies += [weights(kind, n, k) for _ in range(min(15, COLD // copies[0].nbytes))]
            for rows in (1, 4, 16, 64, 512) if name in ("gate+up", "down") else (1, 16):
                x, out = random(rows, k), random(rows, n)
                nbytes, operations = copies[0].nbytes + x.nbytes + out.nbytes, 2.0 * rows * n * k
                label = f"{name} {kind} rows={rows}"
                report.row(label, [bind(products.product, x, w, out=out) for w in copies], nbytes, operations)
                if rows in (1, 16):
                    calls = [bind(products.product, x, w, fixed=True, out=out) for w in copies]
                    report.row(f"{label} fixed", calls, nbytes, operations)
                if kind == "plain":
                    calls = [bind(torch.mm, x, w.codes.T, out=out) for w in copies]
                    report.row(f"{label} (torch)", calls, nbytes, operations)
                if kind == "fp8" and rows >= 16:
                    calls = [bind(products.scaled_product, x, w) for w in copies]
                    report.row(f"{label} fp8 x fp8", calls, nbytes, operations, "fp8")
            del copies


def attention(report: Report) -> None:
    for kv in (torch.bfloat16, torch.int8):
        for rows, length in ((1, 1024), (1, 16384), (1, 131072), (16, 4096), (64, 2048)):
            each = -(-length // BLOCK)
            shape = (rows * each, BLOCK, KV_HEADS, WIDTH)
            cache = [random(*shape).to(kv) if kv != torch.int8 else random(*shape).mul_(40).to(kv) for _ in "kv"]
            scales = [torch.rand(shape[:3], device=DEVICE) * 0.02 if kv == torch.int8 else None for _ in "kv"]
            tables = torch.randperm(rows * each, device=DEVICE, dtype=torch.int32).view(rows, each)
            positions = torch.full((rows,), length - 1, device=DEVICE)
            q, out = random(rows, HEADS, WIDTH), random(rows, HEADS, WIDTH)
            nbytes = sum(t.nbytes for t in (*cache, *scales) if t is not None)
            name = str(kv).removeprefix("torch.")
            for fixed in (False, True):
                splits = paged.decode_splits(rows, KV_HEADS, length, fixed=fixed)
                scratch = paged.decode_scratch(rows, HEADS, WIDTH, splits, DEVICE)
                call = bind(
                    paged.decode_attention, q, *cache, positions, tables, None, *scales,
                    splits=splits, scratch=scratch, out=out,
                )  # fmt: skip
                report.row(
                    f"decode {name} {rows} x {length} splits={splits}{' fixed' if fixed else ''}", [call], nbytes
                )
            if kv == torch.bfloat16 and rows == 1:
                flat = [t.flatten(0, 1)[:length].transpose(0, 1)[None].contiguous() for t in cache]
                query = q.view(1, HEADS, 1, WIDTH)
                call = bind(scaled_dot_product_attention, query, *flat, enable_gqa=True)
                report.row(f"decode {name} {rows} x {length} (torch, not paged)", [call], nbytes)
            del cache, scales
    for rows in (512, 2048, 8192):
        each = rows // BLOCK
        cache = [random(each, BLOCK, KV_HEADS, WIDTH) for _ in "kv"]
        tables = torch.randperm(each, device=DEVICE, dtype=torch.int32).view(1, each)
        q, spans = random(rows, HEADS, WIDTH), torch.tensor([[0, rows, 0, 0]], device=DEVICE)
        operations = 2.0 * rows * rows * HEADS * WIDTH  # two products, half of each seen
        call = bind(paged.span_attention, q, *cache, spans, tables, None, out=torch.empty_like(q))
        report.row(f"prompt {rows}", [call], 4 * q.nbytes, operations)
        flat = [t.flatten(0, 1).transpose(0, 1)[None].contiguous() for t in cache]
        query = q.transpose(0, 1)[None].contiguous()
        call = bind(scaled_dot_product_attention, query, *flat, is_causal=True, enable_gqa=True)
        report.row(f"prompt {rows} (torch, not paged)", [call], 4 * q.nbytes, operations)


def small(report: Report) -> None:
    for rows in (1, 16, 2048):
        x, delta, weight, out = random(rows, DIM), random(rows, DIM) * 0, random(DIM), random(rows, DIM)
        call = bind(fused.add_rms_norm, x, delta, weight, 1e-5, out)
        report.row(f"add+norm rows={rows}", [call], 4 * x.nbytes)
        both, half = random(rows, 2 * HIDDEN), random(rows, HIDDEN)
        report.row(f"gate rows={rows}", [bind(fused.silu_mul, both, half)], both.nbytes + half.nbytes)
        report.row(
            f"gate rows={rows} (torch)",
            [lambda b=both: silu(b[:, :HIDDEN]) * b[:, HIDDEN:]],
            both.nbytes + half.nbytes,
        )
        whole = random(rows, (HEADS + 2 * KV_HEADS) * WIDTH)
        q, k, v = (t.unflatten(1, (-1, WIDTH)) for t in whole.split([DIM, KV_HEADS * WIDTH, KV_HEADS * WIDTH], 1))
        angle = torch.rand(rows, WIDTH // 2, device=DEVICE)
        slots = torch.arange(rows, device=DEVICE)
        cache = [random(-(-rows // BLOCK), BLOCK, KV_HEADS, WIDTH) for _ in "kv"]
        placed = torch.empty(rows, HEADS, WIDTH, device=DEVICE, dtype=torch.bfloat16)
        call = bind(fused.place_write, q, k, v, angle.cos(), angle.sin(), slots, *cache, out=placed)
        report.row(f"place rows={rows}", [call], 2 * whole.nbytes + 2 * angle.nbytes)


def experts(report: Report) -> None:
    """Llama 4 Scout's: 16 of [8192, 5120], each row one of them."""
    stacked = packed.stack([packed.plain(random(8192, 5120)) for _ in range(16)])
    for rows in (1, 8, 64, 1024):
        counts = torch.bincount(torch.randint(0, 16, (rows,), device=DEVICE), minlength=16)
        used = int((counts > 0).sum())
        x, out = random(rows, 5120), random(rows, 8192)
        call = bind(products.expert_product, x, stacked, counts, out=out)
        report.row(f"experts rows={rows} ({used} used)", [call], stacked.nbytes / 16 * used, 2.0 * rows * 8192 * 5120)
    w = stacked.codes[0]
    report.row("one expert, 64 rows (torch)", [bind(linear, random(64, 5120), w)], w.nbytes, 2.0 * 64 * 8192 * 5120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="also write everything to this file")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    why = triton.missing()
    if why is not None:
        sys.exit(f"no GPU kernels to measure: {why}")
    torch.manual_seed(0)
    where = torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}\n")
    report = Report(args.only)
    limits(report)
    print()
    with torch.inference_mode():
        for part in (matrix_products, attention, small, experts):
            part(report)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"device": where, "torch": torch.__version__, "limits": report.limits, "rows": report.rows}, file)


if __name__ == "__main__":
    main()
