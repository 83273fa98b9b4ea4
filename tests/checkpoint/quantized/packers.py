"""Quantized checkpoints made by hand: packers written from the descriptions of the formats, with plain loops over bits, and the
values that each format says its bytes stand for. Nothing here uses herd's decoders.

Every packer takes a weight [out, in] and gives (tensors by the last part of their names, values [out, in] float32).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from herd.model.config import ModelConfig
from herd.model.llama import Llama
from tests.build import tiny
from tests.checkpoint.folders import write_hf

__all__ = [
    "CONFIG",
    "Pack",
    "awq_gemm",
    "awq_gemv",
    "fp8",
    "gptq",
    "int8_rows",
    "pack_words",
    "packed_int",
    "write_quantized",
]

Pack = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor] | None]
"""(module name, weight) -> what replaces `weight`, and its values; None: it stays plain."""

CONFIG: ModelConfig = replace(tiny("llama-3"), hidden_dim=192)
"""Every width is a multiple of 32."""


def pack_words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """[R, n] integers -> [R, n * bits / 32] int32: number i in bits i * bits and following, lowest first."""
    rows, count = numbers.shape
    words = np.zeros((rows, -(-count * bits // 32)), np.uint32)
    for row in range(rows):
        stream = 0
        for i in range(count):
            stream |= int(numbers[row, i]) << (i * bits)
        for w in range(words.shape[1]):
            words[row, w] = (stream >> (32 * w)) & 0xFFFFFFFF
    return words.view(np.int32)


def quantized(
    weight: Tensor, bits: int, group_of: np.ndarray, *, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q [out, in] from 0, scales [out, G] float16, zeros [out, G]) by plain rounding to nearest."""
    w, top = weight.double().numpy(), (1 << bits) - 1
    groups = int(group_of.max()) + 1
    q, scales, zeros = (
        np.zeros(w.shape, np.int64),
        np.zeros((len(w), groups), np.float16),
        np.zeros((len(w), groups), np.int64),
    )
    for g in range(groups):
        part = w[:, group_of == g]
        if symmetric:
            scale, zero = np.abs(part).max(1) / (top // 2), np.full(len(w), (top + 1) // 2)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / top
            zero = np.rint(-low / scale)
        scales[:, g], zeros[:, g] = scale.astype(np.float16), zero
        used = scales[:, g].astype(np.float64)
        q[:, group_of == g] = np.clip(np.rint(part / used[:, None]) + zeros[:, g][:, None], 0, top)
    return q, scales, zeros


def values(q: np.ndarray, scales: np.ndarray, zeros: np.ndarray, group_of: np.ndarray) -> Tensor:
    """scale * (q - zero) in float64, which float32 holds exactly for float16 scales."""
    wide = scales.astype(np.float64)[:, group_of] * (q - zeros[:, group_of])
    return torch.from_numpy(wide).float()


def gptq(
    weight: Tensor, *, bits: int = 4, group: int = 32, symmetric: bool = True, act_order: bool = False, version: int = 1
) -> tuple[dict[str, Tensor], Tensor]:
    """GPTQ: words along the inputs, zeros along the outputs; version 1 takes one from the packed zeros, word by word."""
    columns = weight.shape[1]
    size = columns if group == -1 else group
    group_of = np.arange(columns) // size
    if act_order:
        group_of = group_of[np.random.default_rng(5).permutation(columns)]
    q, scales, zeros = quantized(weight, bits, group_of, symmetric=symmetric)
    packed = pack_words(zeros.T, bits)
    if version == 1:
        if 8 % bits:
            packed = pack_words((zeros.T - 1) % (1 << bits), bits)
        else:
            ones = sum(1 << i for i in range(0, 32, bits))
            packed = (packed.view(np.uint32) - np.uint32(ones)).view(np.int32)
    tensors = {
        "qweight": torch.from_numpy(pack_words(q.T.copy().T, bits).T.copy()),
        "qzeros": torch.from_numpy(packed),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    return tensors, values(q, scales, zeros, group_of)


def awq_gemm(weight: Tensor, *, group: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    """AWQ gemm: words along the outputs; bits 4p hold column order[p] of every eight."""
    columns = weight.shape[1]
    group_of = np.arange(columns) // (columns if group == -1 else group)
    q, scales, zeros = quantized(weight, 4, group_of, symmetric=False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(numbers: np.ndarray) -> Tensor:
        shuffled = numbers.reshape(len(numbers), -1, 8)[:, :, order].reshape(numbers.shape)
        return torch.from_numpy(pack_words(shuffled, 4))

    tensors = {"qweight": packed(q.T), "qzeros": packed(zeros.T), "scales": torch.from_numpy(scales.T.copy())}
    return tensors, values(q, scales, zeros, group_of)


def awq_gemv(weight: Tensor, *, group: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    """AWQ gemv: words along the inputs in order, zeros and scales padded to whole words."""
    rows, columns = weight.shape
    group_of = np.arange(columns) // group
    q, scales, zeros = quantized(weight, 4, group_of, symmetric=False)
    words = -(-scales.shape[1] // 8)
    multiple = {32: 4, 64: 2}.get(group, 1)
    words = -(-words // multiple) * multiple
    wide_scales, wide_zeros = np.zeros((rows, 8 * words), np.float16), np.zeros((rows, 8 * words), np.int64)
    wide_scales[:, : scales.shape[1]], wide_zeros[:, : scales.shape[1]] = scales, zeros
    tensors = {
        "qweight": torch.from_numpy(pack_words(q, 4)),
        "qzeros": torch.from_numpy(pack_words(wide_zeros, 4)),
        "scales": torch.from_numpy(wide_scales),
    }
    return tensors, values(q, scales, zeros, group_of)


def packed_int(
    weight: Tensor,
    *,
    bits: int = 4,
    group: int | None = 32,
    symmetric: bool = True,
    act_order: bool = False,
    zeros_packed: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors, pack-quantized: q + 2^(bits - 1) in words along the inputs."""
    rows, columns = weight.shape
    group_of = np.arange(columns) // (group or columns)
    if act_order:
        group_of = group_of[np.random.default_rng(6).permutation(columns)]
    q, scales, zeros = quantized(weight, bits, group_of, symmetric=symmetric)
    rounded = torch.from_numpy(scales).to(dtype)
    tensors = {
        "weight_packed": torch.from_numpy(pack_words(q, bits)),
        "weight_scale": rounded,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    half = 1 << (bits - 1)
    if not symmetric:
        packed = torch.from_numpy(pack_words(zeros.T, bits).T.copy())
        tensors["weight_zero_point"] = packed if zeros_packed else torch.from_numpy((zeros - half).astype(np.int8))
    return tensors, values(q - half, rounded.double().numpy(), zeros - half, group_of)


def fp8(
    weight: Tensor, *, per: str = "channel", scale: str = "weight_scale", block: int = 16
) -> tuple[dict[str, Tensor], Tensor]:
    """float8_e4m3fn with a scale for the matrix, each row or each square."""
    rows, columns = weight.shape
    if per == "tensor":
        scales = weight.abs().max().view(1) / 448
        spread = scales.expand(rows, columns)
    elif per == "channel":
        scales = weight.abs().amax(1, keepdim=True) / 448
        spread = scales.expand(rows, columns)
    else:
        tall, wide = -(-rows // block), -(-columns // block)
        scales, spread = torch.zeros(tall, wide), torch.zeros(rows, columns)
        for i in range(tall):
            for j in range(wide):
                cut = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                scales[i, j] = weight[cut].abs().max() / 448
                spread[cut] = scales[i, j]
    small = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": small, scale: scales}, small.float() * spread


def int8_rows(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Tensor], Tensor]:
    """int8 with a scale per row."""
    scales = (weight.abs().amax(1, keepdim=True) / 127).to(dtype)
    small = (weight / scales.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": small, "weight_scale": scales}, small.float() * scales.float()


def write_quantized(
    folder: Path, model: Llama, pack: Pack, config: dict[str, Any] | None, *, dtype: torch.dtype | None = torch.float16
) -> dict[str, Tensor]:
    """A Hugging Face folder of `model` with the matrices that `pack` packs, `config` as quantization_config, and plain tensors
    in `dtype`. Returns the values of every packed weight by its name in a plain checkpoint."""
    write_hf(folder, model)
    state, expected = load_file(folder / "model.safetensors"), {}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        made = pack(name.removesuffix(".weight"), tensor) if tensor.ndim == 2 else None
        if made is None:
            out[name] = tensor if dtype is None else tensor.to(dtype)
            continue
        parts, expected[name] = made
        out |= {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((folder / "config.json").read_text())
    if config is not None:
        data["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(data))
    return expected
