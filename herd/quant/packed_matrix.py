"""A quantized matrix in the form that GPU kernels read, in place of the blocks it was made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from herd.kernels import packed
from herd.kernels.packed import Packed
from herd.kernels.products import product
from herd.quant.fp8 import Fp8Matrix
from herd.quant.matrix import Matrix
from herd.quant.packing import PACKS, pack
from herd.quant.scheme import QuantTensor

__all__ = ["PackedMatrix", "pack_matrix", "pack_together"]


class PackedMatrix(Matrix):
    """A Packed where a `Matrix` is wanted; `like` is the matrix whose values it has. There are no blocks and no panels."""

    __slots__ = ("packed",)

    def __init__(self, weight: Packed, like: Matrix) -> None:
        assert (weight.rows, weight.columns) == (like.rows, like.columns)
        self.packed, self.type, self.rows, self.columns = weight, like.type, like.rows, like.columns
        self.blocks, self.panels, self.activations = None, None, None

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def pack(self, panels: Tensor | None = None) -> bool:
        return False

    def drop(self) -> None:
        """There is nothing beside the packed form."""

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., columns] -> x W^T [..., rows] in x's dtype. Gradients do not pass: adapters that are trained need blocks."""
        return product(x.reshape(-1, self.columns), self.packed).view(*x.shape[:-1], self.rows)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.packed.dequantize(dtype or torch.float32)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        flat = ids.flatten()
        return _rows(self.packed, flat).dequantize(dtype).view(*ids.shape, self.columns)

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Follow a module to another device; a change of dtype leaves codes and scales as they are."""
        device = to(torch.empty(0, dtype=torch.uint8, device=self.packed.codes.device)).device
        self.packed = self.packed.to(device)


def pack_matrix(matrix: Matrix) -> PackedMatrix | None:
    """`matrix` packed; None where that would lose something: blocks of a type without a packed form, rounded activations."""
    if isinstance(matrix, PackedMatrix):
        return matrix
    if matrix.activations is not None:
        return None
    if isinstance(matrix, Fp8Matrix):
        made = Packed("fp8", matrix.rows, matrix.columns, matrix.weight.contiguous(), matrix.scale.contiguous())
        return PackedMatrix(made, matrix)
    if type(matrix) is not Matrix or matrix.blocks is None or matrix.type.name not in PACKS:
        return None
    return PackedMatrix(pack(QuantTensor(matrix.blocks, matrix.type, (matrix.rows, matrix.columns))), matrix)


def pack_together(matrices: Sequence[Matrix]) -> tuple[Packed, list[PackedMatrix]] | None:
    """Matrices of the same inputs as one Packed, and each as a view of it; None when they are of different kinds."""
    if len({matrix.type.name for matrix in matrices}) > 1:
        return None
    each = [pack_matrix(matrix) for matrix in matrices]
    parts = [one.packed for one in each if one is not None]
    if len(parts) < len(matrices) or len({(part.kind, part.columns) for part in parts}) > 1:
        return None
    whole, views, at = packed.join(parts), [], 0
    for matrix, part in zip(matrices, parts, strict=True):
        views.append(PackedMatrix(_rows(whole, slice(at, at + part.rows)), matrix))
        at += part.rows
    return whole, views


def _rows(weight: Packed, at: Tensor | slice) -> Packed:
    """Some rows: a slice gives views."""
    codes = weight.codes
    if isinstance(at, slice) or codes.dtype != torch.float8_e4m3fn:
        codes = codes[at]
    else:  # torch gathers no float8
        codes = codes.view(torch.uint8)[at].view(codes.dtype)
    others = (
        None if part is None else part[at] for part in (weight.scale, weight.sub, weight.minimum, weight.sub_minimum)
    )
    return Packed(weight.kind, len(codes), weight.columns, codes, *others)
