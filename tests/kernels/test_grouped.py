"""The grouped matrix product against a loop over rows, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from herd.kernels.grouped import grouped_linear

COUNTS = {
    "even": [3, 3, 3, 3],
    "empty groups": [0, 5, 0, 7],
    "all in the last": [0, 0, 0, 12],
    "all in the first": [12, 0, 0, 0],
    "one group": [12],
}


def by_rows(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The definition: each row times its group's matrix."""
    group = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.stack([weight[g] @ row for g, row in zip(group.tolist(), x, strict=True)])


def operands(counts: list[int], width: int = 5, height: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, width], weight [E, height, width], counts [E]."""
    x = torch.randn(sum(counts), width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(counts), height, width, dtype=torch.float64, requires_grad=True)
    return x, weight, torch.tensor(counts)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_equals_the_loop(counts: list[int]) -> None:
    x, weight, groups = operands(counts)
    assert torch.allclose(grouped_linear(x, weight, groups), by_rows(x, weight, groups), rtol=0, atol=1e-14)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_gradients(counts: list[int]) -> None:
    x, weight, groups = operands(counts, 3, 2)  # each number is moved by itself
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, groups), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_linear(a, b, groups), (x, weight))


def test_gradient_of_one_operand_only() -> None:
    x, weight, groups = operands([5, 0, 7])
    grouped_linear(x, weight.detach(), groups).sum().backward()
    grouped_linear(x.detach(), weight, groups).sum().backward()
    assert weight.grad is not None
    assert weight.grad[1].abs().max() == 0  # nobody came: no gradient, and no leftover memory


def test_no_rows() -> None:
    x, weight, groups = operands([0, 0])
    out = grouped_linear(x, weight, groups)
    assert out.shape == (0, 7)
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0


def test_views_and_half_precision() -> None:
    """Weights as they come from a fused or transposed file tensor, rows as they come from a slice."""
    x, weight, groups = operands([5, 0, 7])
    stored = weight.detach().transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([x.detach(), x.detach()], 1)[:, :5]
    assert torch.allclose(grouped_linear(wide, stored, groups), by_rows(x, weight, groups), rtol=0, atol=1e-14)
    half = grouped_linear(x.detach().bfloat16(), weight.detach().bfloat16(), groups)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.double(), by_rows(x, weight, groups), rtol=0.05, atol=0.05)


def test_counts_must_add_up() -> None:
    x, weight, _ = operands([5, 7])
    with pytest.raises(AssertionError, match="counts add up to 11 of 12 rows"):
        grouped_linear(x, weight, torch.tensor([5, 6]))


def test_compiles_whole_for_any_counts() -> None:
    """Group sizes are data: one graph serves all of them, forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for counts in ([3, 3, 3, 3], [0, 5, 0, 7], [12, 0, 0, 0]):
            x, weight, groups = operands(counts)
            out = compiled(x, weight, groups)
            grads = torch.autograd.grad(out.square().sum(), (x, weight))
            expected = torch.autograd.grad(by_rows(x, weight, groups).square().sum(), (x, weight))
            for grad, right in zip(grads, expected, strict=True):
                assert torch.allclose(grad, right)


def test_op_registration() -> None:
    """torch's own checks of schema, fake kernel and autograd."""
    x, weight, groups = operands([5, 0, 7])
    product, outer = torch.ops.herd.grouped_linear.default, torch.ops.herd.grouped_outer.default
    kinds = ("test_schema", "test_faketensor")
    torch.library.opcheck(product, (x, weight, groups), test_utils=kinds)
    torch.library.opcheck(product, (x, weight, groups), test_utils="test_autograd_registration")
    y = torch.randn(12, 7, dtype=x.dtype, requires_grad=True)
    torch.library.opcheck(outer, (y, x, groups), test_utils=kinds)
    torch.library.opcheck(outer, (y, x, groups), test_utils="test_autograd_registration")
