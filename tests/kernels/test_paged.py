from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.kernels.paged import dequantize_rows, paged_attention, quantize_rows, write_kv, write_kv_int8

ORDER_BOUND = 2e-6
"""fp32 sums of a few dozen products of order one, in another order."""


def caches(blocks: int, size: int, heads: int, width: int, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    return torch.full((blocks, size, heads, width), fill), torch.full((blocks, size, heads, width), fill)


def by_hand(q: Tensor, k: Tensor, v: Tensor, position: int, chunk: int | None) -> Tensor:
    """One query at a time, one head at a time, from the definition. q [rows, H, Dh]; k, v [positions, Hkv, Dh]."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for row in range(q.shape[0]):
        at = position + row
        keys = [p for p in range(at + 1) if chunk is None or p // chunk == at // chunk]
        for head in range(q.shape[1]):
            scores = k[keys, head // group] @ q[row, head] / math.sqrt(q.shape[2])
            out[row, head] = torch.softmax(scores, 0) @ v[keys, head // group]
    return out


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), min_size=1, max_size=4),
    size=st.integers(1, 7),
    heads=st.sampled_from([(1, 1), (4, 2), (5, 1), (3, 3)]),
    chunk=st.sampled_from([None, 1, 4, 6]),
    seed=st.integers(0, 99),
)
def test_spans_of_many_sequences(
    pieces: list[tuple[int, int]], size: int, heads: tuple[int, int], chunk: int | None, seed: int
) -> None:
    """Against the definition: any positions, blocks anywhere, foreign blocks full of NaN, an empty span between."""
    generator = torch.Generator().manual_seed(seed)
    n, n_kv, width = *heads, 8
    need = [-(-(start + rows) // size) for start, rows in pieces]
    k_cache, v_cache = caches(sum(need) + 2, size, n_kv, width, math.nan)
    order = torch.randperm(sum(need) + 2, generator=generator)
    tables = torch.zeros(len(pieces) + 1, max(need), dtype=torch.int32)
    spans, expected, queries, used, row = [], [], [], 0, 0
    for i, ((start, rows), blocks) in enumerate(zip(pieces, need, strict=True)):
        tables[i, :blocks] = order[used : used + blocks]
        used += blocks
        k, v = (torch.randn(start + rows, n_kv, width, generator=generator) for _ in range(2))
        at = torch.arange(start + rows)
        write_kv(k, v, k_cache, v_cache, tables[i][at // size].long() * size + at % size)
        queries.append(torch.randn(rows, n, width, generator=generator))
        expected.append(by_hand(queries[-1], k, v, start, chunk))
        spans.append((row, rows, start, i))
        row += rows
    spans.insert(1, (row, 0, 3, len(pieces)))
    out = paged_attention(torch.cat(queries), k_cache, v_cache, torch.tensor(spans), tables, chunk)
    assert (out - torch.cat(expected)).abs().max() <= ORDER_BOUND


def test_a_span_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    k_cache, v_cache = (torch.randn(9, 4, 2, 16) for _ in range(2))
    q = torch.randn(9, 4, 16)
    tables = torch.tensor([[0, 3, 1], [2, 5, 8], [7, 4, 6]], dtype=torch.int32)
    spans = torch.tensor([[0, 1, 9, 0], [1, 7, 4, 1], [8, 1, 2, 2]])
    together = paged_attention(q, k_cache, v_cache, spans, tables, None)
    for row, rows, position, table in spans.tolist():
        alone = paged_attention(
            q[row : row + rows], k_cache, v_cache, torch.tensor([[0, rows, position, table]]), tables, None
        )
        assert torch.equal(alone, together[row : row + rows])


def test_int8_rounding() -> None:
    """Every value within half a step; the largest of a head and zeros exact."""
    torch.manual_seed(0)
    x = torch.randn(50, 3, 16) * torch.logspace(-6, 4, 50)[:, None, None]
    x[7] = 0
    values, scale = quantize_rows(x)
    assert values.dtype == torch.int8
    back = dequantize_rows(values, scale, torch.float32)
    assert ((back - x).abs() <= scale[..., None] * (0.5 + 1e-5)).all()
    assert torch.equal(back[7], x[7])
    assert (values.abs().amax(-1)[torch.arange(50) != 7] == 127).all()


def test_int8_cache() -> None:
    torch.manual_seed(0)
    k, v, q = torch.randn(10, 2, 8), torch.randn(10, 2, 8), torch.randn(10, 4, 8)
    slots = torch.arange(10) + 4
    kc, vc = (torch.zeros(4, 4, 2, 8, dtype=torch.int8) for _ in range(2))
    ks, vs = (torch.zeros(4, 4, 2) for _ in range(2))
    write_kv_int8(k, v, kc, vc, ks, vs, slots)
    spans, tables = torch.tensor([[0, 10, 0, 0]]), torch.tensor([[1, 2, 3]], dtype=torch.int32)
    out = paged_attention(q, kc, vc, spans, tables, None, ks, vs)
    rounded = [dequantize_rows(*quantize_rows(t), torch.float32) for t in (k, v)]
    assert (out - by_hand(q, *rounded, 0, None)).abs().max() <= ORDER_BOUND
    assert not kc[0].any()  # slots 0 .. 3 are nobody's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_declared_as_torch_demands(dtype: torch.dtype) -> None:
    """Schema, mutation and fake kernels, by torch's own checker."""
    k, v, q = (torch.randn(3, heads, 8).to(dtype) for heads in (2, 2, 4))
    kc, vc = (t.to(dtype) for t in caches(2, 4, 2, 8))
    slots = torch.tensor([4, 5, 6])
    spans, tables = torch.tensor([[0, 3, 0, 0]]), torch.tensor([[1, 0]], dtype=torch.int32)
    kinds = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.herd.write_kv.default, (k, v, kc, vc, slots), test_utils=kinds)
    torch.library.opcheck(torch.ops.herd.paged_attention.default, (q, kc, vc, spans, tables, 4), test_utils=kinds)
    k8, v8 = (torch.zeros(2, 4, 2, 8, dtype=torch.int8) for _ in range(2))
    scales = torch.zeros(2, 4, 2), torch.zeros(2, 4, 2)
    torch.library.opcheck(torch.ops.herd.write_kv_int8.default, (k, v, k8, v8, *scales, slots), test_utils=kinds)
    torch.library.opcheck(
        torch.ops.herd.paged_attention.default, (q, k8, v8, spans, tables, None, *scales), test_utils=kinds
    )
