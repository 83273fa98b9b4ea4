"""AdamW whose two means take one byte a value each, as in Dettmers et al. 2022 (arXiv 2110.02861) and bitsandbytes.

Values are held in blocks of 256 along a row: the largest magnitude in float32, and for each value the nearest of 256 numbers
that cover seven decades, finely near the top ("dynamic" quantization). The update itself uses the means of this step before they
are rounded. Tensors of fewer than 4,096 values keep float32 means, for they cost nothing.

The tables are those of bitsandbytes, and so are its blocks where rows are whole blocks (every Llama's are); a shorter last block
of a row stays its own here, so that a row-sharded parameter has the blocks of the whole one. One departure: weight decay comes
before the update, as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from herd.errors import ConfigError

__all__ = ["AdamW8", "decode", "dynamic_map", "encode", "encode_plain", "round_stochastically"]

BLOCK = 256
SMALLEST = 4096
"""Parameters with fewer values keep means of 32 bits, as in bitsandbytes."""
PIECE = 1 << 18
"""Values worked on at a time: scratch stays in the cache, and does not grow with the parameter."""


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 numbers, ascending, float32: -1 to 1, or 0 to 1 with twice as many in each decade."""
    found = [0.0, 1.0]
    for decade in range(7):
        cuts = torch.linspace(0.1, 1, (2**decade if signed else 2 ** (decade + 1)) + 1, dtype=torch.float32)
        means = (cuts[:-1] + cuts[1:]) / 2
        for sign in (1.0, -1.0) if signed else (1.0,):
            found += (sign * 10 ** (decade - 6) * means).tolist()
    return torch.tensor(sorted(found), dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class _Table:
    values: Tensor
    borders: Tensor  # halfway between neighbours, then infinity
    first: Tensor  # for the upper 16 bits of a float32: how many borders lie below every number that begins with them


@cache
def _table(signed: bool, device: torch.device) -> _Table:
    values = dynamic_map(signed)
    borders = (values[1:] + values[:-1]) / 2
    beginnings = torch.arange(1 << 16, dtype=torch.int64) << 16
    ends = torch.stack([beginnings, beginnings | 0xFFFF]).to(torch.uint32).view(torch.float32)
    # Between two neighbours there is at most one border: decades have 128 values at most, these 16 bits cut them finer.
    first = torch.bucketize(ends.nan_to_num().amin(0), borders)
    ended = torch.cat([borders, torch.tensor([math.inf])])
    return _Table(values.to(device), ended.to(device), first.to(torch.int32).to(device))


def encode_plain(values: Tensor, signed: bool) -> Tensor:
    """The nearest entry of the table to each of `values` (-1 to 1), uint8: the definition."""
    table = dynamic_map(signed)
    return torch.bucketize(values, ((table[1:] + table[:-1]) / 2).to(values.device)).to(torch.uint8)


def encode(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8 of the same shape, magnitudes float32 [rows, blocks of a row]) of `values` [rows, columns] float32."""
    blocks = _blocks(values)
    top = blocks.abs().amax(-1)
    over = torch.where(top > 0, 1 / top, 0)
    return _nearest(blocks * over[..., None], signed).flatten(1)[:, : values.shape[1]], top


def decode(codes: Tensor, top: Tensor, signed: bool) -> Tensor:
    """What `encode` took, nearly: float32 [rows, columns]."""
    table = _table(signed, codes.device).values
    found = table.index_select(0, codes.flatten().int()).view(codes.shape)
    return (_blocks(found) * top[..., None]).flatten(1)[:, : codes.shape[1]]


def _blocks(values: Tensor) -> Tensor:
    return nn.functional.pad(values, (0, -values.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _nearest(values: Tensor, signed: bool) -> Tensor:
    """`encode_plain` by one look-up and one comparison."""
    table = _table(signed, values.device)
    flat = values.contiguous().flatten()
    low = table.first.index_select(0, flat.view(torch.int32).bitwise_right_shift(16).bitwise_and(0xFFFF))
    return (low + (flat > table.borders.index_select(0, low))).to(torch.uint8).view(values.shape)


def round_stochastically(values: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the odds of its distance: the mean over many roundings is the value itself.

    Draws from the global random state of the device.
    """
    noise = torch.randint_like(values, 1 << 16, dtype=torch.int32)
    bits = (values.contiguous().view(torch.int32) + noise).bitwise_and(-65536)
    return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()


class AdamW8(Optimizer):
    """AdamW, its means in 8 bits: 2.03 bytes a parameter instead of 8. Parameters of any shape, float32 or bfloat16.

    bfloat16 parameters are rounded stochastically: an update is often smaller than half of their last place, and rounding to the
    nearest would lose it every time. State of a parameter: `step`, and `exp_avg`, `exp_avg_sq` for small ones, otherwise codes
    of the parameter's shape and magnitudes, `exp_avg_codes`, `exp_avg_top`, and the same of `exp_avg_sq`. Sharded parameters
    (DTensor) have sharded states; raises ConfigError for one that is cut along its last dimension within a block.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, with every state in the dtype it was saved in (torch would make codes floats)."""
        super().load_state_dict(state_dict)
        weights = [p for group in self.param_groups for p in group["params"]]
        names = [i for group in state_dict["param_groups"] for i in group["params"]]
        for name, p in zip(names, weights, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                kept = value.to(p.device, copy=True) if isinstance(value, Tensor) and key != "step" else value
                self.state[p][key] = kept

    def _update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            self._begin(p, state)
        state["step"] += 1
        local, grad = _rows(p.data), _rows(p.grad)
        small = "exp_avg" in state
        names = ("exp_avg", "exp_avg_sq") if small else _NAMES
        held = [_rows(state[name]) for name in names]
        height = max(1, PIECE // local.shape[1])
        for start in range(0, len(local), height):
            rows = slice(start, start + height)
            part, g = local[rows], grad[rows].float()
            one, two = (
                (held[0][rows], held[1][rows])
                if small
                else (
                    decode(held[0][rows], held[1][rows], True),
                    decode(held[2][rows], held[3][rows], False),
                )
            )
            wide = _stepped(part, g, one, two, int(state["step"]), group)
            part.copy_(wide if part.dtype != torch.bfloat16 else round_stochastically(wide))
            if not small:
                held[0][rows], held[1][rows] = encode(one, True)
                held[2][rows], held[3][rows] = encode(two, False)

    def _begin(self, p: nn.Parameter, state: dict[str, Any]) -> None:
        state["step"] = 0
        if p.numel() < SMALLEST:
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            return
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            nothing = int(encode_plain(torch.zeros(1), signed))
            state[f"{name}_codes"] = torch.full_like(p, nothing, dtype=torch.uint8)
            state[f"{name}_top"] = _magnitudes(p)


_NAMES = ("exp_avg_codes", "exp_avg_top", "exp_avg_sq_codes", "exp_avg_sq_top")


def _stepped(part: Tensor, g: Tensor, one: Tensor, two: Tensor, step: int, group: dict[str, Any]) -> Tensor:
    """The parameter after its step, float32; the means are changed in place. In torch.optim.AdamW's order."""
    beta1, beta2 = group["betas"]
    one.lerp_(g, 1 - beta1)
    two.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    divisor = (two.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
    wide = part.float() * (1 - group["lr"] * group["weight_decay"])
    return wide.addcdiv_(one, divisor, value=-group["lr"] / (1 - beta1**step))


def _rows(tensor: Any) -> Tensor:
    """This rank's part as [rows, columns]; a view."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.reshape(1, -1) if local.ndim < 2 else local.flatten(0, -2)


def _magnitudes(p: Tensor) -> Tensor:
    """Zeros, one for each block: [..., blocks of a row], sharded as the parameter is."""
    blocks = -(-p.shape[-1] // BLOCK)
    if not isinstance(p.data, DTensor):
        return torch.zeros(*p.shape[:-1], blocks, dtype=torch.float32, device=p.device)
    local = p.data.to_local()
    width = local.shape[-1]
    if width != p.shape[-1] and (width % BLOCK or p.shape[-1] % BLOCK):
        raise ConfigError(
            f"adamw8bit: a parameter of shape {tuple(p.shape)} is cut into columns of {width}, which are not whole blocks of "
            f"{BLOCK}: choose train.optim.kind=adamw, or another tensor-parallel size"
        )
    zeros = torch.zeros(*local.shape[:-1], -(-width // BLOCK), dtype=torch.float32, device=local.device)
    shape = torch.Size((*p.shape[:-1], blocks))
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        zeros, p.data.device_mesh, p.data.placements, run_check=False, shape=shape, stride=strides
    )
