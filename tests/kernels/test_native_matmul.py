"""Native products against plain torch, for every format and instruction set; the same bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from herd.kernels import native, reference
from herd.kernels.border import library
from tests.kernels.native import FORMATS, blocks, isa, offered

__all__ = ["isa"]

EPS = 2.0**-24
"""Half a unit in the last place of float32: what one rounding may cost."""

SHAPES = {"Q4_0": ((48, 512), (37, 32), (1, 96), (130, 160)), "Q8_0": ((48, 512), (37, 32), (1, 96), (130, 160))}
LARGE = ((16, 256), (37, 512), (1, 768), (130, 256))
COUNTS = (1, 2, 3, 4, 5, 6, 7, 12, 16, 29)
PLAIN_COUNTS = (
    *range(1, 8),
    12,
    25,
    29,
)  # tiles of 6 tokens and what is left, one to four of them for the next weights
BRAINS = ("amx", "avx512bf16")  # these round what they multiply with bfloat16 weights
PLAIN = (torch.float32, torch.float16, torch.bfloat16)


def bound(weight: Tensor, x: Tensor) -> Tensor:
    """[M, N]: a rounding per 16 columns and a few at the end, each of the largest sum that can occur on the way.

    Twice the largest weight of a row covers the K formats, whose numbers and minimum are summed apart.
    """
    additions = weight.shape[1] / 16 + 8
    return EPS * additions * x.abs().double().sum(-1, keepdim=True) * 2 * weight.abs().double().amax(-1) + 1e-30


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_products_equal_the_reference(isa: str, kind: str) -> None:
    for rows, columns in SHAPES.get(kind, LARGE):
        q = blocks(kind, rows, columns)
        values, weight = q.dequantize(), native.pack(q.type.id, q.blocks, columns)
        for count in COUNTS:
            x = torch.randn(count, columns) * torch.logspace(-3, 3, count)[:, None]
            wanted, got = reference.product(values, x, quantized=True), native.matmul(weight, x)
            assert got.shape == wanted.shape
            assert ((got - wanted).abs() <= bound(values, x)).all(), (rows, columns, count)


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_plain_products_equal_the_reference(isa: str, dtype: torch.dtype) -> None:
    for rows, columns in ((48, 512), (37, 203), (1, 1), (17, 31), (23, 97), (64, 2064)):
        weight = torch.randn(rows, columns).to(dtype)
        for count in PLAIN_COUNTS:
            x = torch.randn(count, columns)
            seen = x.to(dtype).float() if isa in BRAINS and dtype == torch.bfloat16 else x
            wanted, got = reference.product(weight, seen, quantized=False), native.matmul(native.plain(weight), x)
            assert ((got - wanted).abs() <= bound(weight, x)).all(), (rows, columns, count)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_has_the_same_bits_alone(isa: str, kind: str) -> None:
    q = blocks(kind, 37, 512)
    weight, x = native.pack(q.type.id, q.blocks, 512), torch.randn(29, 512)
    together = native.matmul(weight, x)
    for count in (1, 2, 5, 12, 16, 28):
        assert torch.equal(torch.cat([native.matmul(weight, part) for part in x.split(count)]), together)


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_a_row_of_a_plain_product_has_the_same_bits_alone(isa: str, dtype: torch.dtype) -> None:
    weight, x = native.plain(torch.randn(37, 203).to(dtype)), torch.randn(29, 203)
    together = native.matmul(weight, x)
    for count in (1, 2, 3, 4, 5, 6, 7, 12, 25):
        assert torch.equal(torch.cat([native.matmul(weight, part) for part in x.split(count)]), together)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_instruction_set_has_the_same_bits(kind: str) -> None:
    q = blocks(kind, 37, 512)
    weight, x, got = native.pack(q.type.id, q.blocks, 512), torch.randn(13, 512), {}
    for name in offered():
        library().herd_use(name.encode())
        got[name] = native.matmul(weight, x)
    assert all(torch.equal(one, got["scalar"]) for one in got.values())


def test_threads_change_nothing() -> None:
    offered()
    q, x, before = blocks("Q4_K", 200, 512), torch.randn(9, 512), torch.get_num_threads()
    weight = native.pack(q.type.id, q.blocks, 512)
    try:
        torch.set_num_threads(1)
        one = native.matmul(weight, x)
        torch.set_num_threads(3)
        assert torch.equal(native.matmul(weight, x), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", [*FORMATS, None])
def test_a_spoilt_row_is_not_an_answer_and_stays_alone(isa: str, kind: str | None, value: float) -> None:
    if kind is None:
        weight = native.plain(torch.randn(37, 512))
    else:
        q = blocks(kind, 37, 512)
        weight = native.pack(q.type.id, q.blocks, 512)
    for count in (2, 13):
        for column in (0, 17, 255, 511):
            x = torch.randn(count, 512)
            clean = native.matmul(weight, x)
            x[1, column] = value
            got = native.matmul(weight, x)
            assert not got[1].isfinite().any()
            others = torch.arange(count) != 1
            assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-39, 1e-37, 1e30, 3e38])
def test_very_small_and_very_large_activations(isa: str, size: float) -> None:
    q = blocks("Q8_0", 37, 256)
    values, weight = q.dequantize(), native.pack(q.type.id, q.blocks, 256)
    x = torch.full((3, 256), size) * torch.rand(3, 256)
    wanted, got = reference.product(values, x, quantized=True), native.matmul(weight, x)
    assert got.isfinite().any()
    close = (got - wanted).abs() <= bound(values, x)
    assert (
        close | (~got.isfinite() & (bound(values, x) > 1e30))
    ).all()  # sums may overflow on the way, to what shows it


def test_activations_are_rounded_as_the_reference_does_at_the_borders() -> None:
    """Values that fall between two numbers up to a unit in the last place: one rounding more or less would show."""
    q = blocks("Q8_0", 16, 128)
    values, weight = q.dequantize(), native.pack(q.type.id, q.blocks, 128)
    top = torch.rand(4000, 1) * 10 + 0.01
    halves = torch.randint(-126, 126, (4000, 127)) + 0.5
    x = torch.cat([top, halves * top / 127 * (1 + EPS * torch.randint(-3, 4, (4000, 127)))], 1)
    wanted, got = reference.product(values, x, quantized=True), native.matmul(weight, x)
    assert ((got - wanted).abs() <= bound(values, x)).all()


def test_rounding_loses_at_most_half_a_step() -> None:
    x = torch.randn(50, 200) * torch.logspace(-6, 6, 50)[:, None]
    groups = torch.nn.functional.pad(x, (0, 56)).unflatten(-1, (2, 128))
    step = (groups.abs().amax(-1, keepdim=True) / 127).expand_as(groups).flatten(-2)[:, :200]
    assert ((reference.rounded(x) - x).abs() <= step * (0.5 + 1e-5)).all()


def test_odd_leading_shapes() -> None:
    offered()
    q = blocks("Q4_0", 20, 64)
    weight = native.pack(q.type.id, q.blocks, 64)
    x = torch.randn(2, 3, 64)
    assert native.matmul(weight, x).shape == (2, 3, 20)
    assert native.matmul(weight, x[0, 0]).shape == (20,)
    assert native.matmul(weight, x[:0]).shape == (0, 3, 20)
    assert torch.equal(native.matmul(weight, x.transpose(0, 1)), native.matmul(weight, x).transpose(0, 1))
