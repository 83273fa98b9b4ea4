"""A tensor about to be written: what the header says of it, and the function that makes it when its turn comes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from herd.quant.scheme import QuantTensor, block_type

__all__ = ["Planned", "Tick"]

Tick = Callable[[int], None]
"""Told the number of bytes written since the last call."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of a file to come.

    `name` is the name in the file, `shape` torch's order (outermost first), `stored` a name of BLOCK_TYPES ("F32", "BF16",
    "Q4_K", ...). `make` is called once, when the header is written and this tensor's turn has come; it gives a Tensor of that
    shape and dtype, or a QuantTensor of that type.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    make: Callable[[], Tensor | QuantTensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file. Raises ValueError when a row is not whole blocks."""
        kind = block_type(self.stored)
        assert kind is not None, self.stored
        if not self.shape:
            return kind.row_bytes(1)
        return math.prod(self.shape[:-1]) * kind.row_bytes(self.shape[-1])
