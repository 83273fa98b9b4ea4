"""Norms, gates and placing: Triton against the plain definitions, which are tested in tests/kernels/test_fused.py."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from herd.kernels import fused
from tests.modes.pairs import pairs

pytest.importorskip("triton", reason="triton is for Linux")

ORDER = 1e-6
"""Sums of a row in another order, and another reciprocal root: a few roundings of float32."""

HALF = 2**-9
"""The same before a rounding to float16 (11 bits): one step where they fell to different sides."""

BRAIN = 2**-6
"""And to bfloat16 (8 bits)."""

BOUND = {torch.float32: ORDER, torch.float16: HALF, torch.bfloat16: BRAIN}


def near(found: Tensor, expected: Tensor) -> bool:
    """Within the bound of the dtype, of numbers of order one or larger."""
    gap = (found.float() - expected.float()).abs()
    return bool((gap <= BOUND[found.dtype] * (1 + expected.float().abs())).all())


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, device: str) -> torch.dtype:
    if request.param == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter cuts bfloat16 off where devices round")
    return request.param


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 100), (2, 2048)])
def test_norms(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    from herd.kernels.triton import norm

    x, delta = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(width, device=device).to(dtype)
    expected, found, changed = torch.empty_like(x), torch.empty_like(x), x.clone()
    fused.rms_norm_out.__wrapped__(x, weight, 1e-5, expected)
    norm.rms_norm_out(x, weight, 1e-5, found)
    assert near(found, expected)
    fused.add_rms_norm_out.__wrapped__(x, delta, weight, 1e-5, expected)
    norm.add_rms_norm_out(changed, delta, weight, 1e-5, found)
    assert torch.equal(changed, x)
    assert near(found, expected)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 100), (2, 1500)])
def test_gate(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    from herd.kernels.triton import gate

    both = torch.randn(rows, 2 * width, device=device).to(dtype)
    far = 80 if device == "cpu" else 90  # from 89 on, exp overflows: as it may, but numpy warns
    both[0, 0], both[0, 1] = far, -far
    expected, found = (torch.empty(rows, width, device=device, dtype=dtype) for _ in range(2))
    fused.silu_mul_out.__wrapped__(both, expected)
    gate.silu_mul_out(both, found)
    assert near(found, expected)


@pytest.mark.parametrize(
    ("way", "shape"), pairs(product(fused.PLACEMENTS, [False, True]), [(4, 2, 8), (5, 1, 24), (6, 6, 64)])
)
def test_placing(device: str, dtype: torch.dtype, way: tuple[str, bool], shape: tuple[int, int, int]) -> None:
    """Views of one projection, a row that writes nothing, blocks of the cache that stay as they were."""
    from herd.kernels.triton import place

    rows, (placement, eight), (heads, kv_heads, width) = 4, way, shape
    whole = torch.randn(rows, (heads + 2 * kv_heads) * width, device=device).to(dtype)
    parts = whole.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    q, k, v = (t.unflatten(1, (-1, width)) for t in parts)
    angle = torch.rand(rows, width // 2, device=device) * 6
    slots = torch.tensor([3, -1, 9, 0], device=device)
    temper = torch.rand(rows, device=device) + 1

    def cache() -> list[Tensor | None]:
        kind = torch.int8 if eight else dtype
        values: list[Tensor | None] = [torch.full((3, 4, kv_heads, width), 7, dtype=kind, device=device) for _ in "kv"]
        return values + [torch.full((3, 4, kv_heads), 7.0, device=device) if eight else None for _ in "kv"]

    expected, found = cache(), cache()
    q1, q2 = (torch.empty(rows, heads, width, dtype=dtype, device=device) for _ in range(2))
    rest = placement, 1e-5, temper
    fused.place_write_out.__wrapped__(q, k, v, angle.cos(), angle.sin(), slots, *expected, *rest, q1)
    place.place_write_out(q, k, v, angle.cos(), angle.sin(), slots, *found, *rest, q2)
    assert near(q2, q1)
    for one, other in zip(expected, found, strict=True):
        if one is not None and other is not None:
            if eight and one.dtype == torch.int8:  # a code may fall to the other side of a half
                assert (one.int() - other.int()).abs().max() <= 1
            else:
                assert near(other, one)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets
def test_a_number_that_is_not_finite_is_seen_in_an_int8_cache(device: str) -> None:
    from herd.kernels.triton import place

    k = torch.ones(2, 1, 16, device=device)
    k[0, 0, 3], k[1, 0, 5] = torch.nan, torch.inf
    cache = [torch.zeros(1, 4, 1, 16, dtype=torch.int8, device=device) for _ in "kv"]
    scales = [torch.zeros(1, 4, 1, device=device) for _ in "kv"]
    angle = torch.zeros(2, 8, device=device)
    slots = torch.arange(2, device=device)
    place.place_write_out(k, k, k, angle.cos(), angle, slots, *cache, *scales, "none", 1e-5, None, torch.empty_like(k))
    for scale in scales:
        assert not scale[0, :2].isfinite().any()
