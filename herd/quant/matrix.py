"""One stored matrix: the blocks of a file, the native library's panels made of them, or both.

Blocks that are views of a mapped file cost memory only while they are read; panels are what products read on a CPU. A tied
embedding and output share one matrix: rows are looked up in blocks, products use panels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from herd.errors import ConfigError
from herd.kernels import native
from herd.kernels.reference import rounded
from herd.quant.panels import PANEL, unpack
from herd.quant.scheme import BlockType, QuantTensor

__all__ = ["Matrix", "frozen_product", "split_blocks"]

_NATIVE_INPUTS = (torch.float32, torch.bfloat16, torch.float16)


class Matrix:
    """A weight [rows, columns] in a type of `herd.quant.scheme`, quantized or plain.

    `blocks` is None once `drop` was called; `panels` is None until `pack` made them, and away from the CPU. `activations` 8:
    products round their inputs to 8 bits wherever they run (W8A8); None: where native kernels do so anyway.
    """

    __slots__ = ("activations", "blocks", "columns", "panels", "rows", "type")

    def __init__(self, tensor: QuantTensor, activations: int | None = None) -> None:
        assert activations in (None, 8)
        if len(tensor.shape) != 2 or not (tensor.type.decodable or tensor.type.dtype in _NATIVE_INPUTS):
            raise ValueError(f"{tensor.type.name} of shape {tensor.shape} is no matrix that herd multiplies with")
        self.type: BlockType = tensor.type
        self.rows, self.columns = tensor.shape
        self.blocks: Tensor | None = tensor.blocks
        self.panels: native.Weight | None = None
        self.activations = activations

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.rows * self.type.row_bytes(self.columns)

    def pack(self, panels: Tensor | None = None) -> bool:
        """Give the native library what it multiplies with; False where it cannot: no library, another device or type.

        `panels`: made before, uint8 as `native.pack` gives them.
        """
        if panels is not None:
            assert panels.numel() == native.packed_bytes(self.type.id, self.rows, self.columns)
            self.panels = native.Weight(panels, self.type.id, self.rows, self.columns)
        elif self.panels is None and self.blocks is not None and self.blocks.is_cpu and native.isa() is not None:
            if self.type.dtype is not None:
                self.panels = native.plain(self.blocks.view(self.type.dtype))
            elif native.packs(self.type.id):
                self.panels = native.pack(self.type.id, self.blocks.contiguous(), self.columns)
        return self.panels is not None

    def drop(self) -> None:
        """Forget blocks that panels replace: for blocks in memory of their own. Rows and values then come from the panels."""
        if self.panels is not None and self.type.dtype is None:
            self.blocks = None

    def part(self, dim: int, start: int, count: int) -> Matrix:
        """`count` rows (`dim` 0) or columns (1) from `start` as a matrix of their own, of the same numbers.

        Raises ConfigError for columns that are no whole blocks.
        """
        if self.blocks is None and self.panels is None:
            raise ConfigError(f"parallel.tp cannot cut matrices held as {self.type.name}")
        blocks = self._blocks()
        if dim == 0:
            rows, columns, kept = count, self.columns, blocks[start : start + count]
        else:
            if start % self.type.values or count % self.type.values:
                raise split_blocks(self.type, count)
            rows, columns = self.rows, count
            kept = blocks[:, self.type.row_bytes(start) : self.type.row_bytes(start + count)]
        made = Matrix(QuantTensor(kept.clone(), self.type, (rows, columns)), self.activations)
        if self.panels is not None:
            made.pack()
        return made

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., columns] -> x W^T [..., rows] in x's dtype.

        Natively with 8-bit activations (a scale per 128 columns) where panels are and no gradient is asked for; otherwise
        with the dequantized matrix, and with `activations` 8 in float32 on inputs rounded in the same way. Where gradients are
        wanted nothing is rounded: rounding has none.
        """
        wanted = torch.is_grad_enabled() and x.requires_grad
        if self.panels is not None and x.is_cpu and x.dtype in _NATIVE_INPUTS and not wanted:
            return native.matmul(self.panels, x.float()).to(x.dtype)
        if self.activations is not None and not wanted:
            return linear(rounded(x.float()), self.dequantize()).to(x.dtype)
        return frozen_product(x, self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values [rows, columns] in `dtype` (None: float32), rounded once."""
        return self._values(self._blocks(), dtype)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` [...] int as values [..., columns]."""
        flat = ids.flatten()
        if self.blocks is None:
            blocks = unpack(self._panel_rows()[flat // PANEL], self.type)
            blocks = blocks[torch.arange(len(flat)) * PANEL + flat % PANEL]
        else:
            blocks = self.blocks[flat]
        if blocks.is_cpu and native.packs(self.type.id):  # the same bits: one call, where torch makes twenty
            return native.values(self.type.id, blocks, self.columns).to(dtype).view(*ids.shape, self.columns)
        return self._values(blocks, dtype).view(*ids.shape, self.columns)

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Apply a module's move (`nn.Module._apply`) to the blocks. Raises ConfigError when only panels are left and the move
        leads away from the CPU."""
        if self.blocks is None:
            if to(torch.empty(0, dtype=torch.uint8)).device.type != "cpu":
                raise ConfigError("these weights were packed for this processor: load the model on the other device")
            return
        moved = to(self.blocks)
        if moved.device != self.blocks.device:
            self.panels = None
        self.blocks = moved

    def _blocks(self) -> Tensor:
        if self.blocks is not None:
            return self.blocks
        return unpack(self._panel_rows(), self.type)[: self.rows]

    def _panel_rows(self) -> Tensor:
        assert self.panels is not None  # one of both is always there
        return self.panels.storage.view(-(-self.rows // PANEL), -1)

    def _values(self, blocks: Tensor, dtype: torch.dtype | None) -> Tensor:
        if self.type.dtype is not None:
            return blocks.view(self.type.dtype).to(dtype or torch.float32)
        return QuantTensor(blocks, self.type, (len(blocks), self.columns)).dequantize(dtype)


def split_blocks(kind: BlockType, count: int) -> ConfigError:
    """The refusal of `count` columns that are no whole blocks."""
    return ConfigError(
        f"parallel.tp: a share of {count} columns of a quantized matrix is no whole number of {kind.name}'s blocks of "
        f"{kind.values}: choose fewer ranks for parallel.tp"
    )


def frozen_product(x: Tensor, matrix: Matrix) -> Tensor:
    """x [..., columns] -> x W^T [..., rows] with the dequantized matrix in x's dtype.

    For the gradient of x the matrix is dequantized once more instead of being kept: a model that is trained through its
    quantized weights needs one of them in plain numbers at a time.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Frozen.apply(x, matrix)  # pyright: ignore[reportReturnType] (torch gives apply no types)
    return linear(x, matrix.dequantize(x.dtype))


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        return linear(x, matrix.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.matrix.dequantize(grad.dtype), None
