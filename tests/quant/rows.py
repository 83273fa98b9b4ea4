"""Rows of values for encoders: made of whole numbers and exact operations, so that they are the same bits everywhere."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

__all__ = ["DATA", "digest", "rows"]

DATA = (
    "bell",
    "heavy",
    "bf16",
    "uneven",
    "ties",
    "sparse",
    "positive",
    "negative",
    "constant",
    "small",
    "tiny",
    "zero",
)


def rows(name: str, count: int = 16, columns: int = 1024) -> torch.Tensor:
    """[count, columns] float32 of one character (a name in DATA)."""
    random = np.random.RandomState(DATA.index(name) + 1)  # its stream is frozen
    bell = random.randint(-(1 << 10), 1 << 10, (8, count, columns)).sum(0).astype(np.float32) / np.float32(2048)
    other = random.randint(0, 1 << 20, (count, columns)).astype(np.float32) / np.float32(1 << 20)
    groups = np.float32(2) ** random.randint(-12, 1, (count, columns // 16)).repeat(16, axis=1).astype(np.float32)
    values = {
        "bell": bell * np.float32(0.02),
        "heavy": bell * bell * bell * (1 + np.float32(30) * (other < np.float32(0.01))),
        "bf16": torch.from_numpy(bell * np.float32(0.03)).bfloat16().float().numpy(),
        "uneven": bell * groups,  # some groups vanish beside their neighbours
        "ties": np.round(bell * 2),
        "sparse": np.where(other < np.float32(0.03), bell, np.float32(0)),
        "positive": other + np.float32(1),
        "negative": -other - np.float32(1),
        "constant": np.full_like(bell, 0.3) * np.sign(groups.cumsum(axis=1) % 3 - 1).astype(np.float32),
        "small": bell * np.float32(1e-6),  # fp16 scales are subnormal
        "tiny": bell * np.float32(1e-11),  # fp16 scales are zero
        "zero": np.zeros_like(bell),
    }[name]
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def digest(blocks: torch.Tensor) -> str:
    """A short hash of bytes."""
    return hashlib.sha256(blocks.contiguous().numpy().tobytes()).hexdigest()[:16]
