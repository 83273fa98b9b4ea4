"""ModelConfig -> GGUF keys -> the same ModelConfig, and what llama.cpp could not honour is never written quietly."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.checkpoint.gguf import MAX_KEY
from herd.checkpoint.gguf_config import ROPE_TABLE, read_config
from herd.checkpoint.gguf_metadata import Cursor, Metadata
from herd.checkpoint.gguf_own import OWN_KEY
from herd.checkpoint.names import homes, shapes
from herd.checkpoint.write.gguf import encoded_metadata
from herd.checkpoint.write.gguf_config import architecture, config_fields, rope_table
from herd.errors import CheckpointError, ConfigError
from herd.model.config import ModelConfig, MoEConfig, RopeScaling, Temper, irope, plain
from herd.model.presets import RELEASES
from tests.build import DENSE, LLAMA4
from tests.checkpoint.gguf_files import LLAMA_CPP

FILE = Path("tiny.gguf")
CATALOG = {release.id: release.config for release in RELEASES if release.config is not None}
LLAMA_31, SCOUT = DENSE["llama-3.1"], LLAMA_CPP["llama-4-scout as llama.cpp has it"]


def written(config: ModelConfig, **more: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_fields(config, path=FILE, **more)


def read(config: ModelConfig, keys: dict[str, Any], table: np.ndarray | None) -> ModelConfig:
    block = encoded_metadata({"general.architecture": architecture(config)} | keys, FILE)
    metadata = Metadata(Cursor(memoryview(block), FILE), len(keys) + 1, MAX_KEY)
    sizes = shapes(config)
    tensors = {home.name: sizes[name] for name, home in homes(config, "gguf").items()}
    if table is not None:
        tensors[ROPE_TABLE] = table.shape
    return read_config(metadata, tensors, table)


def again(config: ModelConfig, **more: Any) -> ModelConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read(config, written(config, **more), rope_table(config))


@pytest.mark.parametrize("name", CATALOG)
def test_every_release_comes_back_without_a_key_of_our_own(name: str) -> None:
    config = CATALOG[name]
    assert OWN_KEY not in written(config)
    assert again(config) == config


@pytest.mark.parametrize("name", DENSE | LLAMA4 | LLAMA_CPP)
def test_tiny_models_come_back(name: str) -> None:
    config = (DENSE | LLAMA4 | LLAMA_CPP)[name]
    assert again(config, herd_only=name in LLAMA4) == config


def test_the_keys_of_llama_cpps_converter() -> None:
    assert written(LLAMA_31) == {
        "llama.block_count": 2,
        "llama.context_length": 131_072,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 176,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 500_000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.vocab_size": 384,
        "llama.rope.dimension_count": 16,
    }
    keys = written(CATALOG["llama-4-maverick"])
    more = {
        "feed_forward_length": 16_384,
        "expert_feed_forward_length": 8192,
        "expert_count": 128,
        "expert_used_count": 1,
        "interleave_moe_layer_step": 2,
    }
    assert {key: keys[f"llama4.{key}"] for key in more} == more


@settings(max_examples=80, deadline=None)
@given(
    heads=st.integers(1, 12),
    shared=st.integers(1, 4),
    head_dim=st.sampled_from([2, 6, 16, 128, 250]),
    dim=st.integers(1, 5000),
    hidden_dim=st.integers(1, 100_000),
    vocab=st.integers(1, 300_000),
    layers=st.integers(1, 130),
    eps=st.floats(1e-12, 1e-1) | st.sampled_from([1e-5, 1e-6, 9.999999747378752e-06]),
    theta=st.floats(1e2, 1e9) | st.sampled_from([1e4, 5e5, 1e6]),
    context=st.integers(1, 1 << 31),
    tie=st.booleans(),
    scaling=st.none()
    | st.builds(
        lambda factor, low, ratio, original: RopeScaling(
            factor=factor, low_freq_factor=low, high_freq_factor=low * ratio, original_max_seq_len=original
        ),
        st.floats(1, 64) | st.sampled_from([8.0, 16.0, 32.0]),
        st.sampled_from([0.5, 1.0, 2.0]) | st.floats(0.1, 10),
        st.sampled_from([1.0, 4.0, 7.3]),
        st.sampled_from([2048, 8192, 16_384]),
    ),
)
def test_odd_sizes_and_numbers_come_back(
    heads: int, shared: int, head_dim: int, dim: int, hidden_dim: int, vocab: int, layers: int, eps: float, theta: float,
    context: int, tie: bool, scaling: RopeScaling | None,
) -> None:  # fmt: skip
    config = ModelConfig(
        dim=dim,
        n_heads=heads * shared,
        n_kv_heads=heads,
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        vocab_size=vocab,
        layers=plain(layers),
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_seq_len=context,
        tie_embeddings=tie,
    )
    assert again(config) == config


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (
            replace(SCOUT, layers=irope(4, chunk=4096, moe_layers=range(4))),
            "layer 0 has chunk 4096, which is 8192 there",
        ),
        (replace(SCOUT, layers=irope(4, chunk=None, moe_layers=range(4))), "chunk None"),
        (replace(SCOUT, temper=Temper(floor_scale=4096.0)), "query temperature"),
        (replace(SCOUT, layers=irope(4, moe_layers=range(4), temper=False)), "layer 3 has placement none"),
        (replace(SCOUT, layers=irope(4, moe_layers=range(4), qk_norm=False)), "placement rope, which is rope_norm"),
        (replace(SCOUT, layers=irope(4, moe_layers=range(4), nope=[0])), "layer 0 has placement tempered"),
        (replace(SCOUT, layers=irope(4, moe_layers=[0, 3])), "layer 1 has moe False, which is True there"),
        (replace(SCOUT, moe=MoEConfig(n_experts=128, hidden_dim=32)), "placement rope_norm, which is rope there"),
    ],
    ids=["chunk", "no chunk", "temperature", "no temperature", "no norm", "order", "experts", "maverick with norm"],
)
def test_what_llama_cpp_has_as_constants_is_refused_or_said(config: ModelConfig, what: str) -> None:
    with pytest.raises(ConfigError, match=r"llama\.cpp would run another one") as error:
        config_fields(config, path=FILE)
    assert what in str(error.value)
    with pytest.warns(UserWarning, match=r"only herd reads this file rightly.*herd\.config"):
        keys = config_fields(config, path=FILE, herd_only=True)
    assert read(config, keys, rope_table(config)) == config


def test_llama_4_without_experts_is_for_herd() -> None:
    with pytest.warns(UserWarning, match=r"llama\.cpp does not run a Llama 4 without experts"):
        config_fields(CATALOG["llama-guard-4-12b"], path=FILE)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (7, "expected JSON text"),
        ("[]", "object"),
        ("{", "JSON"),
        ('{"dim": 3}', "unknown entry 'dim'"),
        ('{"norm_eps": "a"}', "norm_eps"),
        ('{"norm_eps": -1}', "norm_eps"),
        ('{"rope_scaling": {"factor": 8}}', "rope_scaling"),
        ('{"rope_scaling": null}', "not those of the scaling"),
        (json.dumps({"rope_scaling": asdict(RopeScaling(factor=9.0))}), "not those of the scaling"),
        ('{"temper": [1]}', "temper"),
        ('{"layers": 3}', "layers"),
        ('{"layers": [["rope", null, false]]}', "1 layers, but block_count is 2"),
        ('{"layers": [["rope", null], ["rope", null]]}', "a layer is"),
        ('{"layers": [["rope", null, false], ["turn", null, false]]}', "turn"),
        ('{"layers": [["rope", -1, false], ["rope", null, false]]}', "chunk"),
        ('{"layers": [["rope", null, true], ["rope", null, false]]}', "moe"),
        ('{"layers": [["tempered", null, false], ["rope", null, false]]}', "temper"),
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_key_of_our_own_is_refused(value: object, why: str) -> None:
    keys = written(LLAMA_31) | {OWN_KEY: value}
    with pytest.raises(CheckpointError, match=why):
        read(LLAMA_31, keys, rope_table(LLAMA_31))
