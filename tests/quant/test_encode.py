"""Encoding against the gguf package (byte for byte), against goldens of llama.cpp, and against bad input."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from herd.errors import CheckpointError
from herd.quant import encode as encoding
from herd.quant.encode import ENCODED, encode
from herd.quant.scheme import QuantTensor, block_type
from tests.quant.rows import DATA, digest, rows

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "quant_blocks.json").read_text())  # made by llama.cpp
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LEGACY = ("Q4_0", "Q5_0", "Q5_1", "Q8_0")
QUANTIZED = tuple(kind for kind in ENCODED if kind not in PLAIN)


def blocks_of(values: torch.Tensor, kind: str) -> torch.Tensor:
    made = encode(values, kind)
    assert isinstance(made, QuantTensor)
    assert made.type.name == kind
    assert made.shape == tuple(values.shape)
    return made.blocks


def gguf_blocks(values: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("data", DATA)
def test_blocks_equal_llama_cpps_goldens(kind: str, data: str) -> None:
    assert digest(blocks_of(rows(data), kind)) == GOLDEN[kind][data]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_first_golden_block(kind: str) -> None:
    golden = bytes.fromhex(GOLDEN[kind]["first block of bell"])
    assert bytes(blocks_of(rows("bell"), kind)[0, : len(golden)].tolist()) == golden


@pytest.mark.parametrize("kind", LEGACY)
@pytest.mark.parametrize("data", DATA)
def test_blocks_equal_the_gguf_packages(kind: str, data: str) -> None:
    values = rows(data, count=7, columns=320)
    assert torch.equal(blocks_of(values, kind), gguf_blocks(values, kind))


@pytest.mark.parametrize("kind", LEGACY)
def test_large_values_and_subnormal_scales_equal_the_gguf_packages(kind: str) -> None:
    exponents = torch.arange(-120, 14).repeat_interleave(2).view(-1, 1)  # up to where fp16 scales end
    values = torch.randn(len(exponents), 32, generator=torch.Generator().manual_seed(1)) * 2.0**exponents
    assert torch.equal(blocks_of(values, kind), gguf_blocks(values, kind))


def test_halves_round_away_from_zero_in_q8_0() -> None:
    row = torch.zeros(32)
    row[:9] = torch.tensor([127.0, 0.5, -0.5, 1.5, 2.5, -2.5, 126.5, 0.49999997, -0.49999997])
    block = bytes(blocks_of(row, "Q8_0").tolist())
    assert struct.unpack_from("<e9b", block) == (1.0, 127, 1, -1, 2, 3, -3, 127, 0, 0)


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_of_two_extremes_the_first_decides_the_sign_of_the_scale(first: float) -> None:
    row = torch.zeros(256)
    row[5], row[6] = first, -first
    assert struct.unpack_from("<e", bytes(blocks_of(row, "Q4_0").tolist()))[0] == -first / 8
    assert math.copysign(1, struct.unpack_from("<e", bytes(blocks_of(row, "Q6_K").tolist()), 208)[0]) == math.copysign(
        1, struct.unpack_from("<e", bytes(blocks_of(torch.where(row == -first, 0.0, row), "Q6_K").tolist()), 208)[0]
    )


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_plain_types_round_as_the_gguf_package_does(kind: str) -> None:
    values = torch.cat(
        [rows(data).flatten() for data in DATA] + [torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2**-133, 6e-8])]
    )
    made = encode(values, kind)
    assert isinstance(made, torch.Tensor)
    assert made.dtype == PLAIN[kind]
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(made.view(torch.uint16).numpy(), theirs.view(np.uint16).reshape(values.shape))


def test_a_tensor_that_has_its_dtype_already_is_not_copied() -> None:
    values = torch.tensor([1.0, math.inf, math.nan], dtype=torch.bfloat16)
    assert encode(values, "BF16") is values or encode(values, "BF16").data_ptr() == values.data_ptr()  # type: ignore[union-attr]
    widened = encode(values, "F32")
    assert isinstance(widened, torch.Tensor)
    assert torch.equal(widened[:2], values[:2].float())


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_widened_first(kind: str, dtype: torch.dtype) -> None:
    values = rows("bell", count=3).to(dtype)
    assert torch.equal(blocks_of(values, kind), blocks_of(values.float(), kind))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_pieces_threads_and_strides_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = rows("heavy", count=24, columns=512)
    whole = blocks_of(values, kind)
    kept = values.clone()
    monkeypatch.setattr(encoding, "PIECE", 3 * 256)
    assert torch.equal(blocks_of(values, kind), whole)
    assert torch.equal(blocks_of(values.t().contiguous().t(), kind), whole)
    experts = values.view(4, 6, 512)
    assert torch.equal(blocks_of(experts.permute(2, 0, 1).contiguous().permute(1, 2, 0), kind), whole.view(4, 6, -1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(blocks_of(values, kind), whole)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(values, kept)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_encoding_what_was_decoded_loses_almost_nothing(kind: str) -> None:
    values = rows("bell")
    once = encode(values, kind)
    assert isinstance(once, QuantTensor)
    noise = (once.dequantize() - values).square().mean().sqrt() / values.square().mean().sqrt()
    bits = {"Q4": 4, "Q5": 5, "Q6": 6, "Q8": 8}[kind[:2]]
    assert noise < 1.6 * 2.0**-bits  # a uniform quantizer of a bell curve has about 1.3
    assert noise > 0.3 * 2.0**-bits


@pytest.mark.parametrize("kind", ENCODED)
def test_an_empty_tensor(kind: str) -> None:
    made = encode(torch.empty(0, 256), kind)
    assert tuple(made.shape) == (0, 256)


@pytest.mark.parametrize("kind", [*QUANTIZED, "F16", "BF16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 255), (1, 3, 300)])
def test_what_is_not_finite_is_refused_and_named(kind: str, value: float, place: tuple[int, ...]) -> None:
    values = rows("bell", count=8, columns=512).view(2, 4, 512).clone()
    values[place] = value
    with pytest.raises(CheckpointError) as caught:
        encode(values, kind, name="layers.0.attention.wq.weight")
    message = str(caught.value)
    assert f"the value at {list(place)} is {value}" in message
    assert "'layers.0.attention.wq.weight'" in message
    with pytest.raises(CheckpointError, match=f"{list(place)[1]}, {place[2]}"):
        encode(values.transpose(0, 1).contiguous().transpose(0, 1), kind)


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("F16", 65519.9), ("Q8_0", 65519.0 * 127), ("Q4_0", 65519.0 * 8), ("Q5_0", 65519.0 * 16), ("Q5_1", 65519.0 * 31)],
)
def test_values_that_overflow_a_scale_are_refused(kind: str, limit: float) -> None:
    values = torch.zeros(4, 32)
    values[2, 3] = limit
    encode(values, kind)
    for too_large in (1.001 * limit, -1.001 * limit, 3e38):
        values[2, 3] = too_large
        with pytest.raises(CheckpointError, match=r"at \[2, 3\] is too large for"):
            encode(values, kind)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "BF16"])
def test_huge_values_are_refused_by_k_types_and_bf16(kind: str) -> None:
    values = rows("bell", count=4).clone()
    values[3, 700] = 3.4e38
    with pytest.raises(CheckpointError, match=r"at \[3, 700\] is too large for"):
        encode(values, kind)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_rows_that_are_not_whole_blocks_are_refused(kind: str) -> None:
    type_ = block_type(kind)
    assert type_ is not None
    for shape in ((2, type_.values + 1), (type_.values - 1,), ()):
        with pytest.raises(CheckpointError, match=f"not whole {kind} blocks of {type_.values}"):
            encode(torch.zeros(shape), kind)


def test_unknown_kinds_and_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot encode 'Q3_K'; it can make F32"):
        encode(torch.zeros(1, 256), "Q3_K")
    with pytest.raises(ValueError, match="cannot encode 'q8_0'"):
        encode(torch.zeros(1, 256), "q8_0")
    with pytest.raises(ValueError, match="float64 values"):
        encode(torch.zeros(1, 256, dtype=torch.float64), "Q8_0")
