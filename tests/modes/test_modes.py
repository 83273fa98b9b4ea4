"""The same model, run every way herd supports, must agree: design rule and acceptance test of every new mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from herd.engine.cache import StaticCache
from herd.model.attend import packed
from tests.build import TINY, build, tiny, tokens
from tests.modes.pairs import pairs

Measured = Callable[[str, str, float], None]

MODES_BOUND = 1e-5
"""fp32 logits of order one: the modes add the same numbers in another order (other mask shapes, other matrix kernels for one
row than for many), as two implementations do; see tests/parity."""
LENGTH = 70
"""Over four chunks of 16, over eight temperature steps of 8."""
TABLE = "fp32 logits against the full forward, max abs difference"


@cache
def whole(name: str) -> tuple[Tensor, Tensor]:
    """Ids [2, LENGTH] and the logits of one plain forward."""
    ids = tokens(tiny(name), LENGTH, batch=2)
    with torch.no_grad():
        return ids, build(name)(ids)


def through_cache(name: str, borders: list[int], *, windowed: bool, max_len: int = LENGTH) -> Tensor:
    """Logits of the pieces between `borders`, one forward each, through one static cache."""
    ids, _ = whole(name)
    model = build(name)
    kv = StaticCache(model.config, batch=2, max_len=max_len)
    out = []
    with torch.no_grad():
        for start, stop in pairwise(borders):
            kv.grow(stop)
            positions = torch.arange(start, stop)
            see = kv.bind(positions, stop if windowed else None)
            out.append(model(ids[:, start:stop], positions, see))
    return torch.cat(out, 1)


@pytest.mark.parametrize(("name", "windowed"), pairs(TINY, [True, False]))
def test_step_by_step(name: str, windowed: bool, measured: Measured) -> None:
    logits = through_cache(name, list(range(LENGTH + 1)), windowed=windowed)
    worst = float((logits - whole(name)[1]).abs().max())
    measured(TABLE, f"{name}, step by step", worst)
    assert worst <= MODES_BOUND


@pytest.mark.parametrize("name", TINY)
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=8), windowed=st.booleans(), room=st.integers(1, LENGTH + 20))
def test_any_split_of_the_prompt(name: str, cuts: set[int], windowed: bool, room: int) -> None:
    """`room` is the cache's first size: it also grows on the way, or has positions to spare."""
    logits = through_cache(name, [0, *sorted(cuts), LENGTH], windowed=windowed, max_len=room)
    assert (logits - whole(name)[1]).abs().max() <= MODES_BOUND


@pytest.mark.parametrize("name", TINY)
def test_taking_tokens_back(name: str) -> None:
    """Rejected tokens are overwritten: going back to an earlier position leaves no trace."""
    ids, logits = whole(name)
    model = build(name)
    kv = StaticCache(model.config, batch=2, max_len=LENGTH)
    with torch.no_grad():
        model(ids[:, :30], torch.arange(30), kv.bind(torch.arange(30), 30))
        wrong, guess = torch.arange(30, 50), ids.flip(1)[:, 30:50]
        model(guess, wrong, kv.bind(wrong, 50))
        right = torch.arange(30, 40)
        again = model(ids[:, 30:40], right, kv.bind(right, 40))
    assert (again - logits[:, 30:40]).abs().max() <= MODES_BOUND


@pytest.mark.parametrize("name", TINY)
def test_rows_and_later_tokens_do_not_matter(name: str) -> None:
    """A row alone, and a row cut short, give the same logits: right padding needs no mask."""
    ids, logits = whole(name)
    model = build(name)
    with torch.no_grad():
        assert (model(ids[1:]) - logits[1:]).abs().max() <= MODES_BOUND
        assert (model(ids[:, :37]) - logits[:, :37]).abs().max() <= MODES_BOUND


@pytest.mark.parametrize(("name", "lengths"), pairs(TINY, [(1, 1, 33, 17, 18), (16, 16, 38), (70,), (5, 65)]))
def test_packed_documents_equal_separate_ones(name: str, lengths: tuple[int, ...], measured: Measured) -> None:
    ids, _ = whole(name)
    model = build(name)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    with torch.no_grad():
        together = model(ids, positions, packed(model.config, positions))
        apart = torch.cat([model(document) for document in ids.split(lengths, 1)], 1)
    worst = float((together - apart).abs().max())
    measured(TABLE, f"{name}, packed", worst)
    assert worst <= MODES_BOUND


@pytest.mark.parametrize("name", TINY)
def test_no_batch_dimension(name: str) -> None:
    """Leading dimensions are the caller's affair: [S] works like [1, S]."""
    ids, logits = whole(name)
    with torch.no_grad():
        assert (build(name)(ids[0]) - logits[0]).abs().max() <= MODES_BOUND
