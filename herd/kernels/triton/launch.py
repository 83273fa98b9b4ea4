"""What every launch shares: the device, and sizes that are powers of two."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["device_of", "hopper", "power"]


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the one of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def hopper(tensor: Tensor) -> bool:
    """Whether the device of `tensor` has compute capability 9 or later (True for the interpreter)."""
    return not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def power(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << max(n - 1, 0).bit_length())
