"""Weights as GPU kernels read them have the values of the blocks they were made from, bit for bit."""

from __future__ import annotations

import pytest
import torch

from herd.kernels import packed, products
from herd.quant.packing import PACKS, pack
from herd.quant.scheme import QuantTensor, block_type

BITS = {"Q4_0": 4.5, "Q8_0": 8.5, "Q5_0": 8.5, "Q4_K": 4.625, "Q5_K": 8.625, "Q6_K": 8.5625}
HALF_STEP = 0.5 + 1e-4
"""Of a scale: what rounding to the nearest code may lose."""

FP8_STEP = 2**-4
"""Relative: float8_e4m3fn has three bits after the leading one; below 2^-6 / 448 of the largest, steps are 2^-9 / 448 of it."""


@pytest.mark.parametrize("kind", PACKS)
def test_the_same_values(kind: str) -> None:
    """Every bit pattern, in a stack of experts; the size that the table promises."""
    form = block_type(kind)
    assert form is not None
    shape = (2, 3, 2 * form.values)
    stored = QuantTensor(torch.randint(0, 256, (2, 3, 2 * form.nbytes), dtype=torch.uint8), form, shape)
    found, expected = pack(stored), stored.dequantize()
    assert torch.equal(found.dequantize().nan_to_num(7), expected.nan_to_num(7))
    assert found.nbytes * 8 / expected.numel() == BITS[kind]
    assert found.stacked


def test_types_without_a_packed_form_become_plain() -> None:
    form = block_type("Q2_K")
    assert form is not None
    stored = QuantTensor(torch.randint(0, 100, (3, 84), dtype=torch.uint8), form, (3, 256))
    assert torch.equal(pack(stored).codes, stored.dequantize(torch.bfloat16))


def test_rounding_of_rows() -> None:
    w = torch.randn(6, 64) * torch.logspace(-4, 3, 6)[:, None]
    w[2] = 0
    eight = packed.int8(w)
    assert eight.scale is not None
    assert ((eight.dequantize() - w).abs() <= eight.scale[:, None] * HALF_STEP).all()
    floats = packed.fp8(w)
    largest = w.abs().amax(1, keepdim=True)
    assert ((floats.dequantize() - w).abs() <= w.abs() * FP8_STEP + largest * 2**-9 / 448).all()
    assert torch.equal(floats.dequantize()[2], w[2])


@pytest.mark.parametrize("kind", ["plain", "int8", "fp8"])
def test_joined_and_stacked(kind: str) -> None:
    make = getattr(packed, kind)
    a, b = torch.randn(3, 32), torch.randn(5, 32)
    joined = packed.join([make(a), make(b)])
    assert torch.equal(joined.dequantize(), torch.cat([make(a).dequantize(), make(b).dequantize()]))
    x = torch.randn(4, 32)
    assert torch.allclose(products.product(x, joined), x @ joined.dequantize().T, atol=1e-5)
    stacked = packed.stack([make(a), make(a + 1)])
    counts = torch.tensor([1, 3])
    expected = torch.cat([x[:1] @ make(a).dequantize().T, x[1:] @ make(a + 1).dequantize().T])
    assert torch.allclose(products.expert_product(x, stacked, counts), expected, atol=1e-5)


def test_what_does_not_fit_together_is_refused() -> None:
    a = torch.randn(4, 32)
    with pytest.raises(ValueError, match="plain, int8"):
        packed.join([packed.plain(a), packed.int8(a)])
    with pytest.raises(ValueError, match="stacked"):
        packed.stack([packed.plain(a), packed.plain(a[:2])])


def test_fp8_products_round_activations() -> None:
    w, x = torch.randn(16, 64), torch.randn(3, 64)
    found, expected = products.scaled_product(x, packed.fp8(w)), x @ w.T
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < FP8_STEP
