"""RMSNorm of rows, alone or after an addition: one program a row, which it holds in registers."""

# pyright: reportCallIssue=false, reportAssignmentType=false
# A launch takes options that no kernel has as parameters.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from herd.kernels.triton.launch import device_of, power

__all__ = ["add_rms_norm_out", "rms_kernel", "rms_norm_out"]


@triton.jit
def rms_kernel(
    x,
    delta,
    weight,
    out,
    x_stride,
    delta_stride,
    out_stride,
    eps,
    D: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < D
    h = tl.load(x + row * x_stride + i, inside, 0.0)
    if ADD:
        h = (h.to(tl.float32) + tl.load(delta + row * delta_stride + i, inside, 0.0).to(tl.float32)).to(h.dtype)
        tl.store(x + row * x_stride + i, h, inside)
    wide = h.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    normed = wide.to(h.dtype).to(tl.float32) * tl.load(weight + i, inside, 0.0).to(tl.float32)
    tl.store(out + row * out_stride + i, normed.to(h.dtype), inside)


def rms_norm_out(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See herd.kernels.fused.rms_norm."""
    _launch(x, None, weight, eps, out)


def add_rms_norm_out(x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """See herd.kernels.fused.add_rms_norm."""
    _launch(x, delta, weight, eps, out)


def _launch(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    rows, width = x.shape
    assert x.stride(1) == out.stride(1) == weight.stride(0) == 1
    other = x if delta is None else delta
    assert other.stride(1) == 1
    block = power(width)
    with device_of(x):
        rms_kernel[(rows,)](
            x,
            other,
            weight,
            out,
            x.stride(0),
            other.stride(0),
            out.stride(0),
            eps,
            D=width,
            ADD=delta is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
