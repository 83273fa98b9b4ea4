"""GGML blocks as the GPU kernels read them (`herd.kernels.packed`): the same integers and scales, in another order.

Every value of the packed form is the value that `herd.quant.blocks` decodes, bit for bit. Types that are not in `PACKS` (Q4_1,
Q5_1, Q2_K, Q3_K) run on a GPU as plain bfloat16: dequantized once, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from herd.kernels import packed
from herd.kernels.packed import GROUP, Packed
from herd.quant import blocks as form
from herd.quant.scheme import QuantTensor

__all__ = ["PACKS", "pack"]

PACKS = {"Q4_0": "q4", "Q8_0": "q8", "Q5_0": "q8", "Q4_K": "q4k", "Q5_K": "q5k", "Q6_K": "q6k"}
"""GGML types with a packed form of the same values, and its kind."""


def pack(tensor: QuantTensor, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """A matrix [N, K], or experts [E, N, K], as a Packed on the same device; types without a packed form as plain `dtype`."""
    name, (*lead, columns) = tensor.type.name, tensor.shape
    rows = lead[-1]
    if tensor.type.dtype is not None:
        return packed.plain(tensor.blocks.view(tensor.type.dtype).view(tensor.shape))
    if name not in PACKS:
        return packed.plain(tensor.dequantize(dtype))
    b = tensor.blocks.reshape(-1, tensor.type.nbytes)

    def shaped(part: Tensor) -> Tensor:
        return part.reshape(*lead, -1).contiguous()

    match name:
        case "Q4_0":
            fields = {"codes": b[:, 2:], "scale": _half(b, 0)}
        case "Q8_0":
            fields = {"codes": b[:, 2:].contiguous().view(torch.int8), "scale": _half(b, 0)}
        case "Q5_0":
            codes = form.nibbles(b[:, 6:], 16).bitwise_or_(form.bits(b[:, 2:6]) << 4)
            fields = {"codes": codes.view(torch.int8) - 16, "scale": _half(b, 0)}
        case "Q6_K":
            codes = form.nibbles(b[:, :128], 64).bitwise_or_(form.planes(b[:, 128:192], 2) << 4)
            sub = b[:, 192:208].contiguous().view(torch.int8)
            fields = {"codes": codes.view(torch.int8) - 32, "scale": _half(b, 208), "sub": sub}
        case _:
            sub, low = form.k_integers(b)
            if name == "Q4_K":
                codes = _pairs(form.nibbles(b[:, 16:], 32))
            else:
                codes = form.nibbles(b[:, 48:], 32).bitwise_or_(form.planes(b[:, 16:48], 1) << 4).view(torch.int8)
            fields = {"codes": codes, "scale": _half(b, 0), "sub": sub, "minimum": _half(b, 2), "sub_minimum": low}
    return Packed(PACKS[name], rows, columns, **{key: shaped(part) for key, part in fields.items()})


def _half(b: Tensor, at: int) -> Tensor:
    return b[:, at : at + 2].contiguous().view(torch.float16)


def _pairs(codes: Tensor) -> Tensor:
    """[N, K] bytes of four bits -> [N, K / 2]: the nibbles of `herd.kernels.packed`."""
    runs = codes.unflatten(-1, (-1, 2, GROUP // 2))
    return (runs[..., 0, :] | (runs[..., 1, :] << 4)).flatten(-2)
