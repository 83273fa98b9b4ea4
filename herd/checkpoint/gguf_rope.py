"""Llama 3.1 frequency scaling as GGUF keeps it: a table of divisors, one per rotary frequency.

Converters evaluate the scaling rule and store only its result (`rope_freqs.weight`): 1 for short wavelengths, `factor` for
long ones, and a blend between. herd computes the rule itself, so the parameters are recovered from the table, and the table
computed from them must equal the one in the file. Source of the rule: llama.cpp's Llama converter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from herd.errors import ConfigError
from herd.model.config import RopeScaling

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["divisors", "matches", "recover"]

TOLERANCE = 1e-5
"""Relative: float32 evaluations of the blend differ by some 1e-6, two plausible sets of parameters by far more."""


def divisors(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """The table of `scaling` [head_dim / 2] float32, in llama.cpp's order of operations. Imports torch."""
    import torch

    from herd.model.rope import frequencies

    return torch.from_numpy(_table(frequencies(head_dim, theta).numpy(), scaling))


def recover(table: ArrayLike, theta: float, original: int = 8192) -> RopeScaling | None:
    """The scaling that gives `table` [head_dim / 2] over a context of `original` positions; None: it scales nothing.

    Only the ratios of both factors to `original` show in a table, so `original` is the caller's word. Raises ConfigError
    when no parameters of the rule reproduce the table.
    """
    stored = np.asarray(table, np.float32)
    if not ((stored > 0) & np.isfinite(stored)).all():
        raise ConfigError("a divisor is not a positive number")
    if (stored == 1).all():
        return None
    frequencies = _frequencies(len(stored), theta)
    for scaling in _candidates(stored, frequencies, original):
        if _far(stored, _table(frequencies, scaling)) <= TOLERANCE:
            return scaling
    raise ConfigError("these divisors are not a Llama 3.1 frequency scaling, the only one that herd's RoPE has")


def matches(table: ArrayLike, theta: float, scaling: RopeScaling) -> bool:
    """Whether `table` [head_dim / 2] is that of `scaling`."""
    stored = np.asarray(table, np.float32)
    return _far(stored, _table(_frequencies(len(stored), theta), scaling)) <= TOLERANCE


def _far(stored: np.ndarray, table: np.ndarray) -> float:
    """The largest relative difference; NaN when a number is infinite."""
    with np.errstate(all="ignore"):
        return float(np.abs(stored / table - 1).max())


def _frequencies(count: int, theta: float) -> np.ndarray:
    """Unscaled rotary frequencies [count] float32, to the last bit or two those of `herd.model.rope.frequencies`."""
    with np.errstate(all="ignore"):  # a theta of 0 gives infinities, which no table fits
        return (1.0 / theta ** (np.arange(count, dtype=np.float64) / count)).astype(np.float32)


def _table(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """What `scaling` divides each of `frequencies` [head_dim / 2] float32 by."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len
    with np.errstate(all="ignore"):  # hostile numbers overflow to infinity and then fit nothing
        wavelength = np.float32(2 * math.pi) / frequencies
        table = np.where(wavelength > context / low, np.float32(scaling.factor), np.float32(1.0))
        if high == low:  # Llama 4 Scout: a hard step
            return table
        blend = (context / wavelength - low) / (high - low)
        between = (wavelength >= context / high) & (wavelength <= context / low)
        return np.where(between, 1 / ((1 - blend) / scaling.factor + blend), table)


def _candidates(table: np.ndarray, frequencies: np.ndarray, original: int) -> Iterator[RopeScaling]:
    turns = (original * frequencies.astype(np.float64) / (2 * math.pi)).tolist()
    stored = table.tolist()
    largest = max(stored)
    for low, high in ((1.0, 4.0), (1.0, 1.0)):  # Llama 3.1 to 3.3; Llama 4 Scout
        yield from _scaling(largest, low, high, original)
    yield from _scaling(_unreached_factor(stored, turns), 1.0, 4.0, original)
    fitted = _fit(stored, turns, largest)
    if fitted is not None:
        low, high = fitted
        yield from _scaling(largest, float(f"{low:.3g}"), float(f"{high:.3g}"), original)
        yield from _scaling(largest, low, high, original)


def _unreached_factor(stored: list[float], turns: list[float]) -> float:
    """The factor when even the lowest frequency is only blended (small heads or small theta), for factors 1 and 4."""
    blend = (turns[-1] - 1) / 3
    rest = 1 / stored[-1] - blend
    if not 0 < blend < 1 or rest <= 0:
        return math.nan
    factor = (1 - blend) / rest
    nearest = max(round(factor), 1) if math.isfinite(factor) else 1
    return nearest if abs(factor / nearest - 1) < TOLERANCE else factor


def _fit(stored: list[float], turns: list[float], factor: float) -> tuple[float, float] | None:
    """(low, high) from the blended divisors, whose inverses lie on a line over `turns`; None when they do not say."""
    least, most = 1 + TOLERANCE, factor * (1 - TOLERANCE)
    blended = [
        (turn, (1 / value - 1 / factor) / (1 - 1 / factor))
        for turn, value in zip(turns, stored, strict=True)
        if least < value < most
    ]
    if not blended:  # a hard step, anywhere between two frequencies
        kept = [turn for turn, value in zip(turns, stored, strict=True) if value <= least]
        scaled = [turn for turn, value in zip(turns, stored, strict=True) if value >= most]
        step = math.sqrt(min(kept, default=4 * max(scaled)) * max(scaled))
        return step, step
    (x0, y0), (x1, y1) = blended[0], blended[-1]
    slope = (y1 - y0) / (x1 - x0) if x1 != x0 else 0.0
    if not slope > 0:
        return None
    low = x0 - y0 / slope
    return low, low + 1 / slope


def _scaling(factor: float, low: float, high: float, original: int) -> Iterator[RopeScaling]:
    """The scaling, unless these numbers are none."""
    try:
        yield RopeScaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_seq_len=original)
    except ConfigError:
        return
