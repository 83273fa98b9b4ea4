"""Kinds of plain numbers by torch's names, and their sizes: what file headers speak of. torch is imported on demand only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["NF4_TABLE", "NUMBER_BYTES", "torch_dtype"]

NUMBER_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "complex64": 8,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip
"""Name of a torch dtype -> bytes of one number."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`, one of NUMBER_BYTES."""
    import torch

    assert name in NUMBER_BYTES, name
    return getattr(torch, name)


NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen numbers of NF4, of bitsandbytes: quantiles of a normal distribution between -1 and 1."""
