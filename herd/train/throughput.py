"""How much of the machine a run uses: operations of a trained token, and the share of the peak they make (MFU).

Two countings of one speed, told side by side because both are found in publications:

- `weights`: two operations (multiply, add) for each weight a token meets in the forward pass, and twice that in the backward
  pass: the "6 N" of Kaplan et al., 2020. Attention counts nothing.
- `attention`: the same, and products of queries with the keys they may see (causal, chunked where the model is), with their
  values, and their gradients. A row counts as one document: packed documents see less, so this is an upper bound for them.

Frozen weights need no gradient of their own: with an adapter two thirds of that, and all three for the adapter itself. What
checkpointing computes again counts in neither: it is a share of useful work.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from herd.model.accounting import flops_per_token
from herd.model.config import ModelConfig
from herd.planning.devices import known_as

__all__ = ["Peak", "Work", "duration", "peak_of", "work_of"]


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of one trained token: `weights` alone, and with `attention` beside them."""

    weights: float
    attention: float


@dataclass(frozen=True, slots=True)
class Peak:
    """The most operations a second of one process's device; `source` says who says so."""

    flops: float
    source: str


def work_of(config: ModelConfig, length: int, trained: int | None = None) -> Work:
    """The work of a token in rows of `length` positions. `trained`: parameters of an adapter; None: all."""
    heads = 4 * config.n_heads * config.head_dim  # q k^T and its product with v, for one visible key
    weights = flops_per_token(config, 1) - heads * config.n_layers
    seen = sum(_seen(length, spec.chunk) for spec in config.layers)
    passes = 3.0 * weights if trained is None else 2.0 * weights + 6.0 * trained
    return Work(passes, passes + 3.0 * heads * seen)


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """The peak of `device` for products of `dtype`: from a data sheet for known GPUs, measured for a CPU, else None."""
    if device.type == "cpu":
        return _measured(dtype)
    if device.type != "cuda":
        return None
    found = known_as(torch.cuda.get_device_name(device))
    if found is None or dtype == torch.float32:
        return None
    tflops = found.tflops_fp8 if dtype == torch.float8_e4m3fn else found.tflops
    return None if tflops is None else Peak(tflops * 1e12, f"{found.name}'s data sheet")


def duration(seconds: float) -> str:
    """Seconds in two units that people read: "3 h 20 min", "45 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s" if whole < 600 else f"{round(whole / 60)} min"
    minutes = round(whole / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def _seen(length: int, chunk: int | None) -> float:
    """Visible keys of a position of a row, itself included, on average."""
    if chunk is None or chunk >= length:
        return (length + 1) / 2
    whole, rest = divmod(length, chunk)
    return (whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2) / length


def _measured(dtype: torch.dtype) -> Peak:
    """The best of a few products of 1024 x 1024 matrices: a quarter of a second at most.

    In seconds that the processor spent on each thread: by the clock, a machine with other work would look slow for the whole run.
    """
    a, b = (torch.ones(1024, 1024).to(dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + 0.25
    torch.mm(a, b)
    while best == float("inf") or time.perf_counter() < until:
        began = time.process_time()
        torch.mm(a, b)
        best = min(best, (time.process_time() - began) / torch.get_num_threads())
    return Peak(2 * 1024**3 / best, "matrix products measured here")
