"""Encoding speed: values to blocks, herd beside llama.cpp's reference rows, on random weights larger than the caches.

    python benchmarks/quantize.py [--megavalues 64] [--repeats 5] [--threads 1]

Both take turns in one process, each on the same float32 matrix. llama.cpp's `ggml_quantize_chunk` is what llama-quantize calls
for every piece of a tensor; it computes on one thread, so with --threads 1 both have one core. Rates are medians in millions
of values a second, by the clock and by CPU time of the process (the honest figure when other programs run); the spread
is (slowest - fastest) / median of the clock. Without llama-cpp-python only herd is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from herd.quant.encode import ENCODED, encode
from herd.quant.scheme import block_type

SLOW = ("Q4_K", "Q5_K", "Q6_K")
"""Types whose encoder searches: an eighth of the values is enough."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megavalues", type=int, default=64, help="millions of values (4 bytes each)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="herd's threads; llama.cpp has one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    print(f"hardware: {cpu or platform.processor()}, {os.cpu_count()} cores, load {load}; torch {torch.__version__}")
    print(f"{time.strftime('%Y-%m-%d')}; python {' '.join(sys.argv)}")
    weights = torch.randn(args.megavalues * 1_000_000 // 4096, 4096, generator=torch.Generator().manual_seed(0))
    print(f"{'':6} {'who':>10} {'clock':>8} {'CPU':>8} {'spread':>7}  million values/s")
    for kind in ENCODED:
        values = weights[: len(weights) // 8] if kind in SLOW else weights
        peers: dict[str, Callable[[], object]] = {"herd": lambda v=values, k=kind: encode(v, k)}
        theirs = None if kind in ("F32", "F16", "BF16") else llama_cpp(values, kind)
        if theirs is not None:
            peers["llama.cpp"] = theirs
        if kind == "F32":
            continue  # nothing to do
        for name, (clock, cpu_time, spread) in measure(peers, args.repeats).items():
            size = values.numel() / 1e6
            print(f"{kind:6} {name:>10} {size / clock:8.1f} {size / cpu_time:8.1f} {spread:7.0%}", flush=True)


def measure(peers: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float, float]]:
    """Name -> median seconds by the clock, median CPU seconds, spread. Every peer runs once before."""
    clock: dict[str, list[float]] = {name: [] for name in peers}
    cpu: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(repeats + 1):
        for name, run in peers.items():
            started, used = time.perf_counter(), time.process_time()
            run()
            if turn:
                clock[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - used)
    return {
        name: (
            statistics.median(clock[name]),
            statistics.median(cpu[name]),
            (max(clock[name]) - min(clock[name])) / statistics.median(clock[name]),
        )
        for name in peers
    }


def llama_cpp(values: torch.Tensor, kind: str) -> Callable[[], object] | None:
    """A run of llama.cpp's encoder into memory of its own, or None where it is not installed."""
    found = importlib.util.find_spec("llama_cpp")
    type_ = block_type(kind)
    if found is None or found.origin is None or type_ is None:
        return None
    library = ctypes.CDLL(str(next((Path(found.origin).parent / "lib").glob("*ggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]

    def run() -> torch.Tensor:
        out = torch.empty(len(values), type_.row_bytes(values.shape[1]), dtype=torch.uint8)
        library.ggml_quantize_chunk(type_.id, values.data_ptr(), out.data_ptr(), 0, len(values), values.shape[1], None)
        return out

    return run


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


if __name__ == "__main__":
    main()
