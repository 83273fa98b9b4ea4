"""Kinds of plain numbers by torch's names, and their sizes: what file headers speak of. torch is imported on demand only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["NUMBER_BYTES", "torch_dtype"]

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
