"""Products with packed weights: Triton against x W^T with the values that `Packed.dequantize` gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from herd.kernels import packed
from herd.kernels.packed import KINDS, Packed
from herd.quant.packing import PACKS, pack
from tests.kernels.native import blocks
from tests.modes.pairs import pairs

pytest.importorskip("triton", reason="triton is for Linux")

ORDER = 1e-6
"""Of the largest result: float32 sums of some hundred products, in another order."""

HALF = 1e-3
"""A rounding of the result to float16; weights are rounded to it on both sides."""

BRAIN = 8e-3
"""To bfloat16."""

BOUND = {torch.float32: ORDER, torch.float16: HALF, torch.bfloat16: BRAIN}
COLUMNS = {"plain": 200, "fp8": 96, "int8": 72, "q8": 160, "q4": 96, "q4k": 256, "q5k": 256, "q6k": 256}


def weight(kind: str, rows: int, dtype: torch.dtype) -> Packed:
    """A random one, of as many columns as the kind's test has."""
    columns = COLUMNS[kind]
    if kind == "plain":
        return packed.plain(torch.randn(rows, columns).to(dtype))
    if kind in ("fp8", "int8"):
        return getattr(packed, kind)(torch.randn(rows, columns))
    return pack(blocks(next(name for name, form in PACKS.items() if form == kind), rows, columns))


def values(w: Packed, dtype: torch.dtype) -> Tensor:
    """As the kernel multiplies: codes of whole rows as they are, others rounded to the dtype of x."""
    return w.dequantize(torch.float32 if w.kind in ("fp8", "int8") else dtype).float()


def parts(w: Packed) -> tuple[Tensor | None, ...]:
    return w.scale, w.sub, w.minimum, w.sub_minimum


@pytest.mark.parametrize(
    ("kind", "dtype"), [*pairs(KINDS, [torch.float32, torch.float16]), *itertools.product(KINDS, [torch.bfloat16])]
)
def test_products(device: str, dtype: torch.dtype, kind: str) -> None:
    """One row, a few, more than a tile; columns in two parts; a number of weight rows that fills no tile."""
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter has no bfloat16 products")
    from herd.kernels.triton import product
    from herd.kernels.triton.tiles import RowTile, Tile

    w = weight(kind, 21, dtype)
    x = torch.randn(19, w.columns).to(dtype)
    expected = x.float() @ values(w, dtype).T
    x, w = x.to(device), w.to(device)
    found = torch.empty(19, 21, dtype=dtype, device=device)
    product.launch_tiles(x, kind, w.codes, parts(w), None, found, Tile(16, 16, 64, 2, warps=4, stages=2))
    assert worst(found, expected) <= BOUND[dtype]
    found = torch.empty(1, 21, dtype=dtype, device=device)
    product.launch_row(x[:1], kind, w.codes, parts(w), found, RowTile(4, 128, warps=4, stages=2))
    assert worst(found, expected[:1]) <= BOUND[dtype]
    for rows in (3, 17):
        found = torch.empty(rows, 21, dtype=dtype, device=device)
        product.product_out(x[:rows], kind, w.codes, *parts(w), False, found)
        assert worst(found, expected[:rows]) <= BOUND[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [[1, 0, 8], [0, 9, 0]])
def test_experts(device: str, kind: str, counts: list[int]) -> None:
    """Experts without rows, in the middle and at the ends; more rows than a tile has in one."""
    from herd.kernels.triton import product

    dtype = torch.float32
    w = packed.stack([weight(kind, 18, dtype) for _ in counts])
    x = torch.randn(sum(counts), w.columns)
    each = values(w, dtype)
    expected = torch.cat([rows @ e.T for rows, e in zip(x.split(counts), each, strict=True)])
    x, w = x.to(device), w.to(device)
    found = torch.empty(len(x), 18, device=device)
    product.expert_product_out(x, kind, w.codes, *parts(w), torch.tensor(counts, device=device), False, found)
    assert worst(found, expected) <= BOUND[dtype]


@pytest.mark.parametrize("kind", ["plain", "q4"])
def test_a_fixed_row_has_the_same_bits_in_any_company(device: str, kind: str) -> None:
    from herd.kernels.triton import product

    w = weight(kind, 20, torch.float16).to(device)
    x = torch.randn(70, w.columns).half().to(device)
    together, alone = (torch.empty(70, 20, dtype=torch.float16, device=device) for _ in range(2))
    product.product_out(x, kind, w.codes, *parts(w), True, together)
    for row in (0, 31, 69):
        product.product_out(x[row : row + 1], kind, w.codes, *parts(w), True, alone[row : row + 1])
        assert torch.equal(alone[row], together[row])


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found.float().cpu() - expected).abs().max() / expected.abs().max())


def test_every_bit_pattern_of_fp8(device: str) -> None:
    """All 254 numbers of float8_e4m3fn, the smallest among them, exactly."""
    from herd.kernels.triton import product
    from herd.kernels.triton.tiles import RowTile

    bits = torch.tensor([b for b in range(256) if b & 127 != 127], dtype=torch.uint8)
    codes = bits.view(torch.float8_e4m3fn)[:, None].repeat(1, 64).contiguous()
    x = torch.zeros(1, 64)
    x[0, 5] = 1
    found = torch.empty(1, 254, device=device)
    args = codes.to(device), (torch.ones(254, device=device), None, None, None), found
    product.launch_row(x.to(device), "fp8", *args, RowTile(4, 64, warps=1, stages=1))
    assert torch.equal(found[0].cpu(), codes[:, 0].float())
