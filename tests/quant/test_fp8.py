"""FP8 weights: numbers against numpy-like arithmetic by hand and against compressed-tensors' definition; modules and models."""

from __future__ import annotations

import pytest
import torch

from herd.errors import CheckpointError
from herd.quant.apply import dequantize, held, kind_of, quantize
from herd.quant.fp8 import FP8, LARGEST, Fp8Matrix, Fp8Tensor, encode_fp8
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from tests.build import build, tokens
from tests.quant.wide import EXPERTS, TIED, WIDE

HALF_STEP = 2.0**-4
"""Three bits behind the first: half a step is at most 2^-4 of the value it lies beside (normal numbers of the type)."""
SMALLEST_STEP = 2.0**-9
"""Step of the type's subnormals, times the scale."""
ROUNDED = 2.0**-22
"""Of a value: a quotient and a product, each rounded to float32."""


def test_values_lie_at_the_nearest_number() -> None:
    """Every value is as near as the definition allows, found by trying all 254 finite numbers of the type."""
    x = torch.randn(9, 50, generator=torch.Generator().manual_seed(3))
    x[0] = 0.0
    x[1, 0] = 1e4  # one outlier takes the scale
    made = encode_fp8(x)
    assert made.weight.dtype == torch.float8_e4m3fn
    expected = torch.where(x.abs().amax(1) > 0, x.abs().amax(1) / 448, torch.ones(9))
    assert torch.equal(made.scale, expected)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    nearest = (x.unsqueeze(-1) - numbers * made.scale[:, None, None]).abs().amin(-1)
    error = (made.dequantize() - x).abs()
    assert (error <= nearest + ROUNDED * x.abs()).all()
    assert (error <= (HALF_STEP * x.abs()).clamp(min=SMALLEST_STEP / 2 * made.scale[:, None]) * (1 + 1e-5)).all()
    assert made.weight.float().abs().amax(1)[1:].eq(LARGEST).all(), "the largest value takes the largest number"


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_damaged_values_are_refused(bad: float) -> None:
    x = torch.ones(4, 8)
    x[2, 3] = bad
    with pytest.raises(CheckpointError, match=r"row 2 .*diverged") as caught:
        encode_fp8(x, name="layers.0.attention.wq.weight")
    assert "wq" in str(caught.value)


def test_shapes_and_types_are_checked() -> None:
    weight = torch.ones(4, 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="one per row"):
        Fp8Tensor(weight, torch.ones(8))
    with pytest.raises(ValueError, match="wanted float8"):
        Fp8Tensor(torch.ones(4, 8), torch.ones(4))
    with pytest.raises(ValueError, match="no matrix"):
        Fp8Matrix(Fp8Tensor(weight.view(1, 4, 8), torch.ones(1, 4)))


def test_subnormal_rows_stay_finite() -> None:
    made = encode_fp8(torch.full((1, 4), 1e-42))
    assert made.dequantize().abs().max() <= 1e-38


def test_a_matrix() -> None:
    x = torch.randn(37, 64)
    matrix = Fp8Matrix(encode_fp8(x))
    assert (matrix.rows, matrix.columns, matrix.nbytes) == (37, 64, 37 * 68)
    values = matrix.dequantize()
    inputs = torch.randn(2, 3, 64)
    assert torch.equal(QuantLinear(matrix)(inputs), inputs @ values.T)
    assert QuantLinear(matrix)(inputs.bfloat16()).dtype == torch.bfloat16
    ids = torch.tensor([[0, 36], [5, 5]])
    assert torch.equal(matrix.look_up(ids, torch.float32), values[ids])
    module = QuantLinear(matrix).half()
    assert module.matrix.weight.dtype == torch.float8_e4m3fn, "a cast of the module is about activations"
    assert not matrix.pack()
    inputs.requires_grad_()
    QuantLinear(matrix)(inputs).sum().backward()
    assert torch.allclose(inputs.grad[0, 0], values.sum(0), atol=1e-4)


@pytest.mark.parametrize("config", [WIDE, TIED, EXPERTS], ids=["wide", "tied", "experts"])
def test_models(config) -> None:
    """Layers are FP8, the rest stays; the model computes what its plain twin computes."""
    model = build(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert quantize(model, "fp8") == []
    assert kind_of(model) == FP8.name
    assert not any(isinstance(m, QuantEmbedding) for m in model.modules())
    assert type(model.output) is torch.nn.Linear
    assert isinstance(model.layers[0].attention.wq, QuantLinear)
    if config is EXPERTS:
        assert isinstance(model.layers[0].feed_forward.experts, QuantExperts)
    twin = dequantize(model)
    for name, value in twin.state_dict().items():
        inside = name.startswith("layers.") and value.ndim > 1 and "router" not in name
        assert torch.equal(value, encode_fp8(before[name]).dequantize() if inside else before[name]), name
    ids = tokens(config, 9)
    with torch.no_grad():
        assert torch.allclose(model(ids), twin(ids), atol=1e-5)
    sizes = held(model)
    assert set(sizes) == {"FP8", "float32"}
    whole = sum(v.numel() for n, v in before.items() if n.startswith("layers.") and v.ndim > 1 and "router" not in n)
    rows = sum(
        v[..., 0].numel() for n, v in before.items() if n.startswith("layers.") and v.ndim > 1 and "router" not in n
    )
    assert sizes["FP8"] == whole + 4 * rows
