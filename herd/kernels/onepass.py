"""Norm, gate, rotation and loss while a model is trained on a CPU: each forward and backward in one pass of the native library.

As chains of torch's operations they read and write every number several times, and keep what is between for the backward pass.
Callers ask `fits` and otherwise compute the definition, which is theirs; results agree within float32's (bfloat16's) rounding.

Letters: T rows, D columns.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from herd.kernels import native
from herd.kernels.border import Pass, library

__all__ = ["fits", "gate", "learn_rows", "rms_norm", "rotate", "takes"]

_KINDS = {torch.float32: 0, torch.bfloat16: 30}
_NORM, _NORM_BACK, _GATE, _GATE_BACK, _TURN, _LEARN = range(6)
_PART = 32
"""Rows whose weight gradients are one partial sum; csrc/abi.h has the same number."""
_WIDEST = 1024


def fits(*tensors: Tensor) -> bool:
    """Whether a step over these is part of training, and one that the library computes: same dtype, rows of whole 16s."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    first = tensors[0]
    plain = all(type(t) in (Tensor, Parameter) and t.dtype == first.dtype for t in tensors)
    return plain and any(t.requires_grad for t in tensors) and takes(first)


def takes(x: Tensor) -> bool:
    """Whether the library computes with rows like those of x."""
    return x.is_cpu and x.dtype in _KINDS and x.shape[-1] % 16 == 0 and x.numel() > 0 and native.isa() is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """round(x / rms(x)) * weight over the last dimension, as `herd.model.norm`. x [..., D], weight [D] of x's dtype."""
    return _Norm.apply(x, weight, eps)  # pyright: ignore[reportReturnType] (torch gives apply no types)


def gate(a: Tensor, b: Tensor) -> Tensor:
    """round(silu(a)) * b, of one shape and dtype."""
    return _Gate.apply(a, b)  # pyright: ignore[reportReturnType]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Neighbouring pairs of x [..., H, D] turned by angles whose cos and sin are [..., 1, D / 2] float32, as `herd.model.rope`.

    None where there are not as many angles as rows, or heads are wider than any.
    """
    if cos.numel() * 2 * x.shape[-2] != x.numel() or x.shape[-1] > _WIDEST:
        return None
    return _Turn.apply(x, cos.contiguous(), sin.contiguous())  # pyright: ignore[reportReturnType]


def learn_rows(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """-log p(label) of rows of logits [T, V] float32 or bfloat16, labels [T] int64 -> [T] float32.

    With `gradient` the logits become that of the sum of losses, p - (1 at the label).
    """
    assert logits.is_contiguous()
    assert labels.is_contiguous()
    assert labels.shape == logits.shape[:1]
    assert labels.dtype == torch.int64
    losses = torch.empty(len(labels))
    if len(labels) == 0:
        return losses
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:  # not an `assert`: other memory would be read
        raise IndexError(f"labels {low} to {high} of {logits.shape[1]}")
    _over(_LEARN, logits, a=logits, by_a=logits if gradient else None, labels=labels, losses=losses)
    return losses


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        assert weight.shape == x.shape[-1:]
        out, scales = torch.empty_like(x), torch.empty(x.shape[:-1])
        _over(_NORM, x, eps=eps, a=x, weight=weight, out=out, scales=scales)
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, scales = ctx.saved_tensors
        by_x, parts = torch.empty_like(x), None
        if ctx.needs_input_grad[1]:
            parts = torch.empty(-(-x[..., 0].numel() // _PART), x.shape[-1])
        operands = {
            "a": x,
            "weight": weight,
            "scales": scales,
            "grad": grad.contiguous(),
            "by_a": by_x,
            "by_weight": parts,
        }
        _over(_NORM_BACK, x, **operands)
        return by_x, None if parts is None else parts.sum(0).to(weight.dtype), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        assert a.shape == b.shape
        out = torch.empty_like(a)
        _over(_GATE, a, a=a, b=b, out=out)
        ctx.save_for_backward(a, b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b = ctx.saved_tensors
        by_a, by_b = torch.empty_like(a), torch.empty_like(b)
        _over(_GATE_BACK, a, a=a, b=b, grad=grad.contiguous(), by_a=by_a, by_b=by_b)
        return by_a, by_b


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, way: float) -> Tensor:
    x = x.contiguous()
    out, heads = torch.empty_like(x), x.shape[-2]
    _over(_TURN, x, eps=way, heads=heads, a=x, out=out, cos=cos, sin=sin)
    return out


def _over(what: int, rows: Tensor, *, eps: float = 0.0, heads: int = 1, **operands: Tensor | None) -> None:
    """One pass over `rows` [..., columns], or [T, heads, columns]."""
    count = rows.numel() // rows.shape[-1] // heads
    given = {name: t for name, t in operands.items() if t is not None}
    for tensor in given.values():
        assert tensor.is_contiguous()
        assert tensor.is_cpu
    pointers = {name: tensor.data_ptr() for name, tensor in given.items()}
    asked = Pass(what, _KINDS[rows.dtype], count, rows.shape[-1], heads, eps, **pointers)
    threads = torch.get_num_threads()
    scratch = torch.empty(library().herd_pass_scratch(threads), dtype=torch.uint8)
    library().herd_pass(byref(asked), threads, scratch.data_ptr())
