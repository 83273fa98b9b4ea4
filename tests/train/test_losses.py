import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from herd.adapters.apply import LoraConfig, apply_lora
from herd.data.encode import IGNORE
from herd.kernels.nll import linear_nll, linear_nll_plain
from herd.model.config import ModelConfig, plain
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.train.losses import SMALLEST_CHUNK, chunk_for, linear_cross_entropy, next_token_loss
from tests.train.memory import Held

CLOSE = 2e-6
"""float32: sums over 11 to 300 terms in another order."""
CLOSE_BF16 = 2e-2
"""bfloat16 has 8 bits: logits, their gradients and each chunk's products are rounded to it."""
ROUNDED_TWICE = 1.5
"""Gradients are rounded when they are made and again when they are scaled: two roundings are 1.41 times one."""


def plain_loss(h, labels, output):
    logits = output(h).flatten(0, -2).float()
    return cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def gradients(loss, hidden, output):
    h = hidden.clone().requires_grad_()
    output.weight.grad = None
    value = loss(h)
    (value / 7).backward()
    return value.detach(), h.grad, output.weight.grad.clone()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100, None])
@pytest.mark.parametrize("loss", [next_token_loss, linear_cross_entropy])
def test_chunks_equal_plain_cross_entropy_and_its_gradients(chunk, loss):
    torch.manual_seed(0)
    output = nn.Linear(8, 11, bias=False)
    hidden = torch.randn(2, 9, 8)
    labels = torch.randint(0, 11, (2, 9))
    labels[0, :4] = IGNORE
    expected = gradients(lambda h: plain_loss(h, labels, output), hidden, output)
    found = gradients(lambda h: loss(h, labels, output, chunk), hidden, output)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=CLOSE, atol=CLOSE)


def test_sixteen_bits_are_as_near_to_float32_as_plain_code_in_sixteen_bits():
    torch.manual_seed(0)
    output = nn.Linear(64, 300, bias=False)
    hidden, labels = torch.randn(96, 64), torch.randint(0, 300, (96,))
    exact = gradients(lambda h: plain_loss(h, labels, output), hidden, output)
    small = nn.Linear(64, 300, bias=False).to(torch.bfloat16)
    small.weight.data.copy_(output.weight.data)
    rounded = gradients(lambda h: plain_loss(h, labels, small), hidden.bfloat16(), small)
    found = gradients(lambda h: linear_cross_entropy(h, labels, small, 16), hidden.bfloat16(), small)
    for true, usual, ours in zip(exact, rounded, found, strict=True):
        error = (ours.float() - true).norm() / true.norm()
        assert error < CLOSE_BF16
        assert error < ROUNDED_TWICE * (usual.float() - true).norm() / true.norm() + 1e-6


def test_master_weights_get_float32_gradients_added_up_in_float32():
    torch.manual_seed(0)
    output = nn.Linear(64, 50, bias=False)
    hidden, labels = torch.randn(400, 64).bfloat16(), torch.randint(0, 50, (400,))
    value, _, by_weight = gradients(lambda h: linear_cross_entropy(h, labels, output, 8), hidden, output)
    assert value.dtype == by_weight.dtype == torch.float32
    exact = gradients(lambda h: plain_loss(h, labels, output), hidden.float(), output)[2]
    assert (by_weight - exact).norm() / exact.norm() < CLOSE_BF16


def test_large_logits_do_not_overflow_or_vanish():
    output = nn.Linear(2, 3, bias=False)
    output.weight.data.copy_(torch.tensor([[1000.0, 0], [0, 1000.0], [-1000.0, 0]]))
    hidden, labels = torch.tensor([[1.0, 0.5], [1.0, 0.0]]), torch.tensor([2, 0])
    value, by_hidden, _ = gradients(lambda h: linear_cross_entropy(h, labels, output, 1), hidden, output)
    assert value.item() == 2000.0
    assert by_hidden.isfinite().all()


def test_nothing_to_learn_gives_zero():
    output = nn.Linear(4, 5, bias=False)
    nothing = torch.full((3,), IGNORE)
    for loss in (next_token_loss, linear_cross_entropy):
        value, by_hidden, by_weight = gradients(
            lambda h, loss=loss: loss(h, nothing, output, 2), torch.randn(3, 4), output
        )
        assert value.item() == 0
        assert not by_hidden.any()
        assert not by_weight.any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_whole_model_tied_or_not_frozen_or_not(tied, frozen):
    torch.manual_seed(0)
    config = ModelConfig(
        dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=32, layers=plain(2), tie_embeddings=tied
    )
    model = init_weights(Llama(config))
    if frozen:
        apply_lora(model, LoraConfig(rank=2))
        for module in model.modules():
            if hasattr(module, "b") and isinstance(module.b, nn.Parameter):
                nn.init.normal_(module.b)
    tokens, labels = torch.randint(0, 32, (2, 8)), torch.randint(0, 32, (2, 8))

    def run(loss):
        model.zero_grad()
        hidden = model.hidden(model.embed(tokens))
        hidden.retain_grad()
        loss(hidden).backward()
        return hidden.grad, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    by_plain, expected = run(lambda h: plain_loss(h, labels, model.output))
    by_hidden, found = run(lambda h: linear_cross_entropy(h, labels, model.output, 5))
    _, behind = run(lambda h: (h * by_hidden).sum())
    torch.testing.assert_close(by_hidden, by_plain, rtol=CLOSE, atol=CLOSE)
    assert expected.keys() == found.keys()
    for name, grad in found.items():
        if name == ("tok_embeddings.weight" if tied else "output.weight"):
            torch.testing.assert_close(grad, expected[name], rtol=CLOSE, atol=CLOSE * float(expected[name].abs().max()))
        else:  # the model's own backward pass, which a rounding may lead anywhere where gradients nearly cancel
            assert torch.equal(grad, behind[name])


def test_outputs_with_adapters_and_biases_go_the_other_way_and_agree():
    torch.manual_seed(0)
    config = ModelConfig(dim=16, n_heads=2, n_kv_heads=1, head_dim=8, hidden_dim=24, vocab_size=32, layers=plain(1))
    model = init_weights(Llama(config))
    apply_lora(model, LoraConfig(rank=2, targets=("output",)))
    model.output.b.data.normal_()
    hidden, labels = torch.randn(9, 16), torch.randint(0, 32, (9,))
    for output in (model.output, nn.Linear(16, 32)):
        torch.testing.assert_close(
            linear_cross_entropy(hidden, labels, output, 4), plain_loss(hidden, labels, output), rtol=CLOSE, atol=CLOSE
        )


def test_one_backward_pass_is_all():
    output = nn.Linear(4, 5, bias=False)
    loss = linear_cross_entropy(torch.randn(3, 4), torch.tensor([0, 1, 2]), output)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_none_are_made():
    output = nn.Linear(4, 5, bias=False)
    hidden, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with torch.no_grad():
        value = linear_cross_entropy(hidden, labels, output)
    torch.testing.assert_close(value, plain_loss(hidden, labels, output).detach(), rtol=CLOSE, atol=CLOSE)


def test_the_operation_keeps_its_promises_to_compilers():
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(6, 8), torch.randn(11, 8), torch.randint(0, 11, (6,))
    torch.library.opcheck(
        torch.ops.herd.linear_nll.default,
        (hidden, weight, labels, IGNORE, 4, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.testing.assert_close(
        linear_nll(hidden, weight, labels, IGNORE, 4, False, False)[0], linear_nll_plain(hidden, weight, labels, IGNORE)
    )


@pytest.mark.slow
def test_compiled_it_is_the_same():
    torch.manual_seed(0)
    output = nn.Linear(8, 11, bias=False)
    hidden, labels = torch.randn(9, 8), torch.randint(0, 11, (9,))
    whole = torch.compile(lambda h: linear_cross_entropy(h * 2, labels, output, 4), fullgraph=True)
    expected = gradients(lambda h: plain_loss(h * 2, labels, output), hidden, output)
    for a, b in zip(expected, gradients(whole, hidden, output), strict=True):
        torch.testing.assert_close(a, b, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_memory_is_what_is_stated_and_logits_never_exist_whole(dtype, trained):
    positions, dim, vocab, chunk = 512, 16, 2000, 64
    hidden, weight = torch.randn(positions, dim, dtype=dtype), torch.randn(vocab, dim, dtype=dtype)
    labels = torch.randint(0, vocab, (positions,))
    size = dtype.itemsize
    with Held(hidden, weight, labels) as held:
        linear_nll.__wrapped__(hidden, weight, labels, IGNORE, chunk, True, trained)
    stated = chunk * vocab * 4 + positions * dim * size
    stated += 2 * chunk * vocab * size if size < 4 else 0
    stated += vocab * dim * (4 + 2 * (size if size < 4 else 0)) if trained else 0
    slack = 64 * positions + 16 * chunk * dim
    assert held.peak < stated + slack
    assert held.peak < positions * vocab * 4 / 2
    with Held(hidden, weight, labels) as all_at_once:
        linear(hidden, weight).float()
    assert all_at_once.peak >= positions * vocab * 4


def test_chunks_nobody_asked_for_are_bounded():
    cpu = torch.device("cpu")
    assert chunk_for(128_256, cpu) == SMALLEST_CHUNK
    assert chunk_for(1000, cpu) * 1000 * 4 <= 64 << 20
