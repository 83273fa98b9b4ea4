"""Quantized matrices of known size that nobody made yet: for models of which each rank makes its part (`herd.model.late`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from herd.model.late import promise, promises
from herd.model.llama import Llama
from herd.model.moe import Experts
from herd.quant.apply import Stored, experts_of, matrix_of
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from herd.quant.matrix import Matrix
from herd.quant.scheme import BlockType

__all__ = ["LateMatrix", "maker_of", "put_later"]


class LateMatrix(Matrix):
    """A matrix [rows, columns] of `type` whose numbers `make` gives. It computes as what is made for that moment would."""

    __slots__ = ("_made", "make")

    def __init__(self, make: Callable[[], Matrix], rows: int, columns: int, type: BlockType) -> None:
        self.make, self.rows, self.columns, self.type = make, rows, columns, type
        self.blocks, self.panels, self.activations = None, None, None
        self._made: Matrix | None = None

    @property
    def nbytes(self) -> int:
        return -(-self.rows * self.columns // self.type.values) * self.type.nbytes

    def now(self) -> Matrix:
        """The matrix itself, made once: what shares it (a tied output) goes on sharing."""
        if self._made is None:
            self._made = self.make()
        return self._made

    def part(self, dim: int, start: int, count: int) -> LateMatrix:
        rows, columns = (count, self.columns) if dim == 0 else (self.rows, count)
        return LateMatrix(lambda: self.make().part(dim, start, count), rows, columns, self.type)

    def pack(self, panels: Tensor | None = None) -> bool:
        return False

    def multiply(self, x: Tensor) -> Tensor:
        """As the matrix, which is forgotten again."""
        return self.make().multiply(x)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """As the matrix, which is forgotten again."""
        return self.make().dequantize(dtype)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """As the matrix, which is forgotten again."""
        return self.make().look_up(ids, dtype)


def maker_of(module: nn.Module) -> Callable[[], Tensor]:
    """How to make the whole matrix of `module`, plain or quantized, in plain numbers, whatever part of it is here later."""
    if isinstance(module, QuantLinear | QuantEmbedding):
        return module.matrix.dequantize
    return promises(module)["weight"]


def put_later(
    model: Llama, name: str, shape: tuple[int, ...], kind: BlockType, dtype: torch.dtype, make: Callable[[], Stored]
) -> None:
    """As `herd.quant.apply.put` of what `make` will give, of `shape` and `kind`."""
    home, _, field = name.rpartition(".")
    module = model.get_submodule(home)
    if isinstance(module, Experts | QuantExperts):
        if not isinstance(module, QuantExperts):
            module = QuantExperts()
            model.set_submodule(home, module)
        count, rows, columns = shape
        each = [LateMatrix(lambda e=e: experts_of(make(), own=True)[e], rows, columns, kind) for e in range(count)]
        setattr(module, field, tuple(each))
        promise(module, field, lambda: module.own(field, experts_of(make(), own=True)))
        return
    tied, looked_up = model.config.tie_embeddings, home == "tok_embeddings"
    rows, columns = shape
    matrix = LateMatrix(lambda: matrix_of(make(), own=True, rows_alone=looked_up and not tied), rows, columns, kind)
    made = QuantEmbedding(matrix, dtype) if looked_up else QuantLinear(matrix)
    model.set_submodule(home, made)
    _promise(made)
    if looked_up and tied:
        output = QuantLinear(matrix)
        model.set_submodule("output", output)
        _promise(output)


def _promise(module: QuantLinear | QuantEmbedding) -> None:
    def now() -> Matrix:
        assert isinstance(module.matrix, LateMatrix)  # this rank's part of it, by now
        return module.matrix.now()

    promise(module, "matrix", now)
