"""Rotary positions: Meta's interleaved pairs, in real arithmetic, and the four ways a layer places q and k.

Letters: S positions, H query heads, Hkv key/value heads, Dh head_dim.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from herd.kernels import onepass
from herd.model.config import LayerSpec, ModelConfig, RopeScaling, Temper
from herd.model.norm import rms

__all__ = ["Keep", "Rope", "Rotary", "Rotate", "RotateThenNorm", "Temperature", "frequencies", "make_placement"]


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Rotary frequencies [Dh / 2] in fp32, after Llama 3.1 scaling when given (architecture: llama-models llama3/model.py)."""
    f = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    return f if scaling is None else scale_frequencies(f, scaling)


def scale_frequencies(f: Tensor, scaling: RopeScaling) -> Tensor:
    """Stretch long wavelengths by `factor`, keep short ones, blend between. fp32 in, fp32 out."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_seq_len * f / (2 * math.pi)  # rotations over the original context
    if high == low:  # Llama 4 Scout: a hard step, and the blend would divide by zero
        return torch.where(turns < low, f / scaling.factor, f)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    scaled = (1 - blend) * f / scaling.factor + blend * f
    return torch.where(turns > high, f, torch.where(turns < low, f / scaling.factor, scaled))


class Rotary(NamedTuple):
    """Angles of one step, gathered once and shared by every layer. cos, sin [..., S, 1, Dh/2] fp32, positions [..., S]."""

    cos: Tensor
    sin: Tensor
    positions: Tensor


class Rope(nn.Module):
    """positions [..., S] -> Rotary. Holds only the frequencies, so a 10M-token context costs no table.

    The frequencies stay fp32 and are made anew whenever the module moves: `model.to(torch.bfloat16)` must not round them,
    and a model built on the meta device gets real ones when its storage appears.
    """

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self._fresh(torch.get_default_device()), persistent=False)

    def _fresh(self, device: torch.device) -> Tensor:
        c = self.config
        with torch.device("cpu"):
            f = frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        return f.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> Rope:
        super()._apply(fn, recurse)
        self.inv_freq = self._fresh(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor) -> Rotary:
        angles = positions[..., None, None].float() * self.inv_freq  # [..., S, 1, Dh/2]
        return Rotary(angles.cos(), angles.sin(), positions)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn neighbouring pairs of x [..., S, H, Dh] by their angles; computed in fp32, returned in x's dtype."""
    if onepass.fits(x) and (turned := onepass.rotate(x, rotary.cos, rotary.sin)) is not None:
        return turned
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * rotary.cos - odd * rotary.sin, even * rotary.sin + odd * rotary.cos), dim=-1)
    return turned.flatten(-2).type_as(x)


class Rotate(nn.Module):
    """Llama 1 to 3.3, and Llama 4 Maverick's rotary layers."""

    def forward(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        return rotate(q, rotary), rotate(k, rotary)


class RotateThenNorm(nn.Module):
    """Llama 4 Scout's rotary layers: q and k are normalised per head, without weight, after the rotation."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        return rms(rotate(q, rotary), self.eps), rms(rotate(k, rotary), self.eps)


class Keep(nn.Module):
    """A layer without positions."""

    def forward(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        return q, k


class Temperature(nn.Module):
    """A layer without positions whose queries grow with the logarithm of their position (Llama 4 long context)."""

    def __init__(self, temper: Temper) -> None:
        super().__init__()
        self.temper = temper

    def scale(self, positions: Tensor) -> Tensor:
        """What queries at `positions` [..., S] are multiplied by, [..., S] float32."""
        steps = torch.floor((positions.float() + 1) / self.temper.floor_scale)
        return torch.log1p(steps) * self.temper.attn_scale + 1

    def forward(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        return (q * self.scale(rotary.positions)[..., None, None]).type_as(q), k


def make_placement(config: ModelConfig, spec: LayerSpec) -> nn.Module:
    """The placement module of one layer."""
    match spec.placement:
        case "rope":
            return Rotate()
        case "rope_norm":
            return RotateThenNorm(config.norm_eps)
        case "none":
            return Keep()
        case "tempered":
            assert config.temper is not None  # ModelConfig refuses the other case
            return Temperature(config.temper)
