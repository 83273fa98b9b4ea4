"""Numbers of GGML blocks from the native library: the bits of the decoders in torch, which are held to the `gguf` package's."""

from __future__ import annotations

import pytest
import torch

from herd.kernels import native
from herd.quant.matrix import Matrix
from herd.quant.scheme import QuantTensor, block_type
from tests.kernels.native import FORMATS

SHAPES = ((1, 256), (3, 768), (700, 512))
"""Of one block, of several a row, and of so many that threads share them."""

ANY_HALF = (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x8000, 0x8001, 0xBC00, 0xFBFF, 0x7C00, 0xFC00)
"""Zeros, the smallest and largest subnormal and normal numbers, one, and infinities, of both signs."""


def blocks(kind: str, rows: int, columns: int) -> QuantTensor:
    """Blocks of any bits, with scales from `ANY_HALF` and others that are finite."""
    form = block_type(kind)
    generator = torch.Generator().manual_seed(rows)
    raw = torch.randint(0, 256, (rows * columns // form.values, form.nbytes), dtype=torch.uint8, generator=generator)
    halves = torch.randn(len(raw), generator=generator).half()
    some = torch.tensor(ANY_HALF, dtype=torch.uint16).view(torch.float16)[: len(raw)]
    halves[: len(some)] = some
    for at in (208,) if kind == "Q6_K" else (0, 2) if kind in ("Q4_K", "Q5_K") else (0,):
        raw[:, at : at + 2] = halves.view(torch.uint8).view(-1, 2)
    return QuantTensor(raw.view(rows, -1), form, (rows, columns))


@pytest.fixture(autouse=True)
def library() -> None:
    if native.isa() is None:
        pytest.skip(native.missing() or "")


@pytest.mark.parametrize("kind", FORMATS)
def test_values_are_those_of_the_decoders_bit_for_bit(kind: str) -> None:
    for rows, columns in SHAPES:
        q = blocks(kind, rows, columns)
        wanted, got = q.dequantize(), native.values(q.type.id, q.blocks, columns)
        assert got.shape == (rows, columns)
        # Infinity times zero; which NaN it is, is the processor's choice.
        assert torch.equal(got.isnan(), wanted.isnan())
        known = ~wanted.isnan()
        assert torch.equal(got.view(torch.int32)[known], wanted.view(torch.int32)[known])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("packed", [False, True], ids=["blocks", "panels"])
def test_rows_of_a_table_are_its_values(kind: str, packed: bool) -> None:
    q = blocks(kind, 37, 512)
    table, ids = Matrix(q), torch.tensor([[36, 0, 5], [5, 16, 15]])
    if packed:
        assert table.pack()
        table.drop()
    for dtype in (torch.float32, torch.bfloat16):
        wanted, got = q.dequantize(dtype)[ids], table.look_up(ids, dtype)
        assert got.dtype == dtype
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got[~wanted.isnan()], wanted[~wanted.isnan()])
    assert table.look_up(torch.empty(0, dtype=torch.int64), torch.float32).shape == (0, 512)
