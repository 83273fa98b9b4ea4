"""y = x W^T with weights that stay packed (`herd.kernels.packed`): plain torch here, Triton kernels on a CUDA device.

Letters: T rows, N and K the rows and columns of a weight, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from herd.kernels.ops import fake, on_cuda, operation
from herd.kernels.packed import FP8_LARGEST, Packed

__all__ = ["expert_product", "product", "scaled_product"]


def product(x: Tensor, weight: Packed, *, fixed: bool = False, out: Tensor | None = None) -> Tensor:
    """x [T, K] float32, float16 or bfloat16 -> x W^T [T, N] in x's dtype, summed in float32.

    On a GPU, values of grouped kinds are rounded once to x's dtype before they are multiplied. `fixed`: a row's bits do not
    depend on T; without it, each T has the fastest way that is known.
    """
    assert not weight.stacked
    assert x.shape[-1] == weight.columns
    out = x.new_empty(x.shape[0], weight.rows) if out is None else out
    product_out(x, weight.kind, weight.codes, weight.scale, weight.sub, weight.minimum, weight.sub_minimum, fixed, out)
    return out


def expert_product(
    x: Tensor, weight: Packed, counts: Tensor, *, fixed: bool = False, out: Tensor | None = None
) -> Tensor:
    """x [T, K] sorted by expert, a stack of E weights, counts [E] int64 summing to T -> [T, N], as `grouped_linear`.

    On a GPU the host does not wait for `counts`. Rows beyond their sum are not written.
    """
    assert weight.stacked
    assert x.shape[-1] == weight.columns
    out = x.new_zeros(x.shape[0], weight.rows) if out is None else out
    expert_product_out(
        x, weight.kind, weight.codes, weight.scale, weight.sub, weight.minimum, weight.sub_minimum, counts, fixed, out
    )
    return out


def scaled_product(x: Tensor, weight: Packed) -> Tensor:
    """fp8 times fp8 -> x W^T [T, N] bfloat16: x [T, K] is rounded to float8_e4m3fn, too, by the largest magnitude of each row.

    Twice the rate of bfloat16 on matrix units that have fp8 (compute capability 8.9 and later), at the price of activations with
    three bits of mantissa: for prompts, when asked for. K and N are multiples of 16.
    """
    assert weight.kind == "fp8"
    assert weight.scale is not None
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / FP8_LARGEST
    scale = scale.where(scale > 0, 1)
    codes = (wide / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
    if not x.is_cuda:
        return ((codes.float() * scale) @ (weight.codes.float() * weight.scale[:, None]).T).bfloat16()
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]: there is no public name for it
        codes, weight.codes.T, scale_a=scale, scale_b=weight.scale[None], out_dtype=torch.bfloat16, use_fast_accum=True
    )


@operation(mutates=("out",))
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
    """See product."""
    packed = Packed(kind, codes.shape[-2], x.shape[-1], codes, scale, sub, minimum, sub_minimum)
    out.copy_(linear(x, packed.dequantize(x.dtype)))


@operation(mutates=("out",))
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
    """See expert_product."""
    values = Packed(kind, codes.shape[-2], x.shape[-1], codes, scale, sub, minimum, sub_minimum).dequantize(x.dtype)
    start = 0
    for e, n in enumerate(counts.tolist()):
        out[start : start + n] = x[start : start + n] @ values[e].T
        start += n


@fake(product_out)
def _(
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
    return None


@fake(expert_product_out)
def _(
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
    return None


on_cuda(product_out, "product")
on_cuda(expert_product_out, "product")
