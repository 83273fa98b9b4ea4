"""One byte a value and scales beside it: scaled FP8 and int8, whatever the file calls its tensors.

A scale is for the whole matrix, for each row (output), for a run of columns of each row, or for a rectangle of rows and columns;
the last row and column of rectangles may be cut. x = scale * (weight - zero).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from herd.checkpoint.quantized.module import INTEGERS, WIDE, Module, Packed

if TYPE_CHECKING:
    from torch import Tensor

    from herd.checkpoint.quantized.module import Stored

__all__ = ["FP8_KIND", "Scaled"]

FP8_KIND = "FP8"
"""What `herd.quant.fp8` calls float8_e4m3fn rows with a float32 scale each."""

WORDS = {"float8_e4m3fn": "F8_E4M3", "int8": "INT8"}


class Scaled(Packed):
    """`weight` float8_e4m3fn or int8 [out, in], scales in tensor `scale`, rectangles of `block` (rows, columns) if given."""

    def __init__(
        self, module: Module, scale: str, *, block: tuple[int, int] | None = None, zero: str | None = None
    ) -> None:
        super().__init__(module)
        rows, columns = module.shape
        self._float = module.expect("weight", tuple(WORDS), (rows, columns)).number == "float8_e4m3fn"
        self.word = WORDS[module.describe("weight").number]
        self._scale, self._zero, self._block = scale, zero, block
        found = module.expect(scale, WIDE).shape
        if block is not None:
            shapes: tuple[tuple[int, ...], ...] = ((-(-rows // block[0]), -(-columns // block[1])),)
        else:
            shapes = ((), (1,), (1, 1), (rows,), (rows, 1))
            if len(found) == 2 and found[0] == rows and found[1] > 1 and columns % found[1] == 0:
                shapes += (found,)
        module.expect(scale, WIDE, *shapes)
        if zero is not None:
            module.expect(zero, INTEGERS, *shapes)
        if module.has("bias"):
            module.expect("bias", WIDE, (rows,))
        self._groups = found[1] if len(found) == 2 else 1

    @property
    def likely(self) -> str | None:
        if self._float or self._zero is not None:
            return None
        run = self.shape[1] // self._groups if self._block is None else self._block[1]
        half = self.module.describe(self._scale).number in ("float16", "bfloat16")
        return "Q8_0" if half and run % 32 == 0 else None

    def numbers(self) -> Tensor:
        from herd.checkpoint.quantized.gptq import zero_bias

        zero_bias(self.module)
        return self.module.tensor("weight")

    def scaling(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        import torch

        scales, groups = self._spread(self.module.finite(self._scale)), None
        zeros = None if self._zero is None else self._spread(self.module.tensor(self._zero))
        if self._block is not None:
            groups = torch.arange(self.shape[1]) // self._block[1]
        return scales, zeros, groups

    def holder(self) -> str | None:
        if self._float:
            return FP8_KIND if self._groups == 1 and self._block is None and self._zero is None else None
        return super().holder()

    def why_not(self) -> str:
        return "a row has several scales" if self._float else super().why_not()

    def blocks(self, kind: str) -> Stored:
        if kind != FP8_KIND:
            return super().blocks(kind)
        from herd.quant.fp8 import Fp8Tensor

        scales = self.scaling()[0].float().flatten()
        return Fp8Tensor(self.numbers(), scales.expand(self.shape[0]).contiguous())

    def _spread(self, scales: Tensor) -> Tensor:
        """[out or 1, groups], of any stored shape."""
        if self._block is not None:
            return scales.repeat_interleave(self._block[0], dim=0)[: self.shape[0]]
        return scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(self.shape[0], -1)
