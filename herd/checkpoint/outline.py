"""The shape of a tensor without the tensor: what the steps of `herd.checkpoint.layout` need to be asked for shapes alone.

Its methods are torch.Tensor's of the same names, and so are its errors: RuntimeError for sizes that do not fit, IndexError
for a dimension that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Outline"]


@dataclass(frozen=True, slots=True)
class Outline:
    """Sizes, outermost first. Raises OverflowError for one that no tensor can have."""

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if math.prod(n for n in self.shape if n) >= 1 << 63:
            raise OverflowError("more elements than 63 bits can count")

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Outline:
        """Dimension `dim` as several of `sizes`, of which one may be -1: what is left."""
        at = self._dim(dim)
        size, known = self.shape[at], math.prod(n for n in sizes if n != -1)
        if (-1 in sizes and (known == 0 or size % known)) or (-1 not in sizes and known != size):
            raise RuntimeError(f"{size} cannot be divided into {tuple(sizes)}")
        parts = tuple(size // known if n == -1 else n for n in sizes)
        return Outline(self.shape[:at] + parts + self.shape[at + 1 :])

    def flatten(self, start: int, end: int) -> Outline:
        """Dimensions `start` to `end`, inclusive, as one."""
        first, last = self._dim(start), self._dim(end)
        if first > last:
            raise RuntimeError("flatten from a later to an earlier dimension")
        return Outline((*self.shape[:first], math.prod(self.shape[first : last + 1]), *self.shape[last + 1 :]))

    def transpose(self, one: int, other: int) -> Outline:
        """Two dimensions exchanged."""
        sizes, a, b = list(self.shape), self._dim(one), self._dim(other)
        sizes[a], sizes[b] = sizes[b], sizes[a]
        return Outline(tuple(sizes))

    def narrow(self, dim: int, start: int, length: int) -> Outline:
        """`length` rows of dimension `dim` from `start`."""
        at = self._dim(dim)
        if start < 0 or length < 0 or start + length > self.shape[at]:
            raise RuntimeError(f"rows {start} to {start + length} of {self.shape[at]}")
        return Outline((*self.shape[:at], length, *self.shape[at + 1 :]))

    def _dim(self, dim: int) -> int:
        if not -len(self.shape) <= dim < len(self.shape):
            raise IndexError(f"dimension {dim} of a tensor with {len(self.shape)}")
        return dim % len(self.shape)
