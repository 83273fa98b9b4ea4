"""GPU kernels in Triton. Nothing outside this package imports triton, and nothing in it is imported before a GPU asks for it.

Callers use the operations of `herd.kernels` (`fused`, `paged`, `products`, `grouped`): those dispatch by device, to plain torch
on a CPU and to this package on a GPU. With TRITON_INTERPRET=1 in the environment before triton is imported, every kernel here
also runs on CPU tensors, slowly: so they are tested.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

__all__ = ["LEAST_CAPABILITY", "interpreted", "missing", "usable"]

LEAST_CAPABILITY = (8, 0)
"""Compute capability from which on the kernels compile: bfloat16 matrix units and asynchronous copies (A100)."""


@cache
def missing() -> str | None:
    """Why the kernels cannot be used on this machine's GPU, as a sentence for the user; None when they can."""
    if os.environ.get("HERD_TRITON", "").lower() in ("0", "none", "off"):
        return "HERD_TRITON=0 switches the GPU kernels off"
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton): products and attention run with torch's own operations"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return "the GPU kernels are written and tested for NVIDIA devices only"
    found = torch.cuda.get_device_capability()
    if found < LEAST_CAPABILITY:
        need = ".".join(map(str, LEAST_CAPABILITY))
        return f"the GPU has compute capability {found[0]}.{found[1]}, and the kernels need {need}"
    return None


def usable() -> bool:
    """Whether tensors on the GPU are given to Triton kernels."""
    return missing() is None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
