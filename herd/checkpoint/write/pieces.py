"""The bytes of a tensor on their way into a file: a few megabytes at a time, whatever its layout in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from herd.checkpoint.write.planned import Planned
from herd.quant.scheme import QuantTensor

__all__ = ["PIECE", "pieces"]

PIECE = 8 << 20
"""Bytes handed out at a time: a view that is not contiguous is straightened piece by piece, not as a whole."""


def pieces(plan: Planned, made: Tensor | QuantTensor) -> Iterator[memoryview]:
    """Row-major little-endian bytes of `made`, which must be what `plan` says."""
    if isinstance(made, QuantTensor):
        stored, word, shape = made.blocks, made.type.name, made.shape
    else:
        stored, word, shape = made, _WORDS.get(made.dtype, str(made.dtype)), tuple(made.shape)
    assert (word, shape) == (plan.stored, plan.shape), (plan.name, word, shape)
    for part in _parts(stored.detach(), PIECE):
        yield part.reshape(-1).contiguous().view(torch.uint8).numpy().data


def _parts(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Pieces of at most about `limit` bytes in row-major order."""
    if tensor.is_contiguous():
        yield from tensor.reshape(-1).split(max(1, limit // tensor.itemsize)) if tensor.numel() else ()
        return
    row = tensor[0].numel() * tensor.itemsize
    if row > limit and tensor.ndim > 1:
        for inner in tensor:
            yield from _parts(inner, limit)
    else:
        yield from tensor.split(max(1, limit // max(row, 1)))


_WORDS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
