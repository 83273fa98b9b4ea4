"""Attention over a paged cache: Triton against `herd.kernels.paged`, which is tested against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.kernels import paged

pytest.importorskip("triton", reason="triton is for Linux")

ORDER = 4e-6
"""float32 sums of some hundred products of order one, in another order."""

HALF = 4e-3
"""Chances and results rounded to float16; values reach 4."""

BRAIN = 4e-2
"""The same with bfloat16."""

BOUND = {torch.float32: ORDER, torch.float16: HALF, torch.bfloat16: BRAIN}
CASES = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Case:
    """Spans of three sequences whose blocks lie anywhere, foreign and unwritten places full of NaN, an empty span between."""

    def __init__(
        self, pieces: list[tuple[int, int]], size: int, heads: tuple[int, int], width: int, dtype: torch.dtype,
        eight: bool, seed: int, device: str,
    ) -> None:  # fmt: skip
        make = torch.Generator().manual_seed(seed)
        n, n_kv = heads
        need = [-(-(start + rows) // size) for start, rows in pieces]
        shape = (sum(need) + 2, size, n_kv, width)
        if eight:
            cache = [torch.randint(-127, 128, shape, dtype=torch.int8, generator=make) for _ in "kv"]
            scales = [torch.full(shape[:3], math.nan) for _ in "kv"]
        else:
            cache, scales = [torch.full(shape, math.nan, dtype=dtype) for _ in "kv"], []
        order = torch.randperm(shape[0], generator=make)
        tables = torch.zeros(len(pieces) + 1, max(need), dtype=torch.int32)
        spans, used, row = [], 0, 0
        positions, owners = [], []
        for i, ((start, rows), blocks) in enumerate(zip(pieces, need, strict=True)):
            tables[i, :blocks] = order[used : used + blocks]
            used += blocks
            at = torch.arange(start + rows)
            slots = tables[i][at // size].long() * size + at % size
            for tensor in cache if not eight else ():
                tensor.flatten(0, 1)[slots] = torch.randn(len(at), n_kv, width, generator=make).to(dtype)
            for tensor in scales:
                tensor.flatten(0, 1)[slots] = torch.rand(len(at), n_kv, generator=make) * 0.02
            spans.append((row, rows, start, i))
            positions.append(at[start:])
            owners.append(torch.full((rows,), i))
            row += rows
        spans.insert(1, (row, 0, 3, len(pieces)))
        self.q = torch.randn(row, n, width, generator=make).to(dtype).to(device)
        self.k, self.v = (t.to(device) for t in cache)
        self.scales: list[Tensor | None] = [t.to(device) for t in scales] if eight else [None, None]
        self.spans, self.tables = torch.tensor(spans, device=device), tables.to(device)
        self.positions, self.owners = torch.cat(positions).to(device), torch.cat(owners).to(device)

    def expected(self, chunk: int | None) -> Tensor:
        """In float32."""
        k, v = (t if t.dtype == torch.int8 else t.float() for t in (self.k, self.v))
        return paged.paged_attention(self.q.float().cpu(), k.cpu(), v.cpu(), self.spans.cpu(), self.tables.cpu(), chunk,
                                     *(None if s is None else s.cpu() for s in self.scales))  # fmt: skip


case = {
    "pieces": st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=3),
    "size": st.sampled_from([1, 4, 16]),
    "heads": st.sampled_from([(4, 2), (5, 1), (3, 3), (6, 2)]),
    "width": st.sampled_from([16, 24, 64]),
    "chunk": st.sampled_from([None, None, 5, 40]),
    "eight": st.booleans(),
    "half": st.booleans(),
    "seed": st.integers(0, 99),
}


def kind(half: bool, device: str) -> torch.dtype:
    """bfloat16 products are beyond the interpreter."""
    return (torch.float16 if device == "cpu" else torch.bfloat16) if half else torch.float32


@CASES
@given(**case)
def test_spans(
    device: str, pieces: list[tuple[int, int]], size: int, heads: tuple[int, int], width: int, chunk: int | None,
    eight: bool, half: bool, seed: int,
) -> None:  # fmt: skip
    from herd.kernels.triton import prefill

    dtype = kind(half, device)
    c = Case(pieces, size, heads, width, dtype, eight, seed, device)
    found = prefill.paged_attention(c.q, c.k, c.v, c.spans, c.tables, chunk, *c.scales)
    assert (found.float().cpu() - c.expected(chunk)).abs().max() <= BOUND[dtype]


@CASES
@given(**case, splits=st.sampled_from([1, 3, 16]))
def test_rows(
    device: str, pieces: list[tuple[int, int]], size: int, heads: tuple[int, int], width: int, chunk: int | None,
    eight: bool, half: bool, seed: int, splits: int,
) -> None:  # fmt: skip
    """Any rows in any order, an idle one among them."""
    from herd.kernels.triton import attention

    dtype = kind(half, device)
    c = Case(pieces, size, heads, width, dtype, eight, seed, device)
    pick = torch.randperm(len(c.q), generator=torch.Generator().manual_seed(seed))[:5].to(device)
    expected, positions = c.expected(chunk)[pick.cpu()], c.positions[pick]
    expected[-1], positions[-1] = 0, -1
    found = torch.full_like(c.q[pick], 9)
    scratch = paged.decode_scratch(len(pick), heads[0], width, splits, device)
    attention.decode_attention_out(
        c.q[pick], c.k, c.v, positions, c.tables, chunk, *c.scales, c.owners[pick], splits, scratch, found
    )
    assert (found.float().cpu() - expected).abs().max() <= BOUND[dtype]


def test_a_row_has_the_same_bits_in_any_company(device: str) -> None:
    """Alone and among others, in a prompt of any pieces: with a fixed number of splits, and in tiles of prompts."""
    from herd.kernels.triton import attention, prefill

    c = Case([(0, 22), (33, 4)], 16, (2, 1), 16, torch.float32, False, 0, device)
    splits = 4
    scratch = paged.decode_scratch(len(c.q), 2, 16, splits, device)
    together, alone = torch.empty_like(c.q), torch.empty_like(c.q)
    attention.decode_attention_out(
        c.q, c.k, c.v, c.positions, c.tables, None, None, None, c.owners, splits, scratch, together
    )
    for row in (0, 19, 25):
        one = slice(row, row + 1)
        attention.decode_attention_out(
            c.q[one], c.k, c.v, c.positions[one], c.tables, None, None, None, c.owners[one], splits, scratch, alone[one]
        )
        assert torch.equal(alone[one], together[one])
    whole = prefill.paged_attention(c.q, c.k, c.v, c.spans, c.tables, None)
    pieces = torch.tensor([[0, 9, 0, 0], [9, 13, 9, 0], [22, 1, 33, 1], [23, 3, 34, 1]], device=device)
    assert torch.equal(prefill.paged_attention(c.q, c.k, c.v, pieces, c.tables, None), whole)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets
def test_numbers_that_are_not_finite_are_seen(device: str) -> None:
    from herd.kernels.triton import attention, prefill

    c = Case([(60, 4)], 16, (4, 2), 16, torch.float32, False, 0, device)
    c.k[c.tables[0, 1].long(), 2] = torch.nan
    found = torch.zeros_like(c.q)
    scratch = paged.decode_scratch(4, 4, 16, 3, device)
    attention.decode_attention_out(c.q, c.k, c.v, c.positions, c.tables, None, None, None, c.owners, 3, scratch, found)
    assert found.isnan().all()
    assert prefill.paged_attention(c.q, c.k, c.v, c.spans, c.tables, None).isnan().all()
