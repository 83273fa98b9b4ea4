"""One matrix in the form of another tool: the stored tensors it is made of, and what every such form can say of itself."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from herd.checkpoint.store import TensorFile, TensorInfo
from herd.errors import CheckpointError
from herd.quant.scheme import block_type

if TYPE_CHECKING:
    from torch import Tensor

    from herd.quant.fp8 import Fp8Tensor
    from herd.quant.grouped import Grouped
    from herd.quant.scheme import QuantTensor

    Stored = QuantTensor | Fp8Tensor

__all__ = ["INTEGERS", "WIDE", "Module", "Packed"]

MOST_BYTES = 1 << 20
"""Of a tensor that holds text or a table."""

WIDE = ("float32", "bfloat16", "float16", "float64")
INTEGERS = ("uint8", "int8", "int16", "int32", "int64")


class Module:
    """The tensors whose names begin with `name` and a dot, for a weight of `shape` (out, in) that the config describes.

    `taken` collects the names that were read: what is left in the file is nobody's.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], files: Mapping[str, TensorFile], where: str | os.PathLike[str]
    ) -> None:
        self.name, self.shape, self.where = name, shape, where
        self._files = files
        self.taken: dict[str, None] = {}

    def has(self, part: str) -> bool:
        """Whether there is a tensor `part` ("qweight", "weight.absmax")."""
        return f"{self.name}.{part}" in self._files

    def describe(self, part: str) -> TensorInfo:
        """Shape and dtype of `part`, which becomes one of the tensors that were read. Raises CheckpointError when missing."""
        full = f"{self.name}.{part}"
        if full not in self._files:
            beside = next((self._files[name].path for name in self.taken), self.where)
            raise CheckpointError(
                "is missing: without it the quantized weight cannot be read. Fetch the checkpoint again",
                path=beside,
                tensor=full,
            )
        self.taken[full] = None
        return self._files[full].describe(full)

    def expect(self, part: str, numbers: tuple[str, ...], *shapes: tuple[int, ...]) -> TensorInfo:
        """`describe`, where the dtype must be one of `numbers` and the shape one of `shapes` (any, when none is given)."""
        info = self.describe(part)
        if info.number not in numbers:
            self.fail(part, f"is {info.number}, expected {' or '.join(numbers)}")
        if shapes and info.shape not in shapes:
            wanted = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
            self.fail(part, f"has shape {info.shape}; a weight of {self.shape} in this form has {wanted}")
        return info

    def tensor(self, part: str) -> Tensor:
        """The stored tensor, a view of the file."""
        full = f"{self.name}.{part}"
        return self._files[full].tensor(full)

    def bytes(self, part: str) -> bytes:
        """The bytes of a small tensor, without torch. Raises CheckpointError when it is stored with strides of its own."""
        full = f"{self.name}.{part}"
        span = self._files[full].span(full)
        if span is None or span.size > MOST_BYTES:
            self.fail(part, f"is no run of at most {MOST_BYTES:,} bytes")
        return self._files[full].map.bytes(*span)

    def finite(self, part: str) -> Tensor:
        """As `tensor`, for scales: raises CheckpointError when one is infinite or not a number."""
        values = self.tensor(part)
        if not bool(values.isfinite().all()):
            self.fail(part, "holds a value that is infinite or not a number: the file is damaged")
        return values

    def fail(self, part: str, why: str) -> NoReturn:
        """Raise CheckpointError about `part`."""
        full = f"{self.name}.{part}"
        path = self._files[full].path if full in self._files else self.where
        raise CheckpointError(why, path=path, tensor=full)

    @property
    def nbytes(self) -> int:
        """Of everything that was taken."""
        return sum(self._files[name].describe(name).nbytes for name in self.taken)

    def tensor_file(self, full: str) -> TensorFile:
        """The file of the tensor whose whole name is `full`."""
        return self._files[full]


class Packed:
    """A matrix as another tool stores it, its headers checked when it is made. `module.shape` is that of the values.

    `word` is what `TensorInfo.stored` says ("GPTQ4", "NF4"). Forms of integers give `numbers` and `scaling`; the others have
    `values` of their own.
    """

    word: str
    lowest, highest = -128, 127

    def __init__(self, module: Module) -> None:
        self.module = module

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.module.shape

    @property
    def nbytes(self) -> int:
        """In the file, scales and all."""
        return self.module.nbytes

    @property
    def likely(self) -> str | None:
        """The kind that most probably holds the values exactly, from headers alone: for plans. None: none will."""
        return None

    @property
    def likely_bytes(self) -> int:
        """What it takes in memory on a CPU and as GGUF: as the `likely` kind, else in 16 bits (FP8 rows, too: they are slow)."""
        count, kind = math.prod(self.shape), block_type(self.likely or "")
        return 2 * count if kind is None else count // self.shape[-1] * kind.row_bytes(self.shape[-1])

    def numbers(self) -> Tensor:
        """The stored integers [R, C]."""
        raise NotImplementedError

    def scaling(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(scales, zeros, group of each column), as `Grouped` wants them."""
        raise NotImplementedError

    def values(self) -> Tensor:
        """The weight in float32, as the format defines it."""
        return self._grouped(self.numbers()).dequantize()

    def holder(self) -> str | None:
        """The block type that holds the values exactly, or None. Reads scales and zeros, not the numbers."""
        return self._outline().holder()

    def holds(self, kind: str) -> bool:
        """Whether `blocks(kind)` has the exact values: the holder does, and integers of 4 bits are integers of 8 bits, too."""
        holder = self.holder()
        return kind == holder or (kind, holder) == ("Q8_0", "Q4_0")

    def why_not(self) -> str:
        """Why there is no holder."""
        return self._outline().why_not() or ""

    def blocks(self, kind: str) -> Stored:
        """The values in the form `kind`, one that `holds`."""
        return self._grouped(self.numbers()).blocks(kind)

    def parts(self) -> list[tuple[TensorFile, str]]:
        """The stored tensors behind it, in a fixed order: two forms whose parts are the same bytes have the same values."""
        return [(self.module.tensor_file(name), name) for name in self.module.taken]

    def release(self) -> None:
        """Let go of the file pages behind it."""
        for file, name in self.parts():
            file.release(name)

    def _grouped(self, numbers: Tensor) -> Grouped:
        from herd.quant.grouped import Grouped

        return Grouped(numbers, *self.scaling(), lowest=self.lowest, highest=self.highest)

    def _outline(self) -> Grouped:
        import torch

        return self._grouped(torch.empty(self.shape, dtype=torch.int8, device="meta"))
