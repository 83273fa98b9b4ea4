"""NF4 weights: 4 bits a value, the base that QLoRA trains adapters on.

Each value is the nearest of 16 numbers, the quantiles of a normal distribution, times the largest magnitude of its 64
neighbours. Those magnitudes are quantized once more (double quantization): one byte each, an entry of a table of 256 times a
float32 for 256 of them, around their mean. Together 4.13 bits a value. Bytes are those that bitsandbytes makes, except where a
magnitude lies halfway between two entries.
Source: Dettmers et al. 2023; bitsandbytes functional.py (`quantize_4bit`, `create_dynamic_map`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from herd.errors import CheckpointError
from herd.quant.matrix import Matrix, frozen_product, split_blocks
from herd.quant.numbers import NF4_TABLE
from herd.quant.scheme import BlockType

__all__ = ["NF4", "Nf4Matrix", "Nf4Tensor", "encode_nf4"]

BLOCK, NESTED = 64, 256
"""Values of a block, in row-major order and across rows; blocks whose magnitudes share a float32."""

NF4 = BlockType(id=-2, name="NF4", values=BLOCK, nbytes=33)
"""Stands for the kind in plans and reports. It is no GGML type: no file may name it."""

PIECE = 1 << 20
"""Values dequantized or encoded at a time: scratch memory does not grow with the matrix."""


@dataclass(frozen=True, slots=True)
class Nf4Tensor:
    """`codes` [..., n / 2] uint8 (the first of two values in the high half), `absmax` [..., n / 64] uint8, `nested`
    [..., n / 64 / 256] and `offset` [...] float32, for a tensor of `shape`, n values; of experts one set each.

    `origin` tells a part of a larger matrix, whose `nested` it keeps: its first block there, and the blocks of a row there.
    """

    codes: Tensor
    absmax: Tensor
    nested: Tensor
    offset: Tensor
    shape: tuple[int, ...]
    origin: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all four."""
        return sum(t.nbytes for t in (self.codes, self.absmax, self.nested, self.offset))

    def __getitem__(self, index: int) -> Nf4Tensor:
        """One expert's."""
        return Nf4Tensor(self.codes[index], self.absmax[index], self.nested[index], self.offset[index], self.shape[1:])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of a matrix, multiplied in float32 and rounded once to `dtype`."""
        assert self.codes.ndim == 1
        device = self.codes.device
        table, eight = torch.tensor(NF4_TABLE, device=device), _eight_bits().to(device)
        scales = eight[self.absmax.int()] * self._groups() + self.offset
        # Two values at once, as one number of 8 bytes: the look-up is what dequantizing costs.
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1).view(torch.int64).flatten()
        count = self.shape[0] * self.shape[1]
        out = torch.empty(count, dtype=dtype, device=device)
        for start in range(0, count, PIECE):
            end = min(start + PIECE, count)
            part = pairs.index_select(0, self.codes[start // 2 : -(-end // 2)].int())
            part = part.view(torch.float32)[: end - start]
            own = scales[start // BLOCK : -(-end // BLOCK)]
            whole = len(part) // BLOCK * BLOCK
            part[:whole].view(-1, BLOCK).mul_(own[: whole // BLOCK, None])
            part[whole:].mul_(own[-1])
            out[start:end] = part
        return out.view(self.shape)

    def part(self, dim: int, start: int, count: int) -> Nf4Tensor:
        """`count` rows (`dim` 0) or columns (1) of a matrix from `start`: the same numbers.

        Raises ConfigError unless rows, and columns that are taken, are whole blocks.
        """
        assert self.codes.ndim == 1
        assert self.origin is None
        rows, columns = self.shape
        if columns % BLOCK or (dim == 1 and (start % BLOCK or count % BLOCK)):
            raise split_blocks(NF4, columns if columns % BLOCK else count)
        codes, absmax = self.codes.view(rows, -1), self.absmax.view(rows, -1)
        across = columns // BLOCK
        if dim == 0:
            codes, absmax, first = codes[start : start + count], absmax[start : start + count], start * across
        else:
            end, first = start + count, start // BLOCK
            codes, absmax = codes[:, start // 2 : end // 2], absmax[:, first : end // BLOCK]
        shape = (count, columns) if dim == 0 else (rows, count)
        kept = (codes.reshape(-1).clone(), absmax.reshape(-1).clone(), self.nested, self.offset)
        return Nf4Tensor(*kept, shape, (first, across))

    def _groups(self) -> Tensor:
        """`nested` of every block."""
        if self.origin is None:
            return self.nested.repeat_interleave(NESTED)[: len(self.absmax)]
        first, across = self.origin
        own = self.shape[1] // BLOCK
        at = torch.arange(len(self.absmax), device=self.absmax.device)
        return self.nested[(first + at // own * across + at % own) // NESTED]


def encode_nf4(values: Tensor, *, name: str | None = None) -> Nf4Tensor:
    """`values` [rows, columns] or, of experts, [E, rows, columns], any float dtype, as NF4 with double quantization.

    Raises CheckpointError, naming the tensor `name`, for values that are infinite or not a number.
    """
    if values.ndim == 3:
        parts = [encode_nf4(one, name=name) for one in values]
        codes, absmax, nested, offset = (
            torch.stack([getattr(part, field) for part in parts]) for field in ("codes", "absmax", "nested", "offset")
        )
        return Nf4Tensor(codes, absmax, nested, offset, tuple(values.shape))
    flat = values.detach().reshape(-1)
    device = flat.device
    borders = _borders(torch.tensor(NF4_TABLE)).to(device)
    codes = torch.empty(-(-len(flat) // 2), dtype=torch.uint8, device=device)
    scales = torch.empty(-(-len(flat) // BLOCK), dtype=torch.float32, device=device)
    for start in range(0, len(flat), PIECE):
        part = flat[start : start + PIECE].float()
        blocks = torch.nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
        top = blocks.abs().amax(1)
        if not bool(top.isfinite().all()):
            at = start + int((~part.isfinite()).nonzero()[0])
            why = f"value {at} is infinite or not a number and cannot be stored as NF4: the weights are damaged or diverged"
            raise CheckpointError(why, tensor=name)
        scales[start // BLOCK : start // BLOCK + len(top)] = top
        over = torch.where(top > 0, 1 / top, torch.zeros_like(top))
        found = torch.bucketize(blocks * over[:, None], borders).to(torch.uint8).flatten()[: len(part)]
        if len(found) % 2:
            found = torch.nn.functional.pad(found, (0, 1), value=NF4_TABLE.index(0.0))
        codes[start // 2 : start // 2 + len(found) // 2] = (found[0::2] << 4) | found[1::2]
    offset = scales.mean()
    eight = _eight_bits().to(device)
    groups = torch.nn.functional.pad(scales - offset, (0, -len(scales) % NESTED)).view(-1, NESTED)
    nested = groups.abs().amax(1)
    over = torch.where(nested > 0, 1 / nested, torch.zeros_like(nested))
    absmax = torch.bucketize(groups * over[:, None], _borders(eight)).to(torch.uint8).flatten()[: len(scales)]
    return Nf4Tensor(codes, absmax, nested, offset, tuple(values.shape))


class Nf4Matrix(Matrix):
    """An NF4 weight [rows, columns] where a `Matrix` is wanted. It is dequantized for every product: memory first, not speed."""

    __slots__ = ("stored",)

    def __init__(self, tensor: Nf4Tensor) -> None:
        if len(tensor.shape) != 2:
            raise ValueError(f"an NF4 tensor of shape {tensor.shape} is no matrix")
        self.stored = tensor
        self.type = NF4
        self.rows, self.columns = tensor.shape
        self.blocks, self.panels, self.activations = None, None, None

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def pack(self, panels: Tensor | None = None) -> bool:
        return False

    def drop(self) -> None:
        """Nothing stands in for the bytes."""

    def part(self, dim: int, start: int, count: int) -> Nf4Matrix:
        return Nf4Matrix(self.stored.part(dim, start, count))

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., columns] -> x W^T [..., rows] in x's dtype."""
        return frozen_product(x, self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.stored.dequantize(dtype or torch.float32)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        raise AssertionError("embeddings are no NF4: blocks run across rows")

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Follow a module to another device; a change of dtype leaves the numbers as they are."""
        old = self.stored
        device = to(torch.empty(0, dtype=torch.uint8, device=old.codes.device)).device
        self.stored = Nf4Tensor(
            old.codes.to(device),
            old.absmax.to(device),
            old.nested.to(device),
            old.offset.to(device),
            old.shape,
            old.origin,
        )


def _borders(table: Tensor) -> Tensor:
    """Halfway between neighbours: what is below the first border is nearest to the first entry."""
    return (table[1:] + table[:-1]) / 2


@cache
def _eight_bits() -> Tensor:
    """The table of one-byte magnitudes: seven decades, each cut twice as finely as the one below, with both signs, 0 and 1."""
    found = [0.0, 1.0]
    for decade in range(7):
        cuts = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = (cuts[:-1] + cuts[1:]) / 2
        for sign in (1.0, -1.0):
            found += (sign * 10 ** (decade - 6) * means).tolist()
    return torch.tensor(sorted(found), dtype=torch.float32)
