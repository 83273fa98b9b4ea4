"""Large float32 products x W^T while a model is trained, by oneDNN where that beats the library behind torch.mm.

torch brings two: MKL, which torch.mm asks in float32, and oneDNN. On processors of AMD with AVX-512 oneDNN's products are 1.1 to
1.2 x as fast on two threads (a whole step of full tuning 1.04 x, a model of 66 M). Who multiplies follows from the processor and
the shapes alone, so that a run is the same bits every time.

Letters: T rows, K columns of x, N rows of W.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["available", "fits", "linear", "product"]

_LEAST = 1 << 24
"""Multiplications below which the call costs more than is gained."""


@functools.cache
def available() -> bool:
    """Whether this processor and torch are such."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not known or "AVX512" not in torch.backends.cpu.get_cpu_capability():
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


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K] of any strides -> x W^T [T, N]; without gradients of its own."""
    large = x.dtype == torch.float32 and x.is_cpu and x.numel() * len(weight) >= _LEAST
    if large and available() and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


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
        by_x = product(flat, weight.T).view(x.shape) if ctx.needs_input_grad[0] else None
        return by_x, flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
