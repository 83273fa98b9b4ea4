"""GGML's quantized blocks, decoded to float32: the specification that every faster kernel must match.

Each function takes N blocks [N, bytes] uint8 and returns their values [N, values] float32 in memory order, with the same
float32 operations in the same order as llama.cpp and the `gguf` package, so that results agree bit for bit. Integers stay
bytes until they are complete: one conversion to float per value is what the speed depends on.

Letters: N blocks; d scale, m minimum (fp16 in the file); q small integers. Layouts: llama.cpp ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "bits", "half", "k_integers", "k_scales", "nibbles", "planes",
    "q2_k", "q3_k", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0",
]  # fmt: skip


def q4_0(blocks: Tensor) -> Tensor:
    """18 bytes: d; 16 bytes of nibbles, low = values 0-15, high = values 16-31. x = d * (q - 8)."""
    return nibbles(blocks[:, 2:], 16).float().sub_(8).mul_(half(blocks, 0))


def q4_1(blocks: Tensor) -> Tensor:
    """20 bytes: d; m; 16 bytes of nibbles. x = d * q + m."""
    return nibbles(blocks[:, 4:], 16).float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def q5_0(blocks: Tensor) -> Tensor:
    """22 bytes: d; 32 fifth bits; 16 bytes of nibbles. x = d * (q - 16)."""
    q = nibbles(blocks[:, 6:], 16).bitwise_or_(bits(blocks[:, 2:6]) << 4)
    return q.float().sub_(16).mul_(half(blocks, 0))


def q5_1(blocks: Tensor) -> Tensor:
    """24 bytes: d; m; 32 fifth bits; 16 bytes of nibbles. x = d * q + m."""
    q = nibbles(blocks[:, 8:], 16).bitwise_or_(bits(blocks[:, 4:8]) << 4)
    return q.float().mul_(half(blocks, 0)).add_(half(blocks, 2))


def q8_0(blocks: Tensor) -> Tensor:
    """34 bytes: d; 32 signed bytes q. x = d * q."""
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(half(blocks, 0))


def q2_k(blocks: Tensor) -> Tensor:
    """84 bytes: 16 x (4-bit scale, 4-bit minimum); 64 bytes of 2-bit q; d; dmin. x = d * scale * q - dmin * minimum."""
    packed = blocks[:, :16]
    scale = half(blocks, 80) * (packed & 15).float()  # [N, 16], one per 16 values
    minimum = half(blocks, 82) * (packed >> 4).float()
    return _affine(planes(blocks[:, 16:80], 2), scale, minimum)


def q3_k(blocks: Tensor) -> Tensor:
    """110 bytes: 32 bytes of third bits; 64 bytes of 2-bit q; 12 bytes of 6-bit scales; d. x = d * (scale - 32) * (q - 4)."""
    q = planes(blocks[:, 32:96], 2).bitwise_or_(planes(blocks[:, :32], 1) << 2)
    packed = blocks[:, 96:108]
    low = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), dim=1)
    high = torch.cat([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    scale = half(blocks, 108) * (low | (high << 4)).float().sub_(32)  # [N, 16]
    return _scaled(q.float().sub_(4), scale)


def q4_k(blocks: Tensor) -> Tensor:
    """144 bytes: d; dmin; 12 bytes of 6-bit scales and minima; 128 bytes of nibbles. x = d * scale * q - dmin * minimum."""
    return _affine(nibbles(blocks[:, 16:], 32), *k_scales(blocks))


def q5_k(blocks: Tensor) -> Tensor:
    """176 bytes: d; dmin; 12 bytes of scales and minima; 32 bytes of fifth bits; 128 bytes of nibbles. x as in `q4_k`."""
    q = nibbles(blocks[:, 48:], 32).bitwise_or_(planes(blocks[:, 16:48], 1) << 4)
    return _affine(q, *k_scales(blocks))


def q6_k(blocks: Tensor) -> Tensor:
    """210 bytes: 128 bytes of nibbles; 64 bytes of 2 high bits; 16 signed scales; d. x = d * scale * (q - 32)."""
    q = nibbles(blocks[:, :128], 64).bitwise_or_(planes(blocks[:, 128:192], 2) << 4)
    scale = half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # [N, 16]
    return _scaled(q.float().sub_(32), scale)


def half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block -> [N, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def nibbles(packed: Tensor, width: int) -> Tensor:
    """[N, g * width] bytes -> [N, g * 2 * width]: per group the low nibbles, then the high ones."""
    grouped = packed.unflatten(1, (-1, width)).contiguous()  # one copy here makes every later operation a flat loop
    return torch.stack((grouped & 15, grouped >> 4), dim=2).flatten(1)


def planes(packed: Tensor, bits: int) -> Tensor:
    """[N, g * 32] bytes -> [N, g * 32 * 8 / bits]: per group of 32 bytes the lowest `bits` of each, then the next."""
    grouped = packed.unflatten(1, (-1, 32)).contiguous()
    mask = (1 << bits) - 1
    return torch.stack([(grouped >> shift) & mask for shift in range(0, 8, bits)], dim=2).flatten(1)


def bits(packed: Tensor) -> Tensor:
    """[N, 4] bytes -> [N, 32] bits, lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)


def k_integers(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K and Q5_K: the scales and minima of six bits, each [N, 8] uint8.

    Of the 12 bytes a0-3 b0-3 c0-3, six bits of a and b are scales and minima 0-3; numbers 4-7 are the nibbles of c with the
    two remaining bits of a and b on top.
    """
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((a & 63, (c & 15) | ((a >> 6) << 4)), dim=1)
    minimum = torch.cat((b & 63, (c >> 4) | ((b >> 6) << 4)), dim=1)
    return scale, minimum


def k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K and Q5_K: d * scale and dmin * minimum, each [N, 8] float32; see `k_integers`."""
    scale, minimum = k_integers(blocks)
    return half(blocks, 0) * scale.float(), half(blocks, 2) * minimum.float()


def _scaled(q: Tensor, scale: Tensor) -> Tensor:
    """scale [N, g] times equal runs of q [N, values] float32, in place."""
    return q.unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(-1)).flatten(1)


def _affine(q: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """scale * q - minimum over equal runs of q [N, values] bytes -> float32."""
    runs = q.float().unflatten(1, (scale.shape[1], -1))
    return runs.mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).flatten(1)
