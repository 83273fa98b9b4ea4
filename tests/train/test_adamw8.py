import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from herd.model.config import ModelConfig, plain
from herd.model.init import init_weights
from herd.model.llama import Llama
from herd.train import adamw8
from herd.train.adamw8 import AdamW8, decode, dynamic_map, encode, encode_plain, round_stochastically

HALF_GAP = 0.0036
"""Half the widest gap of the unsigned table near its top, of the block's largest value; of the signed one twice that."""
CURVE = 0.02
"""Relative: the loss after 60 steps with states in 8 bits, against 32 bits."""


def test_the_tables_are_those_of_bitsandbytes():
    # Facts of bitsandbytes 0.50.2, functional.create_dynamic_map(signed=True) and (signed=False), which these equal bit for bit.
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert len(signed) == len(unsigned) == 256
    assert signed[127].item() == unsigned[0].item() == 0
    assert signed[-1].item() == unsigned[-1].item() == 1
    assert signed[0].item() == pytest.approx(-0.99296875)
    assert unsigned[-2].item() == pytest.approx(0.996484375)
    assert signed[128].item() == pytest.approx(5.5e-7)
    assert unsigned[1].item() == pytest.approx(3.25e-7)
    assert (signed > 0).sum() == 128


@pytest.mark.parametrize("signed", [True, False])
def test_looking_up_finds_what_searching_finds(signed):
    torch.manual_seed(0)
    table = dynamic_map(signed)
    borders = (table[1:] + table[:-1]) / 2
    values = [
        torch.rand(100_000) * 10 ** (-8 * torch.rand(100_000)),
        table,
        borders,
        borders.nextafter(torch.tensor(9.0)),
    ]
    values += [borders.nextafter(torch.tensor(-9.0)), torch.tensor([0.0, -0.0, 1.0, 1e-30, 1e-45])]
    every = torch.cat(values)
    if signed:
        every = torch.cat([every, -every])
    assert torch.equal(adamw8._nearest(every, signed), encode_plain(every, signed))


@pytest.mark.parametrize("shape", [(3, 256), (5, 1000), (1, 7)])
@pytest.mark.parametrize("signed", [True, False])
def test_values_come_back_within_half_a_gap_of_their_block(shape, signed):
    torch.manual_seed(0)
    values = torch.randn(shape) * torch.logspace(-9, 3, shape[1])
    values = values if signed else values.abs()
    codes, top = encode(values, signed)
    assert codes.shape == values.shape
    assert top.shape == (shape[0], -(-shape[1] // 256))
    wide = top.repeat_interleave(256, 1)[:, : shape[1]]
    assert ((decode(codes, top, signed) - values).abs() <= (2 if signed else 1) * HALF_GAP * wide).all()
    zero = torch.zeros(shape)
    assert torch.equal(decode(*encode(zero, signed), signed), zero)


def losses(optimiser_of, dtype=torch.float32, steps=60):
    torch.manual_seed(0)
    config = ModelConfig(dim=64, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=128, vocab_size=96, layers=plain(2))
    model = init_weights(Llama(config)).to(dtype)
    optimiser = optimiser_of(model.parameters())
    text = torch.randint(0, 96, (4, 33))
    found = []
    for _ in range(steps):
        loss = cross_entropy(model(text[:, :-1]).flatten(0, 1).float(), text[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return found, optimiser, model


def test_the_loss_follows_adamw_and_the_states_take_a_quarter():
    def usual(params):
        return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)

    exact, wide, _ = losses(usual)
    found, narrow, model = losses(lambda params: AdamW8(params, lr=1e-3, weight_decay=0.1))
    assert exact[-1] < 0.75 * exact[0]
    assert max(abs(a - b) / a for a, b in zip(exact, found, strict=True)) < CURVE
    numbers = sum(p.numel() for p in model.parameters() if p.numel() >= adamw8.SMALLEST)
    held = sum(
        v.nbytes
        for p, s in narrow.state.items()
        for v in s.values()
        if p.numel() >= adamw8.SMALLEST and isinstance(v, torch.Tensor)
    )
    assert held <= 2.125 * numbers  # two codes, and 8 bytes for a row of 64; with rows of 256 it is 2.03
    assert sum(v.nbytes for s in wide.state.values() for v in s.values() if v.numel() > 1) >= 8 * numbers


def test_small_parameters_are_adamw_itself():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(3, 5)), None
    theirs = nn.Parameter(ours.detach().clone())
    one = AdamW8([ours], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    other = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(3, 5)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_first_step_of_a_large_parameter_is_adamw_itself():
    """Means start at zero, which 8 bits hold exactly, and the update uses them before they are rounded."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(40, 300))
    theirs = nn.Parameter(ours.detach().clone())
    ours.grad = torch.randn(40, 300)
    theirs.grad = ours.grad.clone()
    AdamW8([ours], lr=1e-2, weight_decay=0.1).step()
    torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1).step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_states_save_and_load_exactly():
    def run(again: bool):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(40, 300))
        optimiser = AdamW8([weight], lr=1e-2)
        for step in range(6):
            if again and step == 3:
                file = io.BytesIO()
                torch.save(optimiser.state_dict(), file)
                file.seek(0)
                optimiser = AdamW8([weight], lr=1e-2)
                optimiser.load_state_dict(torch.load(file, weights_only=True))
                assert optimiser.state[weight]["exp_avg_codes"].dtype == torch.uint8
            weight.grad = torch.randn(40, 300, generator=torch.Generator().manual_seed(step))
            optimiser.step()
        return weight.detach(), copy.deepcopy(optimiser.state[weight])

    (one, state), (other, loaded) = run(False), run(True)
    assert torch.equal(one, other)
    assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(loaded[k])) for k in state)


def test_rounding_is_right_in_the_mean_and_never_off_by_more_than_a_place():
    torch.manual_seed(0)
    value = torch.full((200_000,), 1 + 0.25 * 2**-7)
    rounded = round_stochastically(value)
    assert set(rounded.float().unique().tolist()) == {1.0, 1 + 2**-7}
    assert rounded.float().mean().item() == pytest.approx(value[0].item(), abs=4 * 2**-7 * 0.44 / 200_000**0.5)
    exact = torch.tensor([1.0, -2.0, 0.0, float("inf")])
    assert torch.equal(round_stochastically(exact).float(), exact)
    assert round_stochastically(torch.tensor([float("nan")])).isnan().all()


def test_weights_of_sixteen_bits_move_by_updates_that_rounding_would_lose():
    weight = nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
    optimiser = AdamW8([weight], lr=1e-4, weight_decay=0.0)  # the last place below 1 is 2^-8, forty times as much
    torch.manual_seed(0)
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimiser.step()
    assert weight.float().mean().item() == pytest.approx(1 - 50 * 1e-4, rel=2e-4)
