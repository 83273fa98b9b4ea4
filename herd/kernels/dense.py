"""Large float32 products while a model is trained, in the native library (csrc/dense.h): outputs and both gradients.

torch.mm asks MKL in float32. On processors of AMD with AVX-512 the library is 1.1 x as fast on outputs and on gradients by
weights, whose first operand lies the other way round; elsewhere nothing was measured, and torch multiplies. Who multiplies
follows from the processor and the shapes alone, so that a run is the same bits every time, whatever the number of threads.
A row of a result is the same bits whatever rows are computed beside it.

Letters: T rows, K columns of x, N rows of W; M, I, N of a product [M, I] [I, N].
"""

from __future__ import annotations

import functools
from ctypes import byref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from herd.kernels import native
from herd.kernels.border import Dense, library

__all__ = ["available", "fits", "linear", "multiply", "product"]

_LEAST = 1 << 24
"""Multiplications below which the call costs more than is gained."""
_FASTER = ("amx", "avx512bf16", "avx512")


@functools.cache
def available() -> bool:
    """Whether this processor is one where the library is faster, and the library is there."""
    if native.isa() not in _FASTER:
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a product of training that `linear` is for: plain float32 tensors on a CPU, large enough."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not available():
        return False
    plain = all(type(t) in (Tensor, Parameter) and t.is_cpu and t.dtype == torch.float32 for t in (x, weight))
    return plain and x.numel() * len(weight) >= _LEAST


def product(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K] of any strides -> x W^T [T, N]; without gradients of its own."""
    return multiply(x, weight.T, out)


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
    """a [M, I] b [I, N], of any strides -> [M, N], without gradients of its own.

    With `out`, a tensor whose rows are contiguous, the result is written there, or, with `add`, added to it.
    """
    large = a.dtype == b.dtype == torch.float32 and a.is_cpu and len(a) * b.numel() >= _LEAST
    if large and available() and not torch.compiler.is_compiling():
        return _natively(a, b, out, add)
    if out is None:
        return a @ b
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K], weight [N, K] -> x W^T [..., N], differentiable in both."""
    return _Linear.apply(x, weight)  # pyright: ignore[reportReturnType] (torch gives apply no types)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = grads[0].reshape(-1, len(weight))
        by_x = multiply(flat, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return by_x, multiply(flat.T, x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None


def _natively(a: Tensor, b: Tensor, out: Tensor | None, add: bool) -> Tensor:
    (rows, inner), columns = a.shape, b.shape[1]
    out = torch.empty(rows, columns) if out is None else out
    assert b.shape == (inner, columns)
    assert out.shape == (rows, columns)
    assert out.stride(1) == 1
    assert all(t.dtype == torch.float32 and t.is_cpu for t in (a, b, out))
    asked = Dense(
        rows, columns, inner, add, a.data_ptr(), *a.stride(), b.data_ptr(), *b.stride(), out.data_ptr(), out.stride(0)
    )  # fmt: skip
    threads = torch.get_num_threads()
    scratch = torch.empty(library().herd_dense_scratch(byref(asked), threads), dtype=torch.uint8)
    library().herd_dense(byref(asked), threads, scratch.data_ptr())
    return out
