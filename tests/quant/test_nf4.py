"""NF4 against bitsandbytes' own bytes, its bound, and shapes that are no whole blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from herd.errors import CheckpointError
from herd.quant.nf4 import Nf4Matrix, encode_nf4
from herd.quant.numbers import NF4_TABLE

GOLDEN = Path(__file__).parents[1] / "checkpoint" / "quantized" / "bitsandbytes.safetensors"
TIES = 1
"""Of 192 magnitudes, those that lie halfway between two entries of the table of 256: the last bit of a quotient decides."""


def test_bytes_of_bitsandbytes() -> None:
    golden = {k.removeprefix("nf4_nested/"): v for k, v in load_file(GOLDEN).items() if k.startswith("nf4_nested/")}
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(3)) * 0.05
    made = encode_nf4(weight)
    assert torch.equal(made.codes, golden["weight"].flatten())
    assert torch.equal(made.nested, golden["weight.nested_absmax"])
    off = made.absmax.int() - golden["weight.absmax"].int()
    assert int((off != 0).sum()) <= TIES
    assert int(off.abs().max()) <= 1
    same = (off == 0).repeat_interleave(64).view(weight.shape)
    assert torch.equal(made.dequantize()[same], golden["values"][same])


@pytest.mark.parametrize("shape", [(3, 64), (5, 33), (1, 1), (7, 100), (300, 80)])
def test_every_shape_stays_within_half_a_step(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = encode_nf4(weight).dequantize()
    steps = torch.tensor(NF4_TABLE).diff().max() / 2
    # Magnitudes are off by at most half of the widest step of their table, times the largest deviation from their mean.
    top = weight.abs().max()
    assert (found - weight).abs().max() <= top * (steps + 0.02)
    assert found.shape == weight.shape


def test_zeros_stay_zeros_and_experts_are_apart() -> None:
    assert torch.equal(encode_nf4(torch.zeros(4, 64)).dequantize(), torch.zeros(4, 64))
    weight = torch.randn(3, 8, 64)
    made = encode_nf4(weight.bfloat16())
    for e in range(3):
        assert torch.equal(made[e].dequantize(), encode_nf4(weight[e].bfloat16()).dequantize())


def test_what_is_not_finite_is_named() -> None:
    weight = torch.zeros(4, 64)
    weight[2, 3] = float("inf")
    with pytest.raises(CheckpointError, match=r"w1.*131") as caught:
        encode_nf4(weight, name="w1")
    assert "NF4" in str(caught.value)


def test_the_gradient_goes_to_the_input_and_no_copy_is_kept() -> None:
    weight = torch.randn(16, 64)
    matrix = Nf4Matrix(encode_nf4(weight))
    x = torch.randn(5, 64, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = matrix.multiply(x)
    assert kept == [], "nothing is saved for the backward pass"
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, matrix.dequantize().sum(0).expand(5, -1))
