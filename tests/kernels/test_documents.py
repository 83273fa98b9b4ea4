from functools import cache

import pytest
import torch

from herd.kernels import passages
from herd.kernels.documents import document_attention, document_attention_plain
from herd.model.attend import Packed, packed
from herd.model.config import LayerSpec, ModelConfig
from tests.kernels.native import isa

__all__ = ["isa"]

CLOSE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}
"""Sums in another order; bfloat16 is rounded once more between the two products."""
SPLITS = {"one": [20], "rows": [10, 10], "many": [3, 1, 1, 1, 8, 6], "ones": [1] * 20, "ends alone": [19, 1]}


def some(dtype=torch.float32, lengths=(20,), heads=4, shared=2):
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(total, h, 8, dtype=dtype).requires_grad_() for h in (heads, shared, shared))
    first = torch.cat([torch.arange(n) == 0 for n in lengths])
    return q, k, v, first


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_it_is_masked_attention_and_its_gradients(split, dtype, shared):
    q, k, v, first = some(dtype, SPLITS[split], shared=shared)
    grad = torch.randn(q.shape, dtype=dtype)
    expected = document_attention_plain(q, k, v, first)
    found = document_attention(q, k, v, first)[0]
    pairs = [(expected, found)]
    pairs += zip(
        torch.autograd.grad(expected, (q, k, v), grad), torch.autograd.grad(found, (q, k, v), grad), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=CLOSE[dtype], atol=CLOSE[dtype])


LONG = {
    "one": [200],
    "rows": [128, 128],
    "many": [70, 1, 64, 65, 3, 1, 130],
    "ones": [1] * 5,
    "short": [2, 17, 33, 48, 63],
}
NATIVE = {torch.float32: 4e-6, torch.bfloat16: 8e-3}
"""Of the largest number, against float64: sums of up to 200 products, the exponential's 2e-7; bfloat16 is rounded once, at the
end (half of 2^-7), from inputs that both have."""


@cache
def in_float64(split, heads, dtype):
    """Inputs and what float64 gives: the same for every instruction set."""
    h, shared, dim = heads
    torch.manual_seed(0)
    lengths = LONG[split]
    total = sum(lengths)
    q, k, v, grad = (torch.randn(total, n, dim).mul_(2).to(dtype) for n in (h, shared, shared, h))
    first = torch.cat([torch.arange(n) == 0 for n in lengths])
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = document_attention_plain(*exact, first)
    return q, k, v, grad, first, [expected, *torch.autograd.grad(expected, exact, grad.double())]


@pytest.mark.parametrize("split", LONG)
@pytest.mark.parametrize("heads", [(4, 4, 16), (4, 2, 64), (6, 2, 80), (3, 1, 128)], ids=str)
@pytest.mark.parametrize("dtype", NATIVE)
def test_the_native_kernel_in_every_instruction_set_is_that_of_float64(isa, split, heads, dtype):
    q, k, v, grad, first, wanted = in_float64(split, heads, dtype)
    assert passages.takes(q)
    own = [x.detach().requires_grad_() for x in (q, k, v)]
    out = document_attention(*own, first)[0]
    largest = max(a.abs().max() for a in wanted)  # documents of one position give queries and keys no gradient at all
    for a, b in zip(wanted, [out, *torch.autograd.grad(out, own, grad)], strict=True):
        assert b.dtype == dtype
        assert (a - b).abs().max() <= NATIVE[dtype] * (a.abs().max() or largest)


def test_threads_and_neighbours_change_no_bit(isa):
    torch.manual_seed(0)
    lengths = [100, 7, 130]
    q, k, v, grad = (torch.randn(sum(lengths), n, 32) for n in (4, 2, 2, 4))
    first = torch.cat([torch.arange(n) == 0 for n in lengths])

    def everything(rows=slice(None)):
        own = [x[rows].clone().requires_grad_() for x in (q, k, v)]
        out = document_attention(*own, first[rows])[0]
        return [out, *torch.autograd.grad(out, own, grad[rows])]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(3)
        together = everything()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(alone, everything(slice(100, 107)), strict=True):
        assert torch.equal(a[100:107], b)


def test_what_the_library_does_not_take_goes_to_torch():
    narrow = torch.zeros(4, 2, 8)
    assert not passages.takes(narrow)
    assert not passages.takes(torch.zeros(4, 2, 16, dtype=torch.float64))
    q = torch.randn(4, 2, 16)
    with pytest.raises(AssertionError):
        document_attention(q, q, q, torch.tensor([False, True, False, False]))


def test_it_keeps_its_promises_to_compilers():
    torch.library.opcheck(
        torch.ops.herd.document_attention.default,
        some(lengths=(5, 1, 2)),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_packed_rows_of_a_model_take_it_and_agree_with_the_mask():
    torch.manual_seed(0)
    config = ModelConfig(
        dim=16, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=16, vocab_size=8,
        layers=(LayerSpec(placement="rope"), LayerSpec(placement="rope", chunk=4)),
    )  # fmt: skip
    # The second row begins inside a document and ends in padding of position 0.
    positions = torch.tensor([[*range(7), *range(5)], [*range(9, 15), 0, 1, 2, 0, 0, 0]])
    q, k, v = (torch.randn(2, 12, h, 8) for h in (4, 2, 2))
    for see, spec in zip(packed(config, positions), config.layers, strict=True):
        assert not see.masks
        torch.testing.assert_close(
            see(q, k, v, spec.chunk), Packed(positions)(q, k, v, spec.chunk), rtol=2e-6, atol=2e-6
        )
