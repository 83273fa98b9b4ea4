"""The small steps of training in one pass, in every instruction set, against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, silu

from herd.kernels import onepass
from herd.model.rope import Rotary, rotate
from tests.kernels.native import isa

__all__ = ["isa"]

CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
"""Of the largest number, against float64. bfloat16 results are rounded once or twice (half of 2^-7 each)."""


def agree(dtype, native, definition, *inputs, grad=None):
    """Results and gradients of `native` beside those of `definition` in float64."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    wanted, found = definition(*exact), native(*inputs)
    assert found.dtype == dtype
    grad = torch.randn(wanted.shape).to(dtype)
    learned = [i for i, x in enumerate(inputs) if x.requires_grad]
    pairs = [(wanted, found)]
    pairs += zip(
        torch.autograd.grad(wanted, [exact[i] for i in learned], grad.double()),
        torch.autograd.grad(found, [inputs[i] for i in learned], grad),
        strict=True,
    )
    for a, b in pairs:
        assert b.dtype == dtype
        assert a.shape == b.shape
        assert (a - b).abs().max() <= CLOSE[dtype] * a.abs().max()


def some(*shape, dtype, spread=1.0):
    return (torch.randn(shape) * spread).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(1, 16), (3, 5, 48), (100, 640)], ids=str)
@pytest.mark.parametrize("weight_learns", [True, False])
def test_the_norm(isa, dtype, shape, weight_learns):
    torch.manual_seed(0)
    x, weight = some(*shape, dtype=dtype), some(shape[-1], dtype=dtype)

    def definition(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * weight

    assert onepass.fits(x, weight)
    agree(dtype, lambda *a: onepass.rms_norm(*a, 1e-3), definition, x, weight.requires_grad_(weight_learns))


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(1, 16), (2, 33, 176)], ids=str)
def test_the_gate(isa, dtype, shape):
    torch.manual_seed(0)
    a, b = some(*shape, dtype=dtype, spread=4), some(*shape, dtype=dtype)
    agree(dtype, onepass.gate, lambda a, b: silu(a) * b, a, b)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(7, 3, 16), (2, 40, 5, 64)], ids=str)
def test_the_rotation(isa, dtype, shape):
    torch.manual_seed(0)
    x = some(*shape, dtype=dtype)
    angles = torch.randn(*shape[:-2], 1, shape[-1] // 2) * 3
    cos, sin = angles.cos(), angles.sin()

    def definition(x):
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    agree(dtype, lambda x: onepass.rotate(x, cos, sin), definition, x)


def test_fewer_angles_than_rows_are_left_to_the_definition():
    """A batch whose rows share their positions."""
    x, angles = torch.randn(2, 6, 3, 16, requires_grad=True), torch.randn(6, 1, 8)
    assert onepass.rotate(x, angles.cos(), angles.sin()) is None
    rotary = Rotary(angles.cos(), angles.sin(), torch.arange(6))
    wanted = rotate(x.detach(), rotary)
    torch.testing.assert_close(rotate(x, rotary), wanted)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("width", [16, 80, 4096])
def test_the_loss_of_rows(isa, dtype, width):
    torch.manual_seed(0)
    logits = (torch.randn(70, width) * 4).to(dtype)
    logits[3] += 60
    labels = torch.randint(0, width, (70,))
    exact = logits.double().requires_grad_()
    wanted = cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    kept = logits.clone()
    found = onepass.learn_rows(kept, labels, gradient=False)
    assert torch.equal(kept, logits)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-6)  # sums are float32 whatever the logits are
    assert torch.equal(onepass.learn_rows(kept, labels, gradient=True), found)
    assert (kept - gradient).abs().max() <= CLOSE[dtype]


@pytest.mark.parametrize("label", [-1, 16])
def test_a_label_beyond_the_logits_reads_no_other_memory(label):
    if not onepass.takes(torch.zeros(1, 16)):
        pytest.skip("no native library")
    with pytest.raises(IndexError, match="of 16"):
        onepass.learn_rows(torch.zeros(2, 16), torch.tensor([0, label]), gradient=True)


def test_threads_change_no_bit(isa):
    torch.manual_seed(0)
    x, weight, grad = some(100, 64, dtype=torch.float32), some(64, dtype=torch.float32), torch.randn(100, 64)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = onepass.rms_norm(x, weight, 1e-5)
            results.append([out, *torch.autograd.grad(out, (x, weight), grad)])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit():
    x = torch.randn(2, 16, requires_grad=True)
    fits = onepass.takes(x)  # without the library nothing does
    assert onepass.fits(x) == fits
    assert not onepass.fits(x.detach())
    assert not onepass.fits(x, torch.zeros(16, dtype=torch.bfloat16))
    assert not onepass.fits(torch.randn(2, 8, requires_grad=True))
    assert not onepass.fits(x.double())
    with torch.no_grad():
        assert not onepass.fits(x)
