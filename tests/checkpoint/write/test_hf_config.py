"""config.json: reads back as the same model for every release and for odd ones, and transformers agrees on every field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from herd.checkpoint.generation import read_generation
from herd.checkpoint.hf_config import read_config
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.hf_config import TokenIds, carried_keys, config_json, generation_json, is_dense, same_model
from herd.errors import ConfigError
from herd.model.config import LayerSpec, ModelConfig, RopeScaling, Temper, irope
from herd.model.presets import RELEASES
from tests.build import TINY, tiny

IDS = TokenIds(bos=1, stop=frozenset((5, 2)), pad=0)
RELEASED = {r.id: r.config for r in RELEASES if r.config is not None}

ODD: dict[str, ModelConfig] = {
    "wide heads": replace(tiny("llama-3"), head_dim=40),
    "odd scaling": replace(
        tiny("llama-3.1"),
        rope_scaling=RopeScaling(factor=3.5, low_freq_factor=2.0, high_freq_factor=9.0, original_max_seq_len=77),
    ),
    "odd numbers": replace(
        tiny("llama-2"), norm_eps=3e-7, rope_theta=12345.678, max_seq_len=1000, vocab_size=7, hidden_dim=33
    ),
    "tied llama 4": replace(tiny("llama-4-scout"), tie_embeddings=True),
    "irregular llama 4": replace(
        tiny("llama-4-scout"), layers=irope(5, nope=(0, 3), chunk=7, moe_layers=(1, 4), temper=False)
    ),
    "no position-free layer": replace(tiny("llama-4-scout"), layers=irope(3, nope=(), moe_layers=(2,))),
    "no rotary layer": replace(tiny("llama-4-scout"), layers=irope(2, nope=(0, 1), moe_layers=(0,))),
    "other temper": replace(tiny("llama-4-scout"), temper=Temper(floor_scale=100.0, attn_scale=0.7)),
    "dense with rope norm": replace(tiny("llama-3"), layers=(LayerSpec(placement="rope_norm"),) * 2),
    "temper that nothing uses": replace(tiny("llama-3"), temper=Temper()),
}
ALL = RELEASED | TINY | ODD


@pytest.mark.parametrize("name", ALL)
def test_reads_back_as_the_same_model(name: str) -> None:
    data = json.loads(json.dumps(config_json(ALL[name], IDS, "bfloat16")))
    found = read_config(data, "config.json")
    assert same_model(found.config, ALL[name])
    assert found.column == ("hf" if is_dense(ALL[name]) else "hf4")
    assert found.prefix == ""


def agreed(hf: object, c: ModelConfig) -> None:
    """Every field as transformers holds it after reading, against the config."""
    rope = hf.rope_parameters  # type: ignore[attr-defined]
    assert rope["rope_theta"] == c.rope_theta
    if c.rope_scaling is None:
        assert rope["rope_type"] == "default"
    else:
        assert rope["rope_type"] == "llama3"
        s = c.rope_scaling
        assert (rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]) == (
            s.factor,
            s.low_freq_factor,
            s.high_freq_factor,
        )
        assert rope["original_max_position_embeddings"] == s.original_max_seq_len
    expected = {
        "hidden_size": c.dim,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "num_hidden_layers": c.n_layers,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.max_seq_len,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "pad_token_id": 0,
        "dtype": torch.bfloat16,
    }
    if is_dense(c):
        expected |= {"intermediate_size": c.hidden_dim, "mlp_bias": False, "attention_bias": False}
    else:
        free = [s.placement for s in c.layers if s.placement in ("none", "tempered")]
        expected |= {
            "intermediate_size_mlp": c.hidden_dim,
            "moe_layers": [i for i, s in enumerate(c.layers) if s.moe],
            "no_rope_layers": [int(s.placement in ("rope", "rope_norm")) for s in c.layers],
            "layer_types": ["full_attention" if s.chunk is None else "chunked_attention" for s in c.layers],
        }
        chunks = {s.chunk for s in c.layers} - {None}
        if chunks:
            expected["attention_chunk_size"] = chunks.pop()
        if free:
            expected["attn_temperature_tuning"] = free[0] == "tempered"
        if c.temper:
            expected |= {"floor_scale": c.temper.floor_scale, "attn_scale": c.temper.attn_scale}
        if c.moe:
            expected |= {"intermediate_size": c.moe.hidden_dim, "num_local_experts": c.moe.n_experts}
            expected["num_experts_per_tok"] = c.moe.top_k
    for key, value in expected.items():
        assert getattr(hf, key) == value, key


@pytest.mark.filterwarnings("ignore:.*rope_parameters.*")
@pytest.mark.parametrize("name", ALL)
def test_transformers_agrees(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(ALL[name], IDS, "bfloat16")))
    agreed(AutoConfig.from_pretrained(tmp_path), ALL[name])


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ((LayerSpec(chunk=4), LayerSpec(chunk=8)), "different attention chunks: this model has 4 and 8"),
        ((LayerSpec(), LayerSpec(placement="rope_norm")), "different rotary placements"),
        ((LayerSpec(placement="none"), LayerSpec(placement="tempered")), "different position-free placements"),
    ],
)
def test_what_cannot_be_said_is_refused(layers: tuple[LayerSpec, ...], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config_json(replace(tiny("llama-3"), layers=layers, temper=Temper()), IDS, "float32")


def test_carried_keys() -> None:
    source = {
        "initializer_range": 0.5,
        "hidden_size": 1,
        "rope_parameters": {"rope_type": "linear"},
        "pretraining_tp": 1,
    }
    source |= {
        "quantization_config": {"bits": 4},
        "transformers_version": "4.0",
        "unheard_of": 7,
        "torch_dtype": "float16",
    }
    with pytest.warns(UserWarning, match="unheard_of"):
        data = config_json(tiny("llama-3"), IDS, "bfloat16", carried_keys(source))
    assert data["hidden_size"] == 64
    assert (data["initializer_range"], data["pretraining_tp"], data["unheard_of"]) == (0.5, 1, 7)
    assert not data.keys() & {"quantization_config", "transformers_version", "rope_parameters"}
    assert (data["dtype"], data["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert carried_keys({"text_config": {"a": 1}, "vision_config": {}}) == {"a": 1}


def test_unknown_ids_are_null() -> None:
    data = config_json(tiny("llama-3"), TokenIds(), "float32")
    assert (data["bos_token_id"], data["eos_token_id"]) == (None, None)  # transformers would take 1 and 2
    assert config_json(tiny("llama-3"), TokenIds(stop=frozenset([9])), "float32")["eos_token_id"] == 9


@pytest.mark.parametrize(
    "defaults",
    [
        GenerationDefaults(stop_ids=IDS.stop),
        GenerationDefaults(stop_ids=IDS.stop, temperature=0.6, top_p=0.9),
        GenerationDefaults(stop_ids=IDS.stop, temperature=0.0),
        GenerationDefaults(stop_ids=IDS.stop, top_k=5, min_p=0.1, repetition_penalty=1.2, max_tokens=9),
    ],
)
def test_generation_reads_back(defaults: GenerationDefaults, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation_json(defaults, IDS)))
    assert read_generation(tmp_path, {}) == defaults
    theirs = GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, [2, 5], 0)
    assert bool(theirs.do_sample) == (defaults.temperature != 0 and (defaults.top_p or defaults.top_k) is not None)
