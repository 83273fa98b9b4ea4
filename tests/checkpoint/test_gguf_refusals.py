"""GGUF files whose metadata, tensors and types do not make a Llama: every refusal names the key or tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from herd.checkpoint.gguf_store import GGUFStore
from herd.errors import CheckpointError
from tests.build import DENSE
from tests.checkpoint.gguf_files import GGML, MODELS, WIDE, transformers_model, write_gguf


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        GGUFStore(path)
    assert str(path) in str(caught.value)
    assert caught.value.offset is not None or caught.value.tensor is not None
    return caught.value


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", "qwen2", "herd reads 'llama' and 'llama4'"),
        ("general.architecture", "clip", "vision half"),
        ("general.architecture", "mllama", "not runnable yet"),
        ("general.architecture", ["llama"], "herd reads 'llama'"),
        ("general.type", "adapter", "LoRA adapter"),
        ("general.type", "mmproj", "vision half"),
        ("llama.expert_count", 8, "Mixtral"),
        ("llama.block_count", 0, "whole number of at least 1"),
        ("llama.block_count", 3, "blk.2.attn_norm.weight"),
        ("llama.block_count", 1, "blk.1."),
        ("llama.block_count", 100_000, "no Llama has more than"),
        ("llama.block_count", "2", "whole number"),
        ("llama.block_count", True, "whole number"),
        ("llama.embedding_length", 128, "shape"),
        ("llama.embedding_length", 66, "head_count"),
        ("llama.attention.head_count_kv", 3, "not a multiple"),
        ("llama.attention.head_count_kv", [2, 1], "differs between layers"),
        ("llama.attention.value_length", 8, "head size is 16"),
        ("llama.rope.dimension_count", 8, "head size is 16"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "expected a number"),
        ("llama.attention.layer_norm_rms_epsilon", 0.0, "norm_eps"),
        ("llama.rope.scaling.type", "yarn", "scaling of Llama 3.1 only"),
        ("llama.rope.scale_linear", 2.0, "scaling of Llama 3.1 only"),
        ("llama.rope.freq_base", 10_000.0, "not a Llama 3.1 frequency scaling"),
        ("llama.vocab_size", 385, "has 384 rows"),
        ("llama.feed_forward_length", 1 << 31, "hidden_dim"),
        ("general.sampling.temp", "hot", "expected a number"),
        ("tokenizer.ggml.tokens", ["a", "b"], "the tokenizer does not fit"),
    ],
)
def test_metadata_that_describes_another_model(key: str, value: object, words: str, tmp_path: Path) -> None:
    hf = transformers_model(DENSE["llama-3.1"])
    without = ["llama.attention.key_length"] if value == 66 else []
    path = write_gguf(tmp_path / "tiny.gguf", hf, metadata={key: value}, without=without)
    assert words in str(refusal(path))


def test_per_layer_keys_that_agree(tmp_path: Path) -> None:
    keys = {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [176, 176]}
    path = write_gguf(tmp_path / "tiny.gguf", transformers_model(DENSE["llama-3"]), metadata=keys)
    assert GGUFStore(path).config == DENSE["llama-3"]


@pytest.mark.parametrize("key", ["llama.embedding_length", "llama.block_count", "llama.attention.head_count",
                                 "llama.context_length", "llama.attention.layer_norm_rms_epsilon"])  # fmt: skip
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", transformers_model(DENSE["llama-2"]), without=[key])
    assert f"'{key}' is missing" in str(refusal(path))


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", transformers_model(DENSE["llama-2"]), without=[name])
    assert refusal(path).tensor == name


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("blk.0.attn_q.bias", (64,), "has no such parameter"),
        ("blk.2.attn_norm.weight", (64,), "has no such parameter"),
        ("v.patch_embd.weight", (4, 4), "has no such parameter"),
        ("rope_freqs.weight", (7,), "expected (8,) of type F32"),
    ],
)
def test_an_extra_tensor_is_named(name: str, shape: tuple[int, ...], words: str, tmp_path: Path) -> None:
    path = with_tensor(tmp_path, "llama-2", name, np.ones(shape, dtype=np.float32))
    error = refusal(path)
    assert error.tensor == name
    assert words in str(error)


def test_vision_tensors_in_a_llama_4_file_are_skipped(tmp_path: Path) -> None:
    store = GGUFStore(with_tensor(tmp_path, "llama-4-scout", "v.patch_embd.weight", np.ones((4, 4), dtype=np.float32)))
    assert store.skipped == ("v.patch_embd.weight",)
    assert store.config == MODELS["llama-4-scout"]


def test_rotary_tables_that_are_no_llama_scaling(tmp_path: Path) -> None:
    for table in ([1, 2, 3, 4, 5, 6, 7, 8], [0] * 8, [float("nan")] * 8, [-1] * 8, [8, 1, 1, 1, 1, 1, 1, 1]):
        path = with_tensor(tmp_path, "llama-3", "rope_freqs.weight", np.array(table, dtype=np.float32))
        assert refusal(path).tensor == "rope_freqs.weight"
    ones = with_tensor(tmp_path, "llama-3", "rope_freqs.weight", np.ones(8, dtype=np.float32))
    assert GGUFStore(ones).config.rope_scaling is None


def test_a_llama_31_file_without_its_rotary_table_is_said(tmp_path: Path) -> None:
    """llama.cpp wrote such files until July 2024: they lack the frequency scaling the model was trained with."""
    config = replace(MODELS["llama-3"], max_seq_len=131_072)
    with pytest.warns(UserWarning, match=r"no rope_freqs.weight.*convert it again"):
        assert GGUFStore(write_gguf(tmp_path / "old.gguf", transformers_model(config))).config == config


def with_tensor(folder: Path, model: str, name: str, data: np.ndarray) -> Path:
    """A tiny file of `model` with one tensor more."""
    path = folder / "extra.gguf"
    write = gguf.GGUFWriter.write_header_to_file

    def and_one_more(writer: gguf.GGUFWriter, at: Path | None = None) -> None:
        writer.add_tensor(name, data)
        write(writer, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", and_one_more)
        return write_gguf(path, transformers_model(MODELS[model]))


def test_types_herd_cannot_read_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", transformers_model(WIDE), GGML.IQ4_XS)
    error = refusal(path)
    assert error.tensor == "token_embd.weight"
    assert "type IQ4_XS cannot be read: herd reads F32, F16, Q4_0" in str(error)
