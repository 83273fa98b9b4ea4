"""Random stored matrices, and the plain arithmetic that native products must match."""

from __future__ import annotations

import torch

from herd.quant.encode import encode
from herd.quant.scheme import QuantTensor

__all__ = ["PANELS", "stored"]

PANELS = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""Types that the native library multiplies with."""


def stored(kind: str, *shape: int, seed: int = 0) -> QuantTensor:
    """Random values of the size of a layer's weights, as blocks of `kind` or as plain bytes."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed)) * shape[-1] ** -0.5
    made = encode(values, kind)
    if isinstance(made, QuantTensor):
        return made
    from herd.quant.scheme import block_type

    found = block_type(kind)
    assert found is not None
    return QuantTensor(made.view(torch.uint8), found, shape)
