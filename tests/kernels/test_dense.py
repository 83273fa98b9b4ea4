import pytest
import torch
from torch import nn

from herd.kernels import dense
from herd.train.precision import WideLinear, compute_in, compute_plainly

CLOSE = 2e-6
"""Of the largest number, against float64: sums of up to 700 products."""


@pytest.fixture
def everywhere(monkeypatch):
    """As on a processor where oneDNN is the faster one; torch has it on every processor."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(dense, "available", lambda: True)
    monkeypatch.setattr(dense, "_LEAST", 1)


@pytest.mark.parametrize("shape", [(7, 40, 24), (130, 640, 96), (1, 16, 700)], ids=str)
def test_products_and_gradients_are_those_of_float64(everywhere, shape):
    rows, columns, outputs = shape
    torch.manual_seed(0)
    x, weight = torch.randn(2, rows, columns).requires_grad_(), torch.randn(outputs, columns).requires_grad_()
    grad = torch.randn(2, rows, outputs)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = exact[0] @ exact[1].T
    assert dense.fits(x, weight)
    found = dense.linear(x, weight)
    gradients = zip(
        torch.autograd.grad(wanted, exact, grad.double()), torch.autograd.grad(found, (x, weight), grad), strict=True
    )
    for a, b in [(wanted, found), *gradients]:
        assert a.shape == b.shape
        assert (a - b).abs().max() <= CLOSE * a.abs().max()


def test_the_same_bits_every_time(everywhere):
    x, weight = torch.randn(300, 64), torch.randn(80, 64)
    assert torch.equal(dense.product(x, weight), dense.product(x.clone(), weight.clone()))


def test_a_frozen_weight_and_a_first_layer(everywhere):
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    (by_x,) = torch.autograd.grad(dense.linear(x, weight).sum(), x)
    torch.testing.assert_close(by_x, weight.sum(0).expand(4, -1))
    weight.requires_grad_()
    (by_weight,) = torch.autograd.grad(dense.linear(x.detach(), weight).sum(), weight)
    torch.testing.assert_close(by_weight, x.detach().sum(0).expand(6, -1))


def test_what_is_left_to_torch(everywhere):
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    assert dense.fits(x, weight)
    assert not dense.fits(x.double(), weight.double())
    assert not dense.fits(x.bfloat16(), weight)
    with torch.no_grad():
        assert not dense.fits(x, weight)
    assert torch.equal(dense.product(x.double(), weight.double()), x.double() @ weight.double().T)


def test_small_products_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(dense, "available", lambda: True)
    assert not dense.fits(torch.randn(4, 8), torch.randn(6, 8))


def test_a_model_takes_it_and_gives_it_back(everywhere):
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 4))
    x = torch.randn(3, 8)
    before = model(x)
    compute_in(model, torch.float32)
    assert [type(layer) for layer in model] == [WideLinear, WideLinear]
    torch.testing.assert_close(model(x), before, rtol=CLOSE, atol=CLOSE)
    compute_plainly(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
