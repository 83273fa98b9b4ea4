import pytest
import torch
from torch import nn

from herd.kernels import dense, native
from herd.train.precision import WideLinear, compute_in, compute_plainly
from tests.kernels.native import isa

__all__ = ["isa"]

CLOSE = 2e-6
"""Of the largest number, against float64: sums of up to 700 products."""


@pytest.fixture
def everywhere(monkeypatch):
    """As on a processor where the library is the faster one, and for the smallest product."""
    if native.isa() is None:
        pytest.skip(native.missing() or "")
    monkeypatch.setattr(dense, "available", lambda: True)
    monkeypatch.setattr(dense, "_LEAST", 1)


def laid(rows: int, columns: int, turned: bool) -> torch.Tensor:
    """A matrix whose rows lie side by side, or whose columns do, with a gap between them."""
    return torch.randn(columns, rows + 3).T[:rows] if turned else torch.randn(rows, columns + 3)[:, :columns]


@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (15, 17, 33), (99, 641, 31), (113, 1300, 65), (29, 16, 3105)], ids=str)
def test_any_strides_and_sizes_on_every_instruction_set(isa, everywhere, shape, turned):
    rows, inner, columns = shape
    torch.manual_seed(0)
    a, b = laid(rows, inner, turned[0]), laid(inner, columns, turned[1])
    wanted = a.double() @ b.double()
    bound = CLOSE * (a.double().abs() @ b.double().abs())
    assert ((dense.multiply(a, b) - wanted).abs() <= bound).all()
    room = torch.full((rows + 2, columns + 5), 7.0)  # what lies around the result stays
    held = room[1:-1, 2:-3]
    assert dense.multiply(a, b, held) is held
    dense.multiply(a, b, held, add=True)
    assert ((held - 2 * wanted).abs() <= 3 * bound).all()
    held.fill_(7)
    assert (room == 7).all()


def test_a_row_is_the_same_bits_alone_and_in_company_and_on_any_number_of_threads(isa, everywhere):
    a, b = torch.randn(130, 700), torch.randn(700, 300)
    before, whole = torch.get_num_threads(), dense.multiply(a, b)
    assert torch.equal(dense.multiply(a[37:41], b), whole[37:41])
    assert torch.equal(dense.multiply(a, b[:, 33:90]), whole[:, 33:90])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(dense.multiply(a, b), whole)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_in_its_row(isa, everywhere):
    a, b = torch.randn(31, 40), torch.randn(40, 35)
    a[9, 3], b[5, 34] = float("nan"), float("inf")
    found = dense.multiply(a, b)
    assert found[9].isnan().all()
    assert not found[:, 34].isfinite().any()
    found[9], found[:, 34] = 0, 0
    assert found.isfinite().all()


def test_sizes_that_do_not_meet_are_refused(everywhere):
    with pytest.raises(AssertionError):
        dense.multiply(torch.randn(4, 5), torch.randn(6, 3))
    with pytest.raises(AssertionError):
        dense.multiply(torch.randn(4, 5), torch.randn(5, 3), torch.empty(3, 4).T)
    with pytest.raises(AssertionError):
        dense.multiply(torch.randn(4, 5), torch.randn(5, 3), torch.empty(4, 4))


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
