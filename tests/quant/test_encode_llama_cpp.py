"""Encoded blocks against llama.cpp's own quantizer.

llama-cpp-python has no wheel for every platform and builds for half an hour, so it is not among the test dependencies.
`python -m tests.quant.test_encode_llama_cpp` writes tests/golden/quant_blocks.json, to which test_encode.py holds herd.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from herd.checkpoint.open import open_store
from herd.convert.driver import convert
from herd.quant.bound import bound
from herd.quant.encode import ENCODED, encode
from herd.quant.mix import mix
from herd.quant.scheme import QuantTensor, block_type
from tests.quant.rows import DATA, digest, rows

QUANTIZED = [kind for kind in ENCODED if kind not in ("F32", "F16", "BF16")]
GOLDEN = Path(__file__).parents[1] / "golden" / "quant_blocks.json"
NANO = Path(__file__).parents[2] / "herd" / "embedded" / "nano"


def llama_cpp_blocks(values: torch.Tensor, kind: str, weights: torch.Tensor | None = None) -> torch.Tensor:
    """What llama.cpp makes of `values` [rows, columns] float32; `weights` [columns] is an importance matrix."""
    type_ = block_type(kind)
    assert type_ is not None
    out = torch.empty(len(values), type_.row_bytes(values.shape[1]), dtype=torch.uint8)
    size = _library().ggml_quantize_chunk(
        type_.id,
        values.contiguous().data_ptr(),
        out.data_ptr(),
        0,
        len(values),
        values.shape[1],
        None if weights is None else weights.data_ptr(),
    )
    assert size == out.numel()
    return out


def _library() -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def ours(values: torch.Tensor, kind: str) -> QuantTensor:
    made = encode(values, kind)
    assert isinstance(made, QuantTensor)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("data", DATA)
def test_blocks_equal_llama_cpps(kind: str, data: str) -> None:
    values = rows(data, count=64, columns=4096)
    assert torch.equal(ours(values, kind).blocks, llama_cpp_blocks(values, kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZED)
def test_blocks_of_trained_weights_equal_llama_cpps(kind: str, measured: Callable[[str, str, float], None]) -> None:
    type_ = block_type(kind)
    assert type_ is not None
    store = open_store(NANO)
    for name in store.names():
        values = store.read(name).float()
        if values.dim() < 2 or values.shape[1] % type_.values:
            continue
        mine, theirs = ours(values, kind), QuantTensor(llama_cpp_blocks(values, kind), type_, tuple(values.shape))
        errors = [float((t.dequantize() - values).double().square().sum()) for t in (mine, theirs)]
        assert errors[0] <= errors[1], name
        assert torch.equal(mine.blocks, theirs.blocks), name
        signal = float(values.double().square().sum())
        measured("relative rms error of herd-nano's weights", kind, math.sqrt(errors[0] / signal))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("data", DATA)
def test_blocks_made_with_an_importance_matrix_are_within_their_bound(kind: str, data: str) -> None:
    type_ = block_type(kind)
    assert type_ is not None
    values = rows(data, count=16, columns=4096)
    weights = torch.rand(4096, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-4
    made = QuantTensor(llama_cpp_blocks(values, kind, weights), type_, tuple(values.shape))
    error = (values.double() - made.dequantize().double()).abs()
    assert (error <= bound(values, kind, made, importance=True).double()).all()


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["q4_k_m", "q5_k_s", "q8_0"])
def test_a_quantized_file_has_the_bytes_of_llama_cpps(quant: str, tmp_path: Path) -> None:
    llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    plain, ours_, theirs = (tmp_path / f"{name}.gguf" for name in ("plain", "ours", "theirs"))
    convert(NANO, plain, to="gguf", dtype="f16")
    convert(NANO, ours_, to="gguf", quant=quant)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = mix(quant).file_type, 1
    assert llama_cpp.llama_model_quantize(str(plain).encode(), str(theirs).encode(), params) == 0
    a, b = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (ours_, theirs))
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert tensor.tensor_type == b[name].tensor_type, name
        assert np.array_equal(tensor.data, b[name].data), name


def main() -> None:
    """Write the goldens."""
    made = {
        kind: {data: digest(llama_cpp_blocks(rows(data), kind)) for data in DATA}
        | {"first block of bell": bytes(llama_cpp_blocks(rows("bell"), kind)[0, : _nbytes(kind)].tolist()).hex()}
        for kind in QUANTIZED
    }
    GOLDEN.write_text(json.dumps(made, indent=1) + "\n")


def _nbytes(kind: str) -> int:
    type_ = block_type(kind)
    assert type_ is not None
    return type_.nbytes


if __name__ == "__main__":
    main()
