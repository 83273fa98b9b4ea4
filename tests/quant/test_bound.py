"""Bounds hold for what encoders make, and deliberate mistakes break them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from herd.errors import CheckpointError
from herd.quant.bound import bound
from herd.quant.encode import ENCODED, encode
from herd.quant.scheme import QuantTensor
from tests.quant.rows import DATA, rows

QUANTIZED = [kind for kind in ENCODED if kind not in ("F32", "F16", "BF16")]


def values_of(stored: torch.Tensor | QuantTensor) -> torch.Tensor:
    return stored.dequantize() if isinstance(stored, QuantTensor) else stored.float()


def broken(
    values: torch.Tensor, kind: str, stored: torch.Tensor | QuantTensor, *, importance: bool = False
) -> torch.Tensor:
    """Where the bound does not hold. NaN errors and bounds count as broken."""
    limits = bound(values, kind, stored if isinstance(stored, QuantTensor) else None, importance=importance)
    assert limits.shape == values.shape
    return ~((values.double() - values_of(stored).double()).abs() <= limits.double())


@pytest.mark.parametrize("kind", ENCODED)
@pytest.mark.parametrize("data", DATA)
def test_what_encode_makes_is_within_its_bound(kind: str, data: str) -> None:
    values = rows(data, count=24, columns=1024)
    assert not broken(values, kind, encode(values, kind)).any()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_extremes_of_both_signs_and_every_magnitude_are_within(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(90, 512, generator=generator) * 2.0 ** torch.arange(-80, 10).view(-1, 1)
    values[:, 7] = values.abs().amax(dim=1)
    values[:, 11] = -values[:, 7]
    assert not broken(values, kind, encode(values, kind)).any()


@pytest.mark.parametrize("kind", ["F16", "BF16", *QUANTIZED])
def test_the_bound_is_reached(kind: str) -> None:
    values = rows("bell", count=24)
    error = (values.double() - values_of(encode(values, kind)).double()).abs()
    assert (error / bound(values, kind)).max() > 0.9
    # Half of the bound is what rounding loses on average.
    assert error.sum() > 0.25 * bound(values, kind).double().sum()


def add(stored: QuantTensor, at: slice, amount: int) -> torch.Tensor:
    """Blocks with `amount` added to some bytes."""
    raw = stored.blocks.view(-1, stored.type.nbytes).clone()
    raw[:, at] += torch.tensor(amount).to(torch.uint8)
    return raw


def next_half(stored: QuantTensor, at: int) -> torch.Tensor:
    """Blocks whose fp16 number at `at` is the next larger one in magnitude."""
    raw = stored.blocks.view(-1, stored.type.nbytes).clone()
    raw[:, at : at + 2] = (raw[:, at : at + 2].contiguous().view(torch.int16) + 1).view(torch.uint8)
    return raw


def swapped_nibbles(stored: QuantTensor, at: slice) -> torch.Tensor:
    raw = stored.blocks.view(-1, stored.type.nbytes).clone()
    raw[:, at] = (raw[:, at] >> 4) | (raw[:, at] << 4)
    return raw


def next_row(stored: QuantTensor) -> torch.Tensor:
    return stored.blocks.roll(1, dims=0).view(-1, stored.type.nbytes)


def empty(stored: QuantTensor) -> torch.Tensor:
    return torch.zeros_like(stored.blocks).view(-1, stored.type.nbytes)


HALVES = {"Q4_0": (0,), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
NIBBLES = {
    "Q4_0": slice(2, 18), "Q5_0": slice(6, 22), "Q5_1": slice(8, 24),
    "Q4_K": slice(16, 144), "Q5_K": slice(48, 176), "Q6_K": slice(0, 128),
}  # fmt: skip
ONE_NUMBER = {
    "Q4_0": slice(9, 10), "Q5_0": slice(9, 10), "Q5_1": slice(9, 10), "Q8_0": slice(9, 10),
    "Q4_K": slice(40, 41), "Q5_K": slice(60, 61), "Q6_K": slice(40, 41),
}  # fmt: skip
MISTAKES: dict[str, Callable[[QuantTensor], torch.Tensor]] = {}
for _kind in QUANTIZED:
    MISTAKES[f"{_kind} one integer off by one"] = partial(add, at=ONE_NUMBER[_kind], amount=1)
    MISTAKES[f"{_kind} rows in another order"] = next_row
    MISTAKES[f"{_kind} nothing but zeros"] = empty
    for _at in HALVES[_kind]:
        MISTAKES[f"{_kind} fp16 number at {_at} off by one unit in the last place"] = partial(next_half, at=_at)
    if _kind in NIBBLES:
        MISTAKES[f"{_kind} nibbles swapped"] = partial(swapped_nibbles, at=NIBBLES[_kind])
for _kind in ("Q4_K", "Q5_K"):
    MISTAKES[f"{_kind} one scale off by one"] = partial(add, at=slice(4, 5), amount=1)
    MISTAKES[f"{_kind} one minimum off by one"] = partial(add, at=slice(9, 10), amount=-1)
    MISTAKES[f"{_kind} scales and minima exchanged"] = lambda s: s.blocks.view(-1, s.type.nbytes)[
        :, [*range(4), *range(8, 12), *range(4, 8), *range(12, s.type.nbytes)]
    ]
MISTAKES["Q6_K one scale off by one"] = partial(add, at=slice(200, 201), amount=1)
MISTAKES["Q6_K one scale negated"] = lambda s: torch.cat(
    (s.blocks.view(-1, 210)[:, :192], -s.blocks.view(-1, 210)[:, 192:193], s.blocks.view(-1, 210)[:, 193:]), dim=1
)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("data", ["bell", "heavy", "bf16"])
def test_deliberate_mistakes_break_the_bound(mistake: str, data: str) -> None:
    kind = mistake.split()[0]
    values = rows(data, count=8, columns=1024)  # 32 blocks of 256
    stored = encode(values, kind)
    assert isinstance(stored, QuantTensor)
    wrong = MISTAKES[mistake](stored).reshape(stored.blocks.shape)
    assert not torch.equal(wrong, stored.blocks)
    assert broken(values, kind, QuantTensor(wrong, stored.type, stored.shape)).any()
    if mistake.endswith("zeros"):
        return  # every value takes the nearest of the levels, and there is only one
    assert broken(values, kind, QuantTensor(wrong, stored.type, stored.shape), importance=True).any()


@pytest.mark.parametrize(("kind", "integers"), [("Q4_K", (16, 144)), ("Q5_K", (16, 176)), ("Q6_K", (0, 192))])
def test_steps_far_too_wide_break_the_bound(kind: str, integers: tuple[int, int]) -> None:
    """Every value takes about the nearest level there is, but the scales are those of values eight times as large."""
    values = rows("bell", count=8)
    wide = encode(values * 8, kind)
    assert isinstance(wide, QuantTensor)

    def filled(byte: int) -> QuantTensor:
        raw = wide.blocks.view(-1, wide.type.nbytes).clone()
        raw[:, slice(*integers)] = byte
        return QuantTensor(raw.view(wide.blocks.shape), wide.type, wide.shape)

    best = min(range(256), key=lambda byte: float((filled(byte).dequantize() - values).square().sum()))
    assert broken(values, kind, filled(best)).any()


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_cast_to_the_wrong_neighbour_breaks_the_bound(kind: str) -> None:
    values = rows("bell")
    cast = encode(values, kind)
    assert isinstance(cast, torch.Tensor)
    neighbour = (cast.view(torch.int16) + 1).view(cast.dtype)
    assert broken(values, kind, neighbour).float().mean() > 0.95  # zeros and ties may stay within half a unit
    smallest = torch.tensor([2.0**-24 * 1.4, -(2.0**-24) * 0.6, 0.0, 2.0**-14])
    assert not broken(smallest, kind, encode(smallest, kind)).any()


def test_what_cannot_be_stored_has_no_bound() -> None:
    with pytest.raises(CheckpointError, match="too large for float16"):
        bound(torch.tensor([1e6]), "F16")
    with pytest.raises(CheckpointError, match="cannot be stored as Q8_0"):
        bound(torch.full((32,), math.nan), "Q8_0")
    with pytest.raises(CheckpointError, match="whole Q4_K blocks"):
        bound(torch.zeros(2, 32), "Q4_K")
    blocks = encode(torch.zeros(2, 256), "Q4_K")
    assert isinstance(blocks, QuantTensor)
    with pytest.raises(ValueError, match="Q4_K blocks of shape"):
        bound(torch.zeros(2, 256), "Q5_K", blocks)
    assert broken(torch.full((2, 256), math.nan), "Q4_K", blocks).all()
