"""The plain definitions of fused steps against the model's own modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from herd.kernels import fused, paged
from herd.kernels.fused import PLACEMENTS
from herd.model.attend import masked_attention
from herd.model.norm import RMSNorm
from herd.model.rope import Rotary, make_placement
from tests.build import TINY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_gate(dtype: torch.dtype) -> None:
    norm = RMSNorm(24, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, delta = (torch.randn(5, 24).to(dtype) for _ in range(2))
    with torch.no_grad():
        assert torch.equal(fused.rms_norm(x, norm.weight, 1e-5), norm(x))
        expected = norm(x + delta)
        assert torch.equal(fused.add_rms_norm(x, delta, norm.weight, 1e-5), expected)
    gate, up = (torch.randn(5, 7).to(dtype) for _ in range(2))
    found, expected = fused.silu_mul(torch.cat((gate, up), 1)), torch.nn.functional.silu(gate) * up
    assert torch.allclose(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)  # exp in vector registers or not


@pytest.mark.parametrize("kv", [torch.float32, torch.int8])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placing(placement: str, kv: torch.dtype) -> None:
    config = TINY["llama-4-scout"]
    spec = replace(config.layers[0], placement=placement)
    heads, kv_heads, width = config.n_heads, config.n_kv_heads, config.head_dim
    whole = torch.randn(4, (heads + 2 * kv_heads) * width)
    q, k, v = (
        t.unflatten(1, (-1, width)) for t in whole.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    )
    positions = torch.tensor([3, 40, 7, 0])
    angle = positions[:, None] * torch.rand(width // 2)
    module = make_placement(config, spec)
    want_q, want_k = module(q, k, Rotary(angle.cos()[:, None], angle.sin()[:, None], positions))
    temper = module.scale(positions) if placement == "tempered" else None
    slots = torch.tensor([5, 2, -1, 9])
    caches = [[torch.zeros(3, 4, kv_heads, width, dtype=kv) for _ in "kv"] for _ in range(2)]
    scales = [[torch.zeros(3, 4, kv_heads) for _ in "kv"] if kv == torch.int8 else [None, None] for _ in range(2)]
    out = fused.place_write(
        q, k, v, angle.cos(), angle.sin(), slots, *caches[0], *scales[0],
        placement=placement, eps=config.norm_eps, temper=temper,
    )  # fmt: skip
    assert torch.equal(out, want_q)
    kept = slots >= 0
    if kv == torch.int8:
        paged.write_kv_int8(want_k[kept], v[kept], *caches[1], *scales[1], slots[kept])
    else:
        paged.write_kv(want_k[kept], v[kept], *caches[1], slots[kept])
    for one, other in zip(caches[0] + scales[0], caches[1] + scales[1], strict=True):
        assert one is other is None or torch.equal(one, other)


def test_rows_of_a_cache() -> None:
    """decode_attention against attention over the sequence laid out plainly; an idle row; rows of one sequence."""
    k, v = torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    tables = torch.tensor([[2, 0, 3], [1, 1, 1]], dtype=torch.int32)
    caches = [torch.zeros(4, 4, 2, 8) for _ in "kv"]
    at = torch.arange(12)
    paged.write_kv(k, v, *caches, tables[0][at // 4].long() * 4 + at % 4)
    q, positions = torch.randn(4, 4, 8), torch.tensor([11, -1, 4, 0])
    out = paged.decode_attention(q, *caches, positions, tables, owners=torch.tensor([0, 1, 0, 0]))
    for row, position in ((0, 11), (2, 4), (3, 0)):
        seen = slice(position + 1)
        expected = masked_attention(q[row][None], k[seen], v[seen], torch.ones(1, 1, position + 1, dtype=torch.bool))
        assert torch.allclose(out[row], expected[0], atol=1e-6, rtol=0)
    assert not out[1].any()


def test_declared_as_torch_demands() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    kinds = ("test_schema", "test_faketensor")
    ops = torch.ops.herd
    torch.library.opcheck(ops.rms_norm_out.default, (x, weight, 1e-5, x.clone()), test_utils=kinds)
    torch.library.opcheck(ops.add_rms_norm_out.default, (x, x.clone(), weight, 1e-5, x.clone()), test_utils=kinds)
    torch.library.opcheck(ops.silu_mul_out.default, (x, torch.empty(3, 4)), test_utils=kinds)
    q, k = torch.randn(2, 4, 8), torch.randn(2, 2, 8)
    cache = [torch.zeros(2, 4, 2, 8) for _ in "kv"]
    angle, slots = torch.rand(2, 4), torch.tensor([1, 6])
    arguments = (q, k, k.clone(), angle, angle.clone(), slots, *cache, None, None, "rope", 1e-5, None, q.clone())
    torch.library.opcheck(ops.place_write_out.default, arguments, test_utils=kinds)
    tables, positions = torch.tensor([[0], [1]], dtype=torch.int32), torch.tensor([2, 0])
    rest = (None, None, None, None, 2, paged.decode_scratch(2, 4, 8, 2, "cpu"), q.clone())
    torch.library.opcheck(ops.decode_attention_out.default, (q, *cache, positions, tables, *rest), test_utils=kinds)
    spans = torch.tensor([[0, 2, 1, 0]])
    arguments = (q, *cache, spans, tables, None, None, None, q.clone())
    torch.library.opcheck(ops.span_attention_out.default, arguments, test_utils=kinds)


def test_number_of_parts() -> None:
    assert paged.decode_splits(1, 8, 100) == 1  # too short to part
    assert paged.decode_splits(64, 8, 100_000) == 1  # enough rows for all cores
    assert paged.decode_splits(1, 8, 100_000) > 16
    assert len({paged.decode_splits(rows, 8, longest, fixed=True) for rows in (1, 99) for longest in (9, 9999)}) == 1
