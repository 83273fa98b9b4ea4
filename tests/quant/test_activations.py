"""W8A8: the torch definition of 8-bit activations, and both paths beside each other."""

from __future__ import annotations

import pytest
import torch

from herd.kernels import native
from herd.kernels.reference import ACTIVATION_GROUP as GROUP
from herd.kernels.reference import rounded
from herd.quant.apply import dequantize, quantize
from herd.quant.encode import encode
from herd.quant.matrix import Matrix
from herd.quant.scheme import QuantTensor
from tests.build import build, tokens
from tests.quant.stored import stored
from tests.quant.wide import EXPERTS, WIDE

ROUNDED = 2e-6
"""Outputs of order one: the same integers and scales, float32 sums in another order."""
LOGITS = 2e-3
"""Of the largest logit: where sums that were ordered otherwise put an activation on the other side of a rounding border, it
moves by 1/127 of its group's largest, one of hundreds of terms."""


def test_numbers_by_hand() -> None:
    x = torch.zeros(2, GROUP + 3)
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -64.4])
    x[0, GROUP:] = torch.tensor([1.0, -0.5, 0.0])
    out = rounded(x)
    assert out[0, :4].tolist() == [127.0, 0.0, 2.0, -64.0], "to nearest, halves to even"
    assert torch.allclose(out[0, GROUP:], torch.tensor([127.0, -64.0, 0.0]) / 127), "a scale of its own"
    assert not out[1].any()


def test_integer_arithmetic_gives_the_same() -> None:
    """The product written out as the format says: int8 times int8 summed exactly, then the two scales of each 32 values."""
    made = stored("Q8_0", 24, 2 * GROUP)
    matrix = Matrix(made, activations=8)
    x = torch.randn(5, 2 * GROUP, generator=torch.Generator().manual_seed(1))
    top = x.view(5, 2, GROUP).abs().amax(-1)
    q = (x.view(5, 2, GROUP) * (torch.full_like(top, 127) / top).unsqueeze(-1)).round().long().view(5, 8, 32)
    blocks = made.blocks.view(24, 8, 34)
    scale = blocks[..., :2].contiguous().view(torch.float16).double().squeeze(-1)
    w = blocks[..., 2:].contiguous().view(torch.int8).long()
    sums = torch.einsum("tbi,obi->tob", q, w).double()
    expected = (sums * scale * (top.double() / 127).repeat_interleave(4, 1).unsqueeze(1)).sum(-1)
    assert (matrix.multiply(x).double() - expected).abs().max() <= ROUNDED


@pytest.mark.skipif(native.isa() is None, reason="no native kernels")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q6_K"])
def test_native_and_torch_agree(kind: str) -> None:
    made = stored(kind, 48, 512)
    fast, plain = Matrix(made, activations=8), Matrix(made, activations=8)
    assert fast.pack()
    x = torch.randn(7, 512)
    assert (fast.multiply(x) - plain.multiply(x)).abs().max() <= ROUNDED
    assert not torch.equal(plain.multiply(x), Matrix(made).multiply(x)), "without the flag torch multiplies floats"


@pytest.mark.skipif(native.isa() is None, reason="no native kernels")
@pytest.mark.parametrize("config", [WIDE, EXPERTS], ids=["wide", "experts"])
def test_models_agree_with_and_without_the_library(config, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain, floats = build(config), build(config), build(config)
    quantize(fast, "w8a8")
    monkeypatch.setattr(native, "isa", lambda: None)
    quantize(plain, "w8a8")
    quantize(floats, "int8")
    ids = tokens(config, 9)
    with torch.no_grad():
        a, b, c = fast(ids), plain(ids), floats(ids)
    assert (a - b).abs().max() <= LOGITS * b.abs().max()
    assert (c - b).abs().max() > (a - b).abs().max(), "int8 without kernels keeps float activations"
    assert all(
        torch.equal(x, y) for x, y in zip(dequantize(plain).parameters(), dequantize(floats).parameters(), strict=True)
    )


def test_gradients_are_those_of_the_weights() -> None:
    made = encode(torch.randn(16, 128), "Q8_0")
    assert isinstance(made, QuantTensor)
    x = torch.randn(2, 128, requires_grad=True)
    Matrix(made, activations=8).multiply(x).sum().backward()
    assert torch.allclose(x.grad, made.dequantize().sum(0).expand(2, -1), atol=1e-5)
