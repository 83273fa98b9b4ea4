"""Which type each tensor gets: rules by hand, and llama.cpp's own quantizer on tiny files."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from herd.checkpoint.names import homes, shapes
from herd.errors import ConfigError
from herd.model.config import MoEConfig, irope, plain
from herd.model.presets import find
from herd.quant.encode import ENCODED
from herd.quant.mix import MIXES, mix
from tests.build import DENSE, LLAMA4

TINY = replace(
    DENSE["llama-3"], dim=256, n_heads=8, n_kv_heads=8, head_dim=32, hidden_dim=256, vocab_size=288, layers=plain(9)
)
NARROW = replace(TINY, dim=96, head_dim=12, layers=plain(4))
EXPERTS = replace(
    LLAMA4["llama-4-scout"], dim=256, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512, vocab_size=288,
    layers=irope(8, moe_layers=(1, 3, 5, 7)), moe=MoEConfig(n_experts=4, hidden_dim=256),
)  # fmt: skip
SHAPES = {
    "dense": TINY,
    "shared heads": replace(TINY, n_kv_heads=1),
    "tied": replace(TINY, tie_embeddings=True),
    "32 layers": replace(TINY, layers=plain(32)),
    "80 layers": replace(TINY, layers=plain(80)),
    "80 layers, shared heads": replace(TINY, layers=plain(80), n_kv_heads=1),
    "narrow": NARROW,
    "narrow, tied": replace(NARROW, tie_embeddings=True),
    "experts": EXPERTS,
    "8 experts": replace(EXPERTS, moe=MoEConfig(n_experts=8, hidden_dim=256)),
    "odd experts": replace(EXPERTS, moe=MoEConfig(n_experts=4, hidden_dim=96)),
}


def kinds(name: str, config: Any) -> dict[str, str]:
    """Canonical name -> type."""
    return {tensor: mix(name).kind(tensor, shape, config).kind for tensor, shape in shapes(config).items()}


def test_file_types_have_the_ids_and_names_of_the_gguf_package() -> None:
    for m in MIXES.values():
        theirs = "ALL_F32" if m.name == "F32" else f"MOSTLY_{m.name}"
        assert gguf.LlamaFileType[theirs] == m.file_type
        assert m.base in ENCODED


def test_llama_3_8b_as_q4_k_m() -> None:
    found = kinds("q4_k_m", find("llama-3.1-8b").config)
    more = [i for i in range(32) if found[f"layers.{i}.attention.wv.weight"] == "Q6_K"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert [i for i in range(32) if found[f"layers.{i}.feed_forward.w2.weight"] == "Q6_K"] == more
    # as in published files of this model: 33 tensors of Q6_K, 193 of Q4_K, 65 norms (and rope_freqs) in F32
    assert Counter(found.values()) == {"Q4_K": 193, "Q6_K": 33, "F32": 65}


def test_llama_3_70b_keeps_more_of_its_shared_values() -> None:
    found = kinds("Q4_K_M", find("llama-3.1-70b").config)
    assert {found[f"layers.{i}.attention.wv.weight"] for i in range(80)} == {"Q5_K", "Q6_K"}
    assert found["layers.12.attention.wv.weight"] == "Q6_K"
    assert found["layers.11.attention.wv.weight"] == "Q5_K"


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_vectors_and_routers_stay_f32_and_everything_fits(name: str, shape: str) -> None:
    config = SHAPES[shape]
    for tensor, extent in shapes(config).items():
        choice = mix(name).kind(tensor, extent, config)
        assert choice.kind in ENCODED
        if len(extent) == 1 or "router" in tensor:
            assert choice.kind == "F32"
        blocks = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[choice.kind]][0]
        assert extent[-1] % blocks == 0
        if not extent[-1] % 256:
            assert choice.note is None


def test_rows_that_are_no_whole_blocks_are_said() -> None:
    config = replace(TINY, hidden_dim=704)
    choice = mix("q4_k_m").kind("layers.4.feed_forward.w2.weight", (256, 704), config)
    assert choice.kind == "Q5_0"
    assert choice.note == "rows of 704 values are not whole Q4_K blocks of 256; stored as Q5_0, as llama.cpp does"
    assert mix("q4_k_m").kind("layers.0.feed_forward.w2.weight", (256, 704), config).kind == "Q8_0"
    assert mix("q5_k_s").kind("layers.4.feed_forward.w2.weight", (256, 704), config).kind == "Q5_1"
    assert mix("q4_k_s").kind("layers.4.feed_forward.w2.weight", (256, 100), config).kind == "F16"
    refused = mix("q8_0").kind("layers.4.feed_forward.w2.weight", (256, 100), config)
    assert refused.kind == "F16"
    assert "llama.cpp refuses" in str(refused.note)
    assert mix("q8_0").kind("layers.4.feed_forward.w2.weight", (256, 704), config).note is None


def test_names_in_any_case_and_unknown_ones() -> None:
    assert mix("q4_k_m") is mix("Q4_K") is MIXES["Q4_K_M"]
    assert mix("Q5_k") is MIXES["Q5_K_M"]
    with pytest.raises(ConfigError, match="no quantization is called 'q3_k_m'; choose one of f32, f16, bf16, q4_0"):
        mix("q3_k_m")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, m in MIXES.items() if m.quantized])
@pytest.mark.parametrize("shape", SHAPES)
def test_types_equal_those_of_llama_cpps_quantizer(name: str, shape: str, tmp_path: Path) -> None:
    llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    config = SHAPES[shape]
    places = homes(config, "gguf")
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    write_zeros(source, config)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = MIXES[name].file_type, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    reader = gguf.GGUFReader(target)
    assert int(reader.fields["general.file_type"].contents()) == MIXES[name].file_type
    theirs = {t.name: t.tensor_type.name for t in reader.tensors}
    assert {places[tensor].name: kind for tensor, kind in kinds(name, config).items()} == theirs


def write_zeros(path: Path, config: Any) -> None:
    """A GGUF file of this geometry without vocabulary: enough for llama.cpp's quantizer."""
    arch = "llama" if config.moe is None else "llama4"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(256)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    if config.moe is not None:
        writer.add_expert_count(config.moe.n_experts)
        writer.add_expert_used_count(1)
        writer.add_expert_feed_forward_length(config.moe.hidden_dim)
        writer.add_interleave_moe_layer_step(2)
    for tensor, home in homes(config, "gguf").items():
        shape = shapes(config)[tensor]
        dtype = np.float32 if len(shape) == 1 or "router" in tensor else np.float16
        writer.add_tensor(home.name, np.zeros(shape, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
