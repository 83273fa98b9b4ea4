"""Encoding with an importance matrix: less of the error that matters, beside llama.cpp's own with the same matrix."""

from __future__ import annotations

import pytest
import torch

from herd.quant.encode import WEIGHTED, encode
from herd.quant.scheme import QuantTensor, block_type
from tests.quant.rows import DATA, rows
from tests.quant.test_encode_llama_cpp import llama_cpp_blocks

COLUMNS = 1024
BESIDE_LLAMA_CPP = {"Q4_0": 1.02, "Q5_0": 1.02, "Q4_K": 1.06, "Q5_K": 1.06, "Q6_K": 1.02}
"""Weighted squared error over llama.cpp's, at most: it also weighs the rounding of a block's scales, herd does not."""


def importance() -> torch.Tensor:
    """A few columns matter a thousand times as much as most, as activations have it."""
    return torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) ** 6 + 1e-3


def weighted(values: torch.Tensor, made: object, weights: torch.Tensor) -> float:
    assert isinstance(made, QuantTensor)
    return float(((values - made.dequantize()).double().square() * weights).sum())


@pytest.mark.parametrize("kind", WEIGHTED)
def test_the_weighted_error_is_smaller(kind: str) -> None:
    values, weights = rows("bell", count=32, columns=COLUMNS), importance()
    plain = weighted(values, encode(values, kind), weights)
    assert weighted(values, encode(values, kind, importance=weights), weights) < 0.97 * plain


@pytest.mark.parametrize("kind", WEIGHTED)
@pytest.mark.parametrize("data", DATA)
def test_any_values_can_be_encoded(kind: str, data: str) -> None:
    values, weights = rows(data, count=8, columns=COLUMNS), importance()
    plain, made = encode(values, kind), encode(values, kind, importance=weights)
    assert isinstance(made, QuantTensor)
    assert made.dequantize().isfinite().all()
    assert weighted(values, made, weights) <= (1 + 1e-6) * weighted(values, plain, weights), "summed in another order"


@pytest.mark.parametrize("kind", WEIGHTED)
def test_every_row_and_piece_gets_its_columns(kind: str) -> None:
    """Rows of a big tensor, which is worked on in pieces, are the rows alone; experts are their matrices alone."""
    values, weights = rows("bell", count=300, columns=COLUMNS), importance()
    whole = encode(values, kind, importance=weights)
    assert isinstance(whole, QuantTensor)
    for i in (0, 127, 128, 299):
        assert torch.equal(encode(values[i : i + 1], kind, importance=weights).blocks[0], whole.blocks[i])
    stacked = encode(values.view(3, 100, COLUMNS), kind, importance=weights)
    assert torch.equal(stacked.blocks.flatten(0, 1), whole.blocks)
    columns = values.t().contiguous().t()  # not contiguous
    assert torch.equal(encode(columns, kind, importance=weights).blocks, whole.blocks)


def test_unused_columns_still_are_weights() -> None:
    values, weights = rows("bell", count=4, columns=COLUMNS), importance()
    weights[:512] = 0
    for kind in WEIGHTED:
        made = encode(values, kind, importance=weights).dequantize()
        lost = (made[:, :512] - values[:, :512]).norm() / values[:, :512].norm()
        assert lost < 0.2, kind
        assert torch.equal(encode(values, kind, importance=torch.zeros(COLUMNS)).blocks, encode(values, kind).blocks)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "F16"])
def test_other_types_take_no_notice(kind: str) -> None:
    values = rows("bell", count=4, columns=COLUMNS)
    made, plain = encode(values, kind, importance=importance()), encode(values, kind)
    assert torch.equal(
        made if isinstance(made, torch.Tensor) else made.blocks,
        plain if isinstance(plain, torch.Tensor) else plain.blocks,
    )


def test_what_is_no_importance_is_refused() -> None:
    values = rows("bell", count=4, columns=COLUMNS)
    for wrong in (torch.ones(COLUMNS - 1), torch.full((COLUMNS,), -1.0), torch.full((COLUMNS,), torch.inf)):
        with pytest.raises(ValueError, match=r"importance of wq"):
            encode(values, "Q4_K", name="wq", importance=wrong)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WEIGHTED)
def test_beside_llama_cpp(kind: str, measured) -> None:
    values, weights = rows("bell", count=64, columns=COLUMNS), importance()
    type_ = block_type(kind)
    assert type_ is not None
    theirs = QuantTensor(llama_cpp_blocks(values, kind, weights), type_, tuple(values.shape))
    ratio = weighted(values, encode(values, kind, importance=weights), weights) / weighted(values, theirs, weights)
    measured("weighted error over llama.cpp's", kind, ratio)
    assert ratio <= BESIDE_LLAMA_CPP[kind]
