"""Integers with a scale, and perhaps a zero, for every group of columns: what GPTQ, AWQ, compressed-tensors and Meta's int4 files
hold once their bits are unpacked.

x = scale * (q - zero), computed in float32. With 16-bit scales every product is exact there, so a caller's single rounding to
bfloat16 or float16 gives what the formats' own implementations compute in those dtypes.

Letters: R rows (output features), C columns (input features), G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from herd.quant.scheme import QuantTensor, block_type

__all__ = ["Grouped", "from_words"]

BLOCK = 32
"""Values of a Q4_0 or Q8_0 block."""

FITS = {"Q4_0": (-8, 7), "Q8_0": (-128, 127)}
"""Kind -> the integers its blocks hold, smallest kind first."""


@dataclass(frozen=True, slots=True)
class Grouped:
    """`numbers` [R, C] int8, uint8 or a float8 type; `scales` [R or 1, G], any float dtype; `zeros` as `scales`, integers.

    `group_of` [C] says which group a column is in; None: G equal runs of columns. `lowest` and `highest` bound the numbers.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group_of: Tensor | None = None
    lowest: int = -128
    highest: int = 127

    def rows(self, part: slice) -> Grouped:
        """Some of the rows."""
        scales = self.scales[part] if len(self.scales) > 1 else self.scales
        zeros = self.zeros if self.zeros is None or len(self.zeros) == 1 else self.zeros[part]
        return replace(self, numbers=self.numbers[part], scales=scales, zeros=zeros)

    def dequantize(self) -> Tensor:
        """The values [R, C] in float32: numbers and zeros subtracted as integers, one product."""
        values = self.numbers.float()
        if self.group_of is not None:
            columns = self.group_of.long()
            if self.zeros is not None:
                values.sub_(self.zeros.float()[:, columns])
            return values.mul_(self.scales.float()[:, columns])
        runs = values.unflatten(1, (self.scales.shape[1], -1))  # a view: what is done to it is done to `values`
        if self.zeros is not None:
            runs.sub_(self.zeros.float().unsqueeze(-1))
        runs.mul_(self.scales.float().unsqueeze(-1))
        return values

    def holder(self) -> str | None:
        """The smallest block type that holds every value exactly, or None: then `why_not` says why. Looks at scales, zeros and
        groups, not at the numbers."""
        return None if self.why_not() is not None else self._kind()

    def why_not(self) -> str | None:
        """What keeps the values out of blocks of 32 with a float16 scale."""
        if self.numbers.dtype.is_floating_point:
            return "the numbers are not integers"
        if self.numbers.shape[1] % BLOCK:
            return f"rows of {self.numbers.shape[1]} values are not whole blocks of {BLOCK}"
        if not self._runs():
            return f"columns that share a block of {BLOCK} have different scales"
        half = self.scales.half()
        if not bool((half.isfinite() & (half.to(self.scales.dtype) == self.scales)).all()):
            return "not every scale is a float16 number"
        if self._kind() is None:
            return "some integers, less their zeros, need more than 8 bits"
        return None

    def blocks(self, kind: str) -> QuantTensor:
        """The same values as blocks of `kind`, which `holder` gave or which is wider."""
        type_ = block_type(kind)
        assert type_ is not None
        assert kind in FITS
        rows, columns = self.numbers.shape
        blocks = torch.empty(rows, columns // BLOCK, type_.nbytes, dtype=torch.uint8)
        scales = self._per_block(self.scales.half())
        blocks[..., :2] = scales.expand(rows, -1).contiguous().view(torch.uint8).view(rows, -1, 2)
        numbers = self.numbers
        if self.zeros is not None:
            zeros = self._per_block(self.zeros.to(torch.int16))
            numbers = numbers.to(torch.int16).unflatten(1, (-1, BLOCK)).sub_(zeros.unsqueeze(-1)).flatten(1)
        q = numbers.to(torch.int8).unflatten(1, (-1, BLOCK))
        if kind == "Q8_0":
            blocks[..., 2:] = q.view(torch.uint8)
        else:
            nibbles = (q + 8).view(torch.uint8)
            blocks[..., 2:] = nibbles[..., :16] | (nibbles[..., 16:] << 4)
        return QuantTensor(blocks.flatten(1), type_, (rows, columns))

    def _kind(self) -> str | None:
        low, high = self.lowest, self.highest
        if self.zeros is not None and self.zeros.numel():
            low, high = low - int(self.zeros.max()), high - int(self.zeros.min())
        return next((kind for kind, (least, most) in FITS.items() if least <= low and high <= most), None)

    def _runs(self) -> bool:
        """Whether the columns of every block of 32 are in one group."""
        if self.group_of is None:
            run = self.numbers.shape[1] // self.scales.shape[1]
            return run % BLOCK == 0
        of_block = self.group_of.view(-1, BLOCK)
        return bool((of_block == of_block[:, :1]).all())

    def _per_block(self, numbers: Tensor) -> Tensor:
        """[R or 1, G] -> [R or 1, C / 32]."""
        if self.group_of is not None:
            return numbers[:, self.group_of.view(-1, BLOCK)[:, 0].long()]
        return numbers.repeat_interleave(self.numbers.shape[1] // BLOCK // numbers.shape[1], dim=1)


def from_words(words: Tensor, bits: int, count: int, dim: int) -> Tensor:
    """int32 `words` as uint8 numbers of `bits` bits, `count` of them along `dim`, which they were packed along: a little-endian
    stream of bits, so with 3 bits a number may lie in two words."""
    stream = words.movedim(dim, -1).contiguous()
    if bits == 8:
        numbers = stream.view(torch.uint8)
    elif 8 % bits == 0:
        octets, mask = stream.view(torch.uint8), (1 << bits) - 1
        numbers = torch.stack([(octets >> shift) & mask for shift in range(0, 8, bits)], dim=-1).flatten(-2)
    else:
        octets = torch.nn.functional.pad(stream.view(torch.uint8), (0, 1))
        at = torch.arange(stream.shape[-1] * 32 // bits) * bits
        wide = octets[..., at // 8].to(torch.int32) | (octets[..., at // 8 + 1].to(torch.int32) << 8)
        numbers = ((wide >> (at % 8)) & ((1 << bits) - 1)).to(torch.uint8)
    return numbers[..., :count].movedim(-1, dim)
