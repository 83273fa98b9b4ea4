"""How GGUF files store weights: a table of block types, and the tensor made of such blocks.

A block is a run of `values` neighbouring numbers of one row in `nbytes` bytes; a row is whole blocks. Types whose blocks
hold one number of a torch dtype are plain; the others are decoded by `herd.quant.blocks`. The table is read for headers
alone, too, so torch is imported by what touches numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from herd.quant.numbers import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["BLOCK_TYPES", "BlockType", "QuantTensor", "block_type"]

CHUNK = 1 << 18
"""Values decoded at a time: their temporaries stay in the second-level cache, and a big tensor costs no big scratch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockType:
    """One of GGML's tensor types.

    `number` is the name of the torch dtype of a plain type, None for quantized ones; `decodable` tells those of the latter
    that herd can dequantize.
    """

    id: int
    name: str
    values: int
    nbytes: int
    number: str | None = None
    decodable: bool = False

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype of a plain type; None for quantized types."""
        return None if self.number is None else torch_dtype(self.number)

    @property
    def decode(self) -> Callable[[Tensor], Tensor] | None:
        """Blocks [N, nbytes] uint8 -> values [N, values] float32; None where herd has no decoder."""
        if not self.decodable:
            return None
        from herd.quant import blocks

        return getattr(blocks, self.name.lower())

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row. Raises ValueError unless it is whole blocks."""
        if columns % self.values:
            raise ValueError(f"a row of {columns} values is not whole {self.name} blocks of {self.values}")
        return columns // self.values * self.nbytes


BLOCK_TYPES: tuple[BlockType, ...] = (
    BlockType(id=0, name="F32", values=1, nbytes=4, number="float32"),
    BlockType(id=1, name="F16", values=1, nbytes=2, number="float16"),
    BlockType(id=2, name="Q4_0", values=32, nbytes=18, decodable=True),
    BlockType(id=3, name="Q4_1", values=32, nbytes=20, decodable=True),
    BlockType(id=6, name="Q5_0", values=32, nbytes=22, decodable=True),
    BlockType(id=7, name="Q5_1", values=32, nbytes=24, decodable=True),
    BlockType(id=8, name="Q8_0", values=32, nbytes=34, decodable=True),
    BlockType(id=9, name="Q8_1", values=32, nbytes=36),
    BlockType(id=10, name="Q2_K", values=256, nbytes=84, decodable=True),
    BlockType(id=11, name="Q3_K", values=256, nbytes=110, decodable=True),
    BlockType(id=12, name="Q4_K", values=256, nbytes=144, decodable=True),
    BlockType(id=13, name="Q5_K", values=256, nbytes=176, decodable=True),
    BlockType(id=14, name="Q6_K", values=256, nbytes=210, decodable=True),
    BlockType(id=15, name="Q8_K", values=256, nbytes=292),
    BlockType(id=16, name="IQ2_XXS", values=256, nbytes=66),
    BlockType(id=17, name="IQ2_XS", values=256, nbytes=74),
    BlockType(id=18, name="IQ3_XXS", values=256, nbytes=98),
    BlockType(id=19, name="IQ1_S", values=256, nbytes=50),
    BlockType(id=20, name="IQ4_NL", values=32, nbytes=18),
    BlockType(id=21, name="IQ3_S", values=256, nbytes=110),
    BlockType(id=22, name="IQ2_S", values=256, nbytes=82),
    BlockType(id=23, name="IQ4_XS", values=256, nbytes=136),
    BlockType(id=24, name="I8", values=1, nbytes=1, number="int8"),
    BlockType(id=25, name="I16", values=1, nbytes=2, number="int16"),
    BlockType(id=26, name="I32", values=1, nbytes=4, number="int32"),
    BlockType(id=27, name="I64", values=1, nbytes=8, number="int64"),
    BlockType(id=28, name="F64", values=1, nbytes=8, number="float64"),
    BlockType(id=29, name="IQ1_M", values=256, nbytes=56),
    BlockType(id=30, name="BF16", values=1, nbytes=2, number="bfloat16"),
    BlockType(id=34, name="TQ1_0", values=256, nbytes=54),
    BlockType(id=35, name="TQ2_0", values=256, nbytes=66),
    BlockType(id=39, name="MXFP4", values=32, nbytes=17),
    BlockType(id=40, name="NVFP4", values=64, nbytes=36),
    BlockType(id=41, name="Q1_0", values=128, nbytes=18),
)
"""Every type of ggml.h that a file may name, with the sizes that bounds checks need."""

_BY_ID = {t.id: t for t in BLOCK_TYPES}
_BY_NAME = {t.name: t for t in BLOCK_TYPES}


def block_type(key: int | str) -> BlockType | None:
    """The type with this GGML id or name, or None."""
    return _BY_ID.get(key) if isinstance(key, int) else _BY_NAME.get(key)


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """A weight as its blocks: `blocks` [..., row bytes] uint8 for logical `shape` [..., columns].

    Leading dimensions are the same in both, so rows, shards of rows and experts are plain indexing of `blocks`.
    """

    blocks: Tensor
    type: BlockType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        import torch

        stored = (*self.shape[:-1], self.type.row_bytes(self.shape[-1]))
        if tuple(self.blocks.shape) != stored or self.blocks.dtype != torch.uint8:
            raise ValueError(
                f"{self.type.name} blocks of shape {tuple(self.blocks.shape)} {self.blocks.dtype}: "
                f"a tensor of shape {self.shape} takes {stored} torch.uint8"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.blocks.numel()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values, computed in float32 and rounded once to `dtype` (None: float32). Scratch memory does not grow with
        the tensor.

        Raises ValueError for a type that herd cannot decode.
        """
        import torch

        decode = self.type.decode
        if decode is None:
            raise ValueError(f"herd cannot dequantize {self.type.name} blocks")
        flat = self.blocks.reshape(-1, self.type.nbytes)
        out = torch.empty(len(flat), self.type.values, dtype=dtype or torch.float32, device=flat.device)
        step = (CHUNK if flat.is_cpu else 64 * CHUNK) // self.type.values  # elsewhere, starting an operation costs more
        for start in range(0, len(flat), step):
            out[start : start + step] = decode(flat[start : start + step])
        return out.view(self.shape)
