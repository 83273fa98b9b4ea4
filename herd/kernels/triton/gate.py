"""silu(gate) * up, with torch's rounding between the two."""

# pyright: reportCallIssue=false, reportAssignmentType=false
# A launch takes options that no kernel has as parameters.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from herd.kernels.triton.launch import device_of, power

__all__ = ["silu_mul_kernel", "silu_mul_out"]

MOST = 1024
"""Columns of a program."""


@triton.jit
def silu_mul_kernel(gate_up, out, in_stride, out_stride, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < F
    gate = tl.load(gate_up + row * in_stride + i, inside, 0.0)
    up = tl.load(gate_up + row * in_stride + F + i, inside, 0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * out_stride + i, (silu * up).to(gate.dtype), inside)


def silu_mul_out(gate_up: Tensor, out: Tensor) -> None:
    """See herd.kernels.fused.silu_mul."""
    rows, width = out.shape
    assert gate_up.stride(1) == out.stride(1) == 1
    block = power(min(width, MOST))
    with device_of(out):
        silu_mul_kernel[(rows, triton.cdiv(width, block))](
            gate_up, out, gate_up.stride(0), out.stride(0), F=width, BLOCK=block, num_warps=max(1, block // 256)
        )
