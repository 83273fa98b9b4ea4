"""params.json of every released native checkpoint is read to the catalog's config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from herd.checkpoint.meta_config import read_params
from herd.errors import ConfigError
from herd.model.config import RopeScaling
from herd.model.presets import RELEASES

NATIVE = [release.id for release in RELEASES if release.config is not None and release.native]


def params(fact: dict[str, Any], scaled: bool) -> dict[str, Any]:
    """params.json as the release has it, from the facts about it."""
    rule = fact["ffn_rule"]
    data = {"dim": fact["dim"], "n_layers": fact["n_layers"], "n_heads": fact["n_heads"], "norm_eps": fact["norm_eps"]}
    data |= {"vocab_size": fact["vocab_size"], "multiple_of": rule["multiple_of"]}
    if rule["ffn_dim_multiplier"] is not None:
        data["ffn_dim_multiplier"] = rule["ffn_dim_multiplier"]
    if fact["n_kv_heads"] != fact["n_heads"]:
        data["n_kv_heads"] = fact["n_kv_heads"]
    if fact["rope_theta"] != 10_000:
        data["rope_theta"] = fact["rope_theta"]
    if fact["generation"] in ("1", "2", "code"):
        data["vocab_size"] = -1
    if scaled:
        data["use_scaled_rope"] = True
    if fact["generation"] == "4":
        moe = fact["moe"]
        data |= {
            "ffn_exp": rule["ffn_exp"],
            "head_dim": fact["head_dim"],
            "attention_chunk_size": 8192,
            "vision_args": {},
        }
        data |= {"nope_layer_interval": 4, "use_qk_norm": "scout" in fact["id"], "attn_temperature_tuning": True}
        data |= {"floor_scale": 8192.0, "attn_scale": 0.1}
        step = moe["interleave_moe_layer_step"]
        data["moe_args"] = {"num_experts": moe["num_experts"], "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1}
        data["moe_args"]["interleave_moe_layer_step"] = step
    return data


@pytest.mark.parametrize("release", NATIVE)
def test_released_params(release: str, shared: Callable[[str], Path]) -> None:
    facts = json.loads(shared("reference/models.json").read_text())["models"]
    fact = next(f for f in facts if f["id"] == release)
    config = next(r.config for r in RELEASES if r.id == release)
    if fact.get("ffn_rule") is None:
        pytest.skip("its params.json is not known")
    assert config is not None
    found = read_params(
        params(fact, config.rope_scaling is not None),
        "params.json",
        fused=fact["generation"] == "4",
        rows=fact["embedding_rows"],
        output=not config.tie_embeddings,
    )
    assert found == config


BASE = {"dim": 4096, "n_layers": 2, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024}
BASE |= {"ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0}


def read(output: bool = True, **changes: Any):
    return read_params(BASE | changes, "params.json", fused=False, rows=128256, output=output)


def test_scaling_factor_follows_the_width() -> None:
    """Meta's files only say use_scaled_rope; 1B and 3B (2,048 and 3,072 wide) were trained with 32, the others with 8."""
    assert read().rope_scaling is None
    assert read(use_scaled_rope=True).rope_scaling == RopeScaling(factor=8.0)
    assert read(use_scaled_rope=True, dim=2048).rope_scaling == RopeScaling(factor=32.0)
    assert read(use_scaled_rope=True, dim=3072, n_heads=24).rope_scaling == RopeScaling(factor=32.0)
    assert read(use_scaled_rope=True, rope_scaling_factor=16).rope_scaling == RopeScaling(factor=16.0)


def test_an_absent_output_is_tied_only_where_it_was_released_so() -> None:
    assert read(output=False, use_scaled_rope=True, dim=2048).tie_embeddings
    assert not read(output=False, use_scaled_rope=True).tie_embeddings  # 8B: the tensor is missing, and that is said
    assert not read(output=True, use_scaled_rope=True, dim=2048).tie_embeddings
    assert read(output=False, tie_embeddings=True).tie_embeddings


def test_vision_is_refused_by_name() -> None:
    for key, value in (("vision_chunk_size", 560), ("vision_model", {"cross_attention_adapter": {"num_layers": 8}})):
        with pytest.raises(ConfigError, match=key):
            read(**{key: value})
    assert read(vision_chunk_size=-1).n_layers == 2  # Meta's code fills this in for text models
