import pytest
import torch

from herd.kernels.documents import document_attention, document_attention_plain
from herd.model.attend import Packed, packed
from herd.model.config import LayerSpec, ModelConfig

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
