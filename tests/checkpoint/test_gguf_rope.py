"""The scaling rule recovered from its table."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.checkpoint.gguf_rope import divisors, recover
from herd.errors import ConfigError
from herd.model.config import RopeScaling
from herd.model.rope import frequencies
from tests.checkpoint.gguf_files import rope_table

RELEASED = [
    (RopeScaling(factor=8.0), 128),  # 3.1, 3.3
    (RopeScaling(factor=32.0), 64),  # 3.2 1B
    (RopeScaling(factor=32.0), 128),  # 3.2 3B
    (RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0), 128),  # 4 Scout
]


@pytest.mark.parametrize(("scaling", "head_dim"), RELEASED)
def test_released_scalings_come_back(scaling: RopeScaling, head_dim: int) -> None:
    assert recover(divisors(head_dim, 500_000.0, scaling), 500_000.0) == scaling


@pytest.mark.parametrize(("scaling", "head_dim"), RELEASED)
def test_tables_are_llama_cpps(scaling: RopeScaling, head_dim: int) -> None:
    config = SimpleNamespace(
        head_dim=head_dim,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
    )
    theirs = rope_table(config)
    assert theirs is not None
    assert torch.equal(divisors(head_dim, 500_000.0, scaling), torch.from_numpy(theirs))


@pytest.mark.parametrize(("scaling", "head_dim"), RELEASED)
def test_rounding_of_another_hand_does_not_matter(scaling: RopeScaling, head_dim: int) -> None:
    table = divisors(head_dim, 500_000.0, scaling)
    noise = 1 + 1e-6 * (torch.rand(len(table), generator=torch.Generator().manual_seed(0)) - 0.5)
    blended = (table > 1) & (table < scaling.factor)
    assert recover(torch.where(blended, table * noise, table), 500_000.0) == scaling


@settings(max_examples=150, deadline=None)
@given(
    factor=st.integers(2, 64),
    low=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    ratio=st.sampled_from([1.0, 2.0, 4.0, 16.0]),
    original=st.sampled_from([2048, 8192, 16384]),
    head_dim=st.sampled_from([64, 96, 128]),
    theta=st.sampled_from([1e4, 5e5, 1e6]),
)
def test_other_parameters_give_the_same_frequencies(
    factor: int, low: float, ratio: float, original: int, head_dim: int, theta: float
) -> None:
    scaling = RopeScaling(
        factor=float(factor), low_freq_factor=low, high_freq_factor=low * ratio, original_max_seq_len=original
    )
    table = divisors(head_dim, theta, scaling)
    plain, wanted = frequencies(head_dim, theta), frequencies(head_dim, theta, scaling)
    blended = int(((table > 1) & (table < factor)).sum())
    reached = float(table.max()) == factor
    try:
        found = recover(table, theta, original)
    except ConfigError:  # one blended divisor does not say where the blend begins and ends, and none ends it
        assert blended == 1 or not reached
        return
    ours = plain if found is None else frequencies(head_dim, theta, found)
    torch.testing.assert_close(ours, wanted, rtol=2e-5, atol=0)


@settings(max_examples=300, deadline=None)
@given(
    table=st.lists(st.floats(width=32), min_size=1, max_size=64),
    theta=st.floats(0, 1e30),
    original=st.integers(1, 1 << 47),
)
def test_any_table_is_recovered_or_refused(table: list[float], theta: float, original: int) -> None:
    try:
        found = recover(torch.tensor(table), theta, original)
    except ConfigError:
        return
    if found is not None:
        ours, plain = frequencies(2 * len(table), theta, found), frequencies(2 * len(table), theta)
        torch.testing.assert_close(ours, plain / torch.tensor(table), rtol=2e-5, atol=0)
