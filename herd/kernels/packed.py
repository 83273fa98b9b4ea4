"""Weights [N, K] as the GPU kernels read them: codes of a row side by side, scales beside them, every row aligned.

| kind | codes | value | bits a weight |
|---|---|---|---|
| plain | [N, K] float | as it is | 16 |
| fp8 | [N, K] float8_e4m3fn | code * scale[n] | 8 |
| int8 | [N, K] int8 | code * scale[n] | 8 |
| q8 | [N, K] int8 | code * scale[n, k / 32] | 8.5 |
| q4 | [N, K / 2] nibbles | (code - 8) * scale[n, k / 32] | 4.5 |
| q4k | [N, K / 2] nibbles | code * scale[n, k / 256] * sub[n, k / 32] - minimum[n, k / 256] * sub_minimum[n, k / 32] | 4.625 |
| q5k | [N, K] int8 | the same | 8.625 |
| q6k | [N, K] int8 | code * scale[n, k / 256] * sub[n, k / 16] | 8.56 |

Scales are float32 a row, float16 a group; sub-scales are bytes. Nibbles: byte j of a group of 32 columns has column j in its low
and 16 + j in its high half. A kernel rounds a value of a grouped kind once, to the dtype of the activations; scales of rows
multiply the finished sum. `herd.quant.packing` makes these from GGML blocks without changing a bit.

Letters: N rows, K columns, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from herd.kernels.paged import quantize_rows

__all__ = ["FP8_LARGEST", "GROUP", "KINDS", "SUPER", "Packed", "fp8", "int8", "join", "plain", "stack"]

KINDS = ("plain", "fp8", "int8", "q8", "q4", "q4k", "q5k", "q6k")
GROUP = 32
"""Columns that share a scale."""

SUPER = 256
"""Columns that share the scale of their scales."""

FP8_LARGEST = 448.0

_FIELDS = ("codes", "scale", "sub", "minimum", "sub_minimum")


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [rows, columns], or a stack of E of them with a leading dimension on every tensor. See the module for `kind`."""

    kind: str
    rows: int
    columns: int
    codes: Tensor
    scale: Tensor | None = None
    sub: Tensor | None = None
    minimum: Tensor | None = None
    sub_minimum: Tensor | None = None

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            assert tensor.is_contiguous()
        width = self.columns // 2 if self.kind in ("q4", "q4k") else self.columns
        assert self.kind in KINDS
        assert self.codes.shape[-2:] == (self.rows, width), (self.codes.shape, self.rows, width)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything held, the codes first."""
        return [t for name in _FIELDS if (t := getattr(self, name)) is not None]

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def stacked(self) -> bool:
        """Whether this is a stack of experts."""
        return self.codes.ndim == 3

    def to(self, device: torch.device | str) -> Packed:
        """The same on `device`."""
        return self._each(lambda t: t.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [(E,) N, K], computed in float32 and rounded once to `dtype`."""
        if self.kind == "plain":
            return self.codes.to(dtype)
        codes = (_nibbles(self.codes) if self.kind in ("q4", "q4k") else self.codes).float()
        assert self.scale is not None
        if self.kind in ("fp8", "int8"):
            return codes.mul_(self.scale[..., None]).to(dtype)
        scale = self.scale.float()
        if self.sub is not None:
            scale = _spread(scale, self.sub) * self.sub.float()
        if self.kind == "q4":
            codes -= 8
        values = _spread(scale, codes).mul_(codes)
        if self.minimum is not None and self.sub_minimum is not None:
            values -= _spread(_spread(self.minimum.float(), self.sub_minimum) * self.sub_minimum.float(), codes)
        return values.to(dtype)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        return replace(self, **{name: change(t) for name in _FIELDS if (t := getattr(self, name)) is not None})


def _spread(of: Tensor, like: Tensor) -> Tensor:
    """Every number of the last dimension repeated, to be as wide as `like`."""
    return of.repeat_interleave(like.shape[-1] // of.shape[-1], dim=-1)


def _nibbles(codes: Tensor) -> Tensor:
    """[..., K / 2] bytes -> [..., K]."""
    runs = codes.unflatten(-1, (-1, GROUP // 2))
    return torch.cat((runs & 15, runs >> 4), dim=-1).flatten(-2)


def plain(weight: Tensor) -> Packed:
    """A float matrix as it is."""
    return Packed("plain", weight.shape[-2], weight.shape[-1], weight.detach().contiguous())


def int8(weight: Tensor) -> Packed:
    """Rounded to 8 bits with one scale a row, by the row's largest magnitude."""
    codes, scale = quantize_rows(weight.detach())
    return Packed("int8", weight.shape[-2], weight.shape[-1], codes, scale)


def fp8(weight: Tensor) -> Packed:
    """Rounded to float8_e4m3fn with one scale a row, by the row's largest magnitude."""
    wide = weight.detach().float()
    scale = wide.abs().amax(-1) / FP8_LARGEST
    scale = scale.where(scale > 0, 1)
    codes = (wide / scale[..., None]).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)
    return Packed("fp8", weight.shape[-2], weight.shape[-1], codes, scale)


def join(parts: Sequence[Packed]) -> Packed:
    """Weights of one kind and width, one below the other: the products of all in one. Raises ValueError for different kinds."""
    first = parts[0]
    if any((p.kind, p.columns, p.codes.dtype) != (first.kind, first.columns, first.codes.dtype) for p in parts):
        raise ValueError(f"weights of the kinds {', '.join(p.kind for p in parts)} cannot be joined")
    joined = {}
    for name in _FIELDS:
        tensors = [t for p in parts if (t := getattr(p, name)) is not None]
        if tensors:  # rows are dimension -2, but -1 of scales of rows
            joined[name] = torch.cat(tensors, dim=-1 if name == "scale" and first.kind in ("fp8", "int8") else -2)
    return Packed(first.kind, sum(p.rows for p in parts), first.columns, **joined)


def stack(experts: Sequence[Packed]) -> Packed:
    """Weights of one kind and shape as one, with a leading dimension. Raises ValueError for different kinds or shapes."""
    first = experts[0]
    if any((e.kind, e.rows, e.columns) != (first.kind, first.rows, first.columns) for e in experts):
        raise ValueError("experts of different kinds or shapes cannot be stacked")
    fields = {
        name: torch.stack([getattr(e, name) for e in experts]) for name in _FIELDS if getattr(first, name) is not None
    }
    return Packed(first.kind, first.rows, first.columns, **fields)
