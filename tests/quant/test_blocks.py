"""Block decoding against the gguf package (bit for bit) and against a scalar reading of the format."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from herd.quant.scheme import BLOCK_TYPES, BlockType, QuantTensor, block_type

DECODED = [t for t in BLOCK_TYPES if t.decode is not None]
HALVES = {  # where each type keeps its fp16 numbers
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
SPECIAL = (0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFE12)
"""fp16 zeros, subnormals, extremes, infinities and NaNs (signalling and quiet)."""


def random_blocks(kind: BlockType, count: int, seed: int) -> torch.Tensor:
    """Random bytes: every bit pattern is a valid block."""
    return torch.randint(0, 256, (count, kind.nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def adversarial_blocks(kind: BlockType) -> torch.Tensor:
    """Every combination of special scales with all-zero, all-one and random payloads."""
    places = HALVES[kind.name]
    made = []
    for first in SPECIAL:
        for second in SPECIAL if len(places) == 2 else (0,):
            for fill in (0x00, 0xFF, 0x5A, 0x80):
                block = bytearray([fill] * kind.nbytes)
                for place, value in zip(places, (first, second), strict=False):
                    block[place : place + 2] = struct.pack("<H", value)
                made.append(list(block))
    return torch.tensor(made, dtype=torch.uint8)


def oracle(kind: BlockType, blocks: torch.Tensor) -> torch.Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), GGMLQuantizationType[kind.name]))


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal bits; a NaN equals any NaN, since which payload survives `NaN + NaN` is the compiler's choice."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == torch.float32
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours.view(torch.int32)[~nan], theirs.view(torch.int32)[~nan])


@pytest.mark.parametrize("kind", DECODED, ids=lambda t: t.name)
def test_random_blocks_equal_the_gguf_package(kind: BlockType) -> None:
    blocks = random_blocks(kind, 2000, seed=kind.id)
    assert kind.decode is not None
    assert_same_bits(kind.decode(blocks), oracle(kind, blocks))


@pytest.mark.parametrize("kind", DECODED, ids=lambda t: t.name)
def test_special_scales_equal_the_gguf_package(kind: BlockType) -> None:
    blocks = adversarial_blocks(kind)
    assert kind.decode is not None
    assert_same_bits(kind.decode(blocks), oracle(kind, blocks))


def half(block: bytes, at: int) -> np.float32:
    return np.float32(struct.unpack_from("<e", block, at)[0])


def nibble(block: bytes, at: int, i: int, width: int) -> int:
    """Value i of nibbles stored per group of `width` bytes: low nibbles first, then high ones."""
    group, rest = divmod(i, 2 * width)
    byte = block[at + group * width + rest % width]
    return byte >> 4 if rest >= width else byte & 15


def k_scale(s: bytes, j: int) -> tuple[int, int]:
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (s[j + 4] & 15) | ((s[j - 4] >> 6) << 4), (s[j + 4] >> 4) | ((s[j] >> 6) << 4)


def scalar_4bit(block: bytes, i: int) -> np.float32:
    return half(block, 0) * np.float32(nibble(block, 2, i, 16) - 8)


def scalar_8bit(block: bytes, i: int) -> np.float32:
    return half(block, 0) * np.float32(struct.unpack_from("<b", block, 2 + i)[0])


def scalar_5bit(block: bytes, i: int) -> np.float32:
    fifth = struct.unpack_from("<I", block, 2)[0] >> i & 1
    return half(block, 0) * np.float32(nibble(block, 6, i, 16) + 16 * fifth - 16)


def scalar_q4_1(block: bytes, i: int) -> np.float32:
    return half(block, 0) * np.float32(nibble(block, 4, i, 16)) + half(block, 2)


def scalar_q5_1(block: bytes, i: int) -> np.float32:
    fifth = struct.unpack_from("<I", block, 4)[0] >> i & 1
    return half(block, 0) * np.float32(nibble(block, 8, i, 16) + 16 * fifth) + half(block, 2)


def scalar_q2_k(block: bytes, i: int) -> np.float32:
    s = block[i // 16]
    q = block[16 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    return half(block, 80) * np.float32(s & 15) * np.float32(q) - half(block, 82) * np.float32(s >> 4)


def scalar_q3_k(block: bytes, i: int) -> np.float32:
    j = i // 16
    low = block[96 + j % 8] >> 4 * (j // 8) & 15
    high = block[104 + j % 4] >> 2 * (j // 4) & 3
    q = block[32 + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
    third = block[i % 32] >> i // 32 & 1
    return half(block, 108) * np.float32((low | high << 4) - 32) * np.float32(q - (0 if third else 4))


def scalar_q4_k(block: bytes, i: int) -> np.float32:
    scale, minimum = k_scale(block[4:16], i // 32)
    q = nibble(block, 16, i, 32)
    return half(block, 0) * np.float32(scale) * np.float32(q) - half(block, 2) * np.float32(minimum)


def scalar_q5_k(block: bytes, i: int) -> np.float32:
    scale, minimum = k_scale(block[4:16], i // 32)
    q = nibble(block, 48, i, 32) + 16 * (block[16 + i % 32] >> i // 32 & 1)
    return half(block, 0) * np.float32(scale) * np.float32(q) - half(block, 2) * np.float32(minimum)


def scalar_q6_k(block: bytes, i: int) -> np.float32:
    n, rest = divmod(i, 128)
    k, low = divmod(rest, 32)
    byte = block[64 * n + low + 32 * (k & 1)]
    q = (byte >> 4 if k >= 2 else byte & 15) | (block[128 + 32 * n + low] >> 2 * k & 3) << 4
    scale = struct.unpack_from("<b", block, 192 + 8 * n + low // 16 + 2 * k)[0]
    return half(block, 208) * np.float32(scale) * np.float32(q - 32)


SCALAR: dict[str, Callable[[bytes, int], np.float32]] = {
    "Q4_0": scalar_4bit, "Q4_1": scalar_q4_1, "Q5_0": scalar_5bit, "Q5_1": scalar_q5_1, "Q8_0": scalar_8bit,
    "Q2_K": scalar_q2_k, "Q3_K": scalar_q3_k, "Q4_K": scalar_q4_k, "Q5_K": scalar_q5_k, "Q6_K": scalar_q6_k,
}  # fmt: skip


@pytest.mark.parametrize("kind", DECODED, ids=lambda t: t.name)
def test_blocks_equal_the_scalar_reading_of_the_format(kind: BlockType) -> None:
    blocks = torch.cat((random_blocks(kind, 12, seed=100 + kind.id), adversarial_blocks(kind)[::37]))
    assert kind.decode is not None
    with np.errstate(all="ignore"):
        slow = [[SCALAR[kind.name](bytes(b.tolist()), i) for i in range(kind.values)] for b in blocks]
    assert_same_bits(kind.decode(blocks), torch.tensor(np.array(slow, dtype=np.float32)))


def test_the_type_table_agrees_with_the_gguf_package() -> None:
    known = {int(t): t.name for t in GGMLQuantizationType}
    assert {t.id for t in BLOCK_TYPES} <= set(known)
    for kind in BLOCK_TYPES:
        assert kind.name == known[kind.id]
        if kind.name != "Q8_1":  # never stored; the package still has its size from before 2023
            assert (kind.values, kind.nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType(kind.id)]
        assert block_type(kind.id) is block_type(kind.name) is kind
    assert block_type(4) is None  # withdrawn
    assert block_type("Q9_K") is None


@pytest.mark.parametrize("kind", DECODED, ids=lambda t: t.name)
def test_a_tensor_dequantizes_row_by_row_and_rounds_once(kind: BlockType) -> None:
    experts, rows, columns = 2, 5, 3 * kind.values
    raw = random_blocks(kind, experts * rows * 3, seed=7).view(experts, rows, -1)
    tensor = QuantTensor(raw, kind, (experts, rows, columns))
    assert tensor.nbytes == experts * rows * kind.row_bytes(columns)
    full = tensor.dequantize()
    assert_same_bits(full, oracle(kind, raw.view(-1, kind.nbytes)).view(experts, rows, columns))
    assert_same_bits(QuantTensor(raw[1], kind, (rows, columns)).dequantize(), full[1])
    assert_same_bits(QuantTensor(raw[:, 2:4], kind, (experts, 2, columns)).dequantize(), full[:, 2:4].contiguous())
    assert torch.equal(tensor.dequantize(torch.bfloat16).nan_to_num(), full.bfloat16().nan_to_num())


def test_many_chunks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = block_type("Q5_K")
    assert kind is not None
    assert kind.decode is not None
    raw = random_blocks(kind, 37, seed=3)
    monkeypatch.setattr("herd.quant.scheme.CHUNK", 4 * 256)
    assert_same_bits(QuantTensor(raw.view(1, -1), kind, (1, 37 * 256)).dequantize(), kind.decode(raw).view(1, -1))


def test_wrong_shapes_and_types_are_refused() -> None:
    q8, iq = block_type("Q8_0"), block_type("IQ4_XS")
    assert q8 is not None
    assert iq is not None
    with pytest.raises(ValueError, match="whole Q8_0 blocks of 32"):
        QuantTensor(torch.zeros(2, 34, dtype=torch.uint8), q8, (2, 33))
    with pytest.raises(ValueError, match="takes"):
        QuantTensor(torch.zeros(2, 34, dtype=torch.uint8), q8, (2, 64))
    with pytest.raises(ValueError, match="takes"):
        QuantTensor(torch.zeros(2, 34), q8, (2, 32))
    with pytest.raises(ValueError, match="cannot dequantize IQ4_XS"):
        QuantTensor(torch.zeros(2, 136, dtype=torch.uint8), iq, (2, 256)).dequantize()


def test_an_infinite_scale_is_kept() -> None:
    q8 = block_type("Q8_0")
    assert q8 is not None
    block = torch.zeros(34, dtype=torch.uint8)
    block[:2] = torch.tensor([0x00, 0x7C], dtype=torch.uint8)
    block[2] = 1
    values = QuantTensor(block.view(1, 34), q8, (1, 32)).dequantize()[0]
    assert values[0] == math.inf
    assert values[1:].isnan().all()
