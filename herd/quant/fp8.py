"""FP8 weights: one byte a value (float8_e4m3fn) and one float32 scale for each row.

x = scale * weight. The largest magnitude of a row becomes 448, the largest number of the type, so every value keeps three bits
behind its first one, over a range of 2^15 below the largest. Public FP8 checkpoints call such scales "channel" ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from herd.errors import CheckpointError
from herd.quant.matrix import Matrix, frozen_product
from herd.quant.scheme import BlockType

__all__ = ["FP8", "LARGEST", "Fp8Matrix", "Fp8Tensor", "encode_fp8"]

LARGEST = 448.0
"""Of float8_e4m3fn; it has no infinity."""

FP8 = BlockType(id=-1, name="FP8", values=1, nbytes=1, number="float8_e4m3fn")
"""Stands for the kind in plans and reports. It is no GGML type: no file may name it, and the scales lie beside the bytes."""


@dataclass(frozen=True, slots=True)
class Fp8Tensor:
    """`weight` [..., rows, columns] float8_e4m3fn and `scale` [..., rows] float32."""

    weight: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.weight.dtype != torch.float8_e4m3fn or self.scale.dtype != torch.float32:
            raise ValueError(f"{self.weight.dtype} weight with {self.scale.dtype} scale: wanted float8_e4m3fn, float32")
        if self.scale.shape != self.weight.shape[:-1]:
            raise ValueError(f"scale {tuple(self.scale.shape)} for a weight {tuple(self.weight.shape)}: one per row")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, multiplied in float32 and rounded once to `dtype`."""
        return self.weight.float().mul_(self.scale.unsqueeze(-1)).to(dtype)

    def __getitem__(self, index: int) -> Fp8Tensor:
        return Fp8Tensor(self.weight[index], self.scale[index])


def encode_fp8(values: Tensor, *, name: str | None = None) -> Fp8Tensor:
    """`values` [..., rows, columns], any float dtype, as FP8: scale = the row's largest magnitude / 448 (1 for rows of zeros),
    value / scale rounded to nearest, ties to even. Scratch memory is a few rows'.

    Raises CheckpointError, naming the tensor `name`, for values that are infinite or not a number.
    """
    flat = values.detach().reshape(-1, values.shape[-1])
    weight = torch.empty(flat.shape, dtype=torch.float8_e4m3fn, device=values.device)
    scale = torch.empty(len(flat), dtype=torch.float32, device=values.device)
    step = max(1, (1 << 20) // max(1, flat.shape[1]))
    for start in range(0, len(flat), step):
        rows = flat[start : start + step].float()
        top = rows.abs().amax(dim=1)
        if not bool(top.isfinite().all()):
            row = int((~top.isfinite()).nonzero()[0])
            raise CheckpointError(
                f"row {start + row} has a value that is infinite or not a number and cannot be stored as FP8: the weights are "
                "damaged or diverged",
                tensor=name,
            )
        # Below the smallest normal float32 a quotient is not exact, and such a row is zero to everybody.
        over = torch.where(top < LARGEST * torch.finfo(torch.float32).tiny, torch.ones_like(top), top / LARGEST)
        scale[start : start + step] = over
        weight[start : start + step] = (rows / over.unsqueeze(1)).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return Fp8Tensor(weight.view(values.shape), scale.view(values.shape[:-1]))


class Fp8Matrix(Matrix):
    """An FP8 weight [rows, columns] where a `Matrix` is wanted: `weight` [out, in] float8_e4m3fn, `scale` [out] float32.

    `multiply` is where a kernel comes in (`QuantLinear` and `QuantExperts` call nothing else): it gets x and these two tensors.
    Without one, the matrix is dequantized to x's dtype for every product. There are no panels.
    """

    __slots__ = ("scale", "weight")

    def __init__(self, tensor: Fp8Tensor) -> None:
        if tensor.weight.ndim != 2:
            raise ValueError(f"an FP8 tensor of shape {tuple(tensor.weight.shape)} is no matrix")
        self.weight, self.scale = tensor.weight, tensor.scale
        self.type = FP8
        self.rows, self.columns = tensor.weight.shape
        self.blocks, self.panels, self.activations = None, None, None

    @property
    def nbytes(self) -> int:
        return self.weight.numel() + 4 * self.scale.numel()

    def pack(self, panels: Tensor | None = None) -> bool:
        return False

    def drop(self) -> None:
        """Nothing stands in for the bytes."""

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., columns] -> x W^T [..., rows] in x's dtype."""
        return frozen_product(x, self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return Fp8Tensor(self.weight, self.scale).dequantize(dtype or torch.float32)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        flat = ids.flatten().to(self.weight.device)
        rows = Fp8Tensor(self.weight.view(torch.uint8)[flat].view(torch.float8_e4m3fn), self.scale[flat])
        return rows.dequantize(dtype).view(*ids.shape, self.columns)

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Follow a module to another device; a change of dtype (`module.half()`) leaves bytes and scales as they are."""
        device = to(torch.empty(0, dtype=torch.uint8, device=self.weight.device)).device
        self.weight, self.scale = self.weight.to(device), self.scale.to(device)
