"""The native library's panels, back into the blocks they were made from, byte for byte.

Panels (csrc/formats.h) hold 16 rows: per block of the source a head, then per 32 columns (a group) scales and a body; chunk c of
a body has four bytes of each row, columns 4c to 4c + 3 in the low nibbles and 16 + 4c to 16 + 4c + 3 in the high ones. Reading
rows back lets a matrix live in memory once: panels serve products, and the few rows that a look-up needs come from here.

Letters: P panels, N blocks of a row, G groups of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from herd.quant.scheme import BlockType

__all__ = ["PANEL", "unpack"]

PANEL = 16
"""Rows of a panel."""

_HEAD = {"Q4_0": 0, "Q8_0": 0, "Q4_K": 64, "Q5_K": 64, "Q6_K": 32}
_BODY = {"Q4_0": 288, "Q8_0": 544, "Q4_K": 288, "Q5_K": 352, "Q6_K": 416}


def unpack(panels: Tensor, kind: BlockType) -> Tensor:
    """Panels [P, panel bytes] uint8 of a type that has panels -> blocks [16 P, row bytes] uint8."""
    head, body, groups = _HEAD[kind.name], _BODY[kind.name], kind.values // 32
    count = len(panels)
    size = head + groups * body
    each = panels.shape[1] // size
    blocks = panels.view(count, each, size)
    group = blocks[..., head:].unflatten(-1, (groups, body))  # [P, N, G, body]
    scales, bodies = group[..., :32], group[..., 32:]
    heads = blocks[..., :head]
    match kind.name:
        case "Q4_0":
            parts = [_halves(scales[..., 0, :]), _rows(bodies[..., 0, :])]
        case "Q8_0":
            parts = [_halves(scales[..., 0, :]), _rows(bodies[..., 0, :]) ^ 0x80]
        case "Q4_K" | "Q5_K":
            packed = _k_scales(scales[..., :16].movedim(-1, 1), scales[..., 16:].movedim(-1, 1))
            numbers = _nibbles(bodies)
            fifth = [_fifth(bodies[..., 256:])] if kind.name == "Q5_K" else []
            nibbles = numbers.unflatten(-2, (-1, 2))  # [P, 16, N, G / 2, 2, 32]
            low = (nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)).flatten(-2)
            parts = [_halves(heads[..., :32]), _halves(heads[..., 32:]), packed, *fifth, low]
        case _:
            numbers = _nibbles(bodies).unflatten(-2, (2, 4))  # [P, 16, N, half, k, 32]
            high = _sixth(bodies[..., 256:]).unflatten(-2, (2, 4))
            low = numbers[..., :2, :] | (numbers[..., 2:, :] << 4)  # [..., half, 2, 32]
            top = sum((high[..., k, :] << (2 * k) for k in range(4)), torch.zeros_like(high[..., 0, :]))
            both = scales.unflatten(-1, (2, 16)).movedim(-1, 1).flatten(-2)  # [P, 16, N, 2 G]
            parts = [low.flatten(-3), top.flatten(-2), both, _halves(heads)]
    return torch.cat(parts, dim=-1).reshape(count * PANEL, each * kind.nbytes)


def _halves(pairs: Tensor) -> Tensor:
    """[P, N, 32] two bytes of each row -> [P, 16, N, 2]."""
    return pairs.unflatten(-1, (PANEL, 2)).movedim(-2, 1)


def _rows(body: Tensor) -> Tensor:
    """[P, N, chunks * 64] -> [P, 16, N, chunks * 4]: each row's bytes in order."""
    return body.unflatten(-1, (-1, PANEL, 4)).movedim(-2, 1).flatten(-2)


def _nibbles(bodies: Tensor) -> Tensor:
    """[P, N, G, at least 256] -> [P, 16, N, G, 32]: the low four bits of each number."""
    q = bodies[..., :256].unflatten(-1, (4, PANEL, 4)).movedim(-2, 1).flatten(-2)  # [P, 16, N, G, 16]
    return torch.cat((q & 15, q >> 4), dim=-1)


def _fifth(bits: Tensor) -> Tensor:
    """[P, N, 8, 64] -> [P, 16, N, 32]: byte i has bit g of group g, as in the file."""
    q = bits.unflatten(-1, (PANEL, 4)).movedim(-2, 1)  # [P, 16, N, G, 4]: bit k of byte b is column 4k + b
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    per_column = ((q.unsqueeze(-2) >> shifts[:, None]) & 1).flatten(-2)  # [P, 16, N, G, 32]
    return (per_column << shifts[:, None]).sum(-2, dtype=torch.uint8)


def _sixth(bits: Tensor) -> Tensor:
    """[P, N, 8, 128] -> [P, 16, N, 8, 32]: the two high bits of each number."""
    q = bits.unflatten(-1, (2, PANEL, 4)).movedim(-2, 1)  # [P, 16, N, G, 2, 4]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=bits.device)
    return ((q.unsqueeze(-2) >> shifts[:, None]) & 3).flatten(-3)  # column 16 h + 4 j + b


def _k_scales(scale: Tensor, minimum: Tensor) -> Tensor:
    """Six-bit scales and minima [P, 16, N, 8] each -> the 12 bytes that hold them, see `herd.quant.blocks.k_scales`."""
    a = scale[..., :4] | (scale[..., 4:] >> 4 << 6)
    b = minimum[..., :4] | (minimum[..., 4:] >> 4 << 6)
    c = (scale[..., 4:] & 15) | ((minimum[..., 4:] & 15) << 4)
    return torch.cat((a, b, c), dim=-1)
