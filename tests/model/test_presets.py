"""The catalog: complete, exact, and found under every name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from herd.chat.formats import FORMATS
from herd.errors import UnknownModelError
from herd.model.accounting import active_parameters, parameters
from herd.model.config import ModelConfig, RopeScaling, hidden_dim_of
from herd.model.llama import Llama
from herd.model.presets import RELEASES, find
from herd.model.release import Release

BUILT = [release for release in RELEASES if release.config is not None]


@pytest.fixture(scope="module")
def facts(shared: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    models = json.loads(shared("reference/models.json").read_text())["models"]
    return {model["id"]: model for model in models}


@cache
def counted_parameters(config: ModelConfig) -> int:
    """Built without memory, counted tensor by tensor; several releases have the same geometry."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in Llama(config).parameters())


@pytest.mark.parametrize("release", BUILT, ids=lambda r: r.id)
def test_meta_build_has_the_released_parameters(release: Release) -> None:
    """Exactly what was released, and what accounting says."""
    assert release.config is not None
    counted = counted_parameters(release.config)
    assert counted == parameters(release.config) == release.text_params
    assert active_parameters(release.config) == release.active_params
    vision = release.facts.get("vision", {})
    assert release.total_params == counted + vision.get("parameters", 0) + vision.get("projector_parameters", 0)


def test_every_released_model_is_here(facts: dict[str, dict[str, Any]]) -> None:
    assert {release.id for release in RELEASES} == set(facts)


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.id)
def test_identity_equals_reference(release: Release, facts: dict[str, dict[str, Any]]) -> None:
    fact = facts[release.id]
    assert release.name == fact["name"]
    assert release.generation == fact["generation"]
    assert release.kind == fact["kind"]
    assert release.release_date == fact["release_date"]
    assert list(release.variants) == fact["variants"]
    assert list(release.hf_base) == fact["aliases"]["hf_base"]
    assert list(release.hf_instruct) == fact["aliases"]["hf_instruct"]
    assert list(release.native) == fact["aliases"]["native"]
    assert release.native_shards == fact["native_shards"]
    assert release.total_params == fact["total_params"]
    assert release.active_params == fact["active_params"]
    assert (release.knowledge_cutoff or "") == (fact["knowledge_cutoff"] or "")[:7]
    assert bool(release.unverified) == bool(fact["unverified"])
    context = fact["max_context"]
    if isinstance(context, dict):
        assert (release.base_context, release.max_context) == (context["base"], context["instruct"])
    elif context is not None or release.max_context is None:
        assert release.max_context == context
    else:
        assert any("max_context" in doubt for doubt in release.unverified)


@pytest.mark.parametrize("release", BUILT, ids=lambda r: r.id)
def test_geometry_equals_reference(release: Release, facts: dict[str, dict[str, Any]]) -> None:
    config, fact = release.config, facts[release.id]
    assert config is not None
    moe = fact["moe"]
    if release.kind == "moe":
        assert config.moe is not None
        assert (config.moe.n_experts, config.moe.top_k) == (moe["num_experts"], moe["top_k"])
        assert config.moe.hidden_dim == moe["expert_ffn_dim"]
        step = moe["interleave_moe_layer_step"]
        assert [spec.moe for spec in config.layers] == [(i + 1) % step == 0 for i in range(config.n_layers)]
    else:
        assert config.hidden_dim == fact["ffn_hidden_dim"]
    named = ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "norm_eps", "rope_theta")
    assert {name: getattr(config, name) for name in named} == {name: fact[name] for name in named}
    assert fact["embedding_rows"] == config.vocab_size
    if fact["tied_embeddings"] is not None:
        assert config.tie_embeddings == fact["tied_embeddings"]
    expected = fact["rope_scaling"] or (fact["expected_unverified"] or {}).get("rope_scaling")
    if isinstance(expected, dict):
        assert config.rope_scaling == RopeScaling(
            factor=expected["factor"],
            low_freq_factor=expected["low_freq_factor"],
            high_freq_factor=expected["high_freq_factor"],
            original_max_seq_len=expected["original_max_position_embeddings"],
        )
    elif "rope_scaling" not in " ".join(fact["unverified"]):
        assert config.rope_scaling is None
    four = fact["llama4_attention"]
    if four is not None and four["nope_layer_interval"] is not None:
        assert config.temper is not None
        assert (config.temper.floor_scale, config.temper.attn_scale) == (four["floor_scale"], four["attn_scale"])
        for i, spec in enumerate(config.layers):
            free = (i + 1) % four["nope_layer_interval"] == 0
            assert spec.chunk == (None if free else four["attention_chunk_size"])
            assert spec.placement == ("tempered" if free else "rope_norm" if four["use_qk_norm"] else "rope")


@pytest.mark.parametrize("release", BUILT, ids=lambda r: r.id)
def test_width_follows_metas_rule(release: Release, facts: dict[str, dict[str, Any]]) -> None:
    rule = facts[release.id]["ffn_rule"]
    if rule is None:
        pytest.skip("no rule is known: the width is written in the file")
    config = release.config
    assert config is not None
    width = hidden_dim_of(
        config.dim, multiple_of=rule["multiple_of"], ffn_dim_multiplier=rule.get("ffn_dim_multiplier")
    )
    assert width == config.hidden_dim


def test_numbers_of_what_is_not_built(facts: dict[str, dict[str, Any]]) -> None:
    for release in RELEASES:
        fact = facts[release.id]
        shared_names = set(release.facts) & set(fact)
        for part in ("vision", "encoder"):
            for key, value in release.facts.get(part, {}).items():
                assert "parameters" in key or fact[part][key] == value, (release.id, key)
        for key in shared_names - {"vision", "encoder"}:
            assert fact[key] == release.facts[key], (release.id, key)


def test_text_runs_and_the_rest_says_why_not() -> None:
    for release in RELEASES:
        assert release.runnable == (release.why_not is None)
        if release.runnable:
            assert release.config is not None
            assert release.tokenizer is not None
            assert release.max_context == release.config.max_seq_len
    stopped = {release.id for release in RELEASES if not release.runnable}
    assert stopped == {
        "llama-3.2-11b-vision",
        "llama-3.2-90b-vision",
        "llama-4-behemoth",
        "llama-guard-3-1b-int4",
        "llama-guard-3-11b-vision",
        "prompt-guard-1-86m",
        "prompt-guard-2-86m",
        "prompt-guard-2-22m",
    }


def test_prompt_formats_exist() -> None:
    """A tuned model names the format it was trained with; a model without tuned variants names none."""
    for release in RELEASES:
        tuned = set(release.variants) - {"base", "python"}
        assert (release.chat_format is not None) == (bool(tuned) and release.tokenizer is not None)
        assert release.chat_format is None or release.chat_format in FORMATS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama3.2:1b", "llama-3.2-1b"),
        ("llama3.2", "llama-3.2-3b"),
        ("llama3.1:8b", "llama-3.1-8b"),
        ("llama3.1:8b-instruct-q4_K_M", "llama-3.1-8b"),
        ("llama3.2:1b-text-q8_0", "llama-3.2-1b"),
        ("llama2:13b", "llama-2-13b"),
        ("llama2:13b-chat-fp16", "llama-2-13b"),
        ("codellama:7b-instruct", "code-llama-7b-instruct"),
        ("codellama:7b-code-q4_0", "code-llama-7b"),
        ("codellama", "code-llama-7b-instruct"),
        ("llama3.3:70b", "llama-3.3-70b"),
        ("llama4:scout", "llama-4-scout"),
        ("llama-guard3:8b", "llama-guard-3-8b"),
        ("llama3:latest", "llama-3-8b"),
        ("llama3:instruct", "llama-3-8b"),
        ("library/llama3:70b", "llama-3-70b"),
        ("LLAMA-3.2-1B", "llama-3.2-1b"),
        (" meta-llama/llama-3.2-1b-instruct ", "llama-3.2-1b"),
        ("Llama-3.2-1B-Instruct", "llama-3.2-1b"),
        ("Llama3.2-1B-Instruct:int4-qlora-eo8", "llama-3.2-1b"),
        ("llama 30B", "llama-1-33b"),
        ("Llama 4 Scout", "llama-4-scout"),
    ],
)
def test_find(name: str, expected: str) -> None:
    assert find(name).id == expected


def test_every_own_name_finds_its_release() -> None:
    for release in RELEASES:
        for name in (release.id, release.name, *release.repos, *release.native, *release.tags):
            assert find(name) is release
            assert find(name.upper()) is release


@pytest.mark.parametrize(
    ("name", "near"),
    [("llama3.2:2b", "llama3.2:1b"), ("lama-3.1-8b", "llama-3.1-8b"), ("meta-llama/Llama-3.1-8b-Instuct", "instruct")],
)
def test_unknown_names_say_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        find(name)
    assert name in str(caught.value)
    assert any(near in known for known in caught.value.near)
    assert len({find(known).id for known in caught.value.near}) == len(caught.value.near) <= 3


@pytest.mark.parametrize("name", ["", ":", "   ", "gpt", "x" * 5000, "llama3.2:1b:1b", "\x00"])
def test_hopeless_names_are_refused(name: str) -> None:
    with pytest.raises(UnknownModelError):
        find(name)


def test_opens_without_torch() -> None:
    code = "import sys, herd.model.presets, herd.model.accounting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
