"""config.json: every released config is read to the catalog's numbers, what herd cannot honour is refused by key."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from herd.checkpoint.hf import HFStore
from herd.errors import ConfigError
from herd.model.config import RopeScaling, Temper
from tests.checkpoint.hf_configs import DENSE, TEXT4, read, text4


def test_llama_31() -> None:
    config = read(DENSE)
    assert (config.dim, config.n_heads, config.n_kv_heads, config.head_dim) == (4096, 32, 8, 128)
    assert (config.hidden_dim, config.vocab_size, config.n_layers, config.max_seq_len) == (14336, 128256, 32, 131072)
    assert config.rope_scaling == RopeScaling(factor=8.0)


def test_defaults_of_the_oldest_configs() -> None:
    """Llama 1 and 2: no rope_theta, no key/value heads, no head_dim; epsilon 1e-6 when absent."""
    bare = {key: DENSE[key] for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size")}
    config = read(bare | {"num_hidden_layers": 2, "num_attention_heads": 32, "rope_scaling": None})
    assert (config.n_kv_heads, config.head_dim, config.rope_theta) == (32, 128, 10_000.0)
    assert (config.norm_eps, config.rope_scaling, config.max_seq_len, config.tie_embeddings) == (
        1e-6,
        None,
        2048,
        False,
    )


def test_parameters_win_over_the_old_spelling() -> None:
    """transformers 5 files carry rope_parameters; a stray rope_theta beside it is not the one in use."""
    new = {"rope_type": "default", "rope_theta": 7.0}
    config = read(DENSE | {"rope_parameters": new})
    assert (config.rope_theta, config.rope_scaling) == (7.0, None)


def test_llama4_flags() -> None:
    scout = text4()
    assert [spec.placement for spec in scout.layers[:4]] == ["rope_norm"] * 3 + ["tempered"]
    assert [spec.chunk for spec in scout.layers[:4]] == [8192] * 3 + [None]
    assert all(spec.moe for spec in scout.layers)
    assert scout.temper == Temper()
    assert [s.placement for s in text4(no_rope_layers=None).layers] == [s.placement for s in scout.layers]
    maverick = text4(interleave_moe_layer_step=2, use_qk_norm=False, num_local_experts=128)
    assert [spec.moe for spec in maverick.layers[:4]] == [False, True, False, True]
    assert maverick.layers[0].placement == "rope"
    assert maverick.moe is not None
    assert maverick.moe.n_experts == 128
    assert text4(moe_layers=[5], interleave_moe_layer_step=1).layers[5].moe
    guard = text4(moe_layers=[], attention_chunk_size=None)
    assert guard.moe is None
    assert not any(spec.chunk for spec in guard.layers)
    for off in (False, 0, None):
        expected = "tempered" if off is None else "none"  # absent means on
        assert text4(attn_temperature_tuning=off).layers[3].placement == expected
    listed = text4(no_rope_layers=[0, 1] * 24)
    assert [spec.placement for spec in listed.layers[:2]] == ["tempered", "rope_norm"]
    assert [spec.chunk for spec in listed.layers[:2]] == [None, 8192]
    kinds = text4(layer_types=["full_attention"] * 47 + ["chunked_attention"])
    assert [spec.chunk for spec in kinds.layers] == [None] * 47 + [8192]


CANNOT = [
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters.rope_type"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
    ({"model_type": "mistral"}, "model_type"),
    ({"model_type": "qwen2"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"model_type": "mllama"}, "not runnable yet"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ({"architectures": ["MistralForCausalLM"]}, "architectures"),
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"layer_types": ["full_attention"] * 31 + ["sliding_attention"]}, "layer_types"),
    ({"layer_types": "full_attention"}, "layer_types"),
    ({"rope_parameters": {"rope_type": "default", "attention_factor": 2.0}}, "rope_parameters.attention_factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"logit_scale": 2.0}, "logit_scale"),
    ({"logits_scaling": 8.0}, "logits_scaling"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ({"attention_multiplier": 0.1}, "attention_multiplier"),
    ({"residual_multiplier": 0.2}, "residual_multiplier"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
]


@pytest.mark.parametrize(("change", "key"), CANNOT)
def test_what_cannot_be_honoured_is_named(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        read(DENSE | change)
    assert "config.json" in str(caught.value)


DEEP = "[" * 10_000 + "]" * 10_000
VALUES: list[Any] = [0, -1, -(2**63), 10**9, 2**63, 10**40, 1.5, True, "8", "", "x" * 1000, [], [1], {}, {"a": 1}]
SIZES = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "intermediate_size",
]
SIZES += ["head_dim", "max_position_embeddings"]
NUMBERS = ["rms_norm_eps", "rope_theta"]
LLAMA4_SIZES = [
    "num_local_experts",
    "num_experts_per_tok",
    "interleave_moe_layer_step",
    "attention_chunk_size",
    "floor_scale",
]


def hostile() -> dict[str, str]:
    """Label -> text of a config that must be refused: 300 and more."""
    found: dict[str, dict[str, Any]] = {}
    for key in SIZES:
        for value in VALUES:
            if not (key == "max_position_embeddings" and value == 10**9):  # a long context costs nothing
                found[f"{key}={value!r:.30}"] = DENSE | {key: value}
    for key in NUMBERS:
        for value in (0, -1, -0.0, 10**400, "1", [], {}, True, "nan"):
            found[f"{key}={value!r:.30}"] = DENSE | {key: value}
    for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        for value in (0, -1, "8", [], None, True):
            found[f"rope {key}={value!r}"] = DENSE | {"rope_scaling": DENSE["rope_scaling"] | {key: value}}
    for key in LLAMA4_SIZES:
        for value in (0, -1, 10**20, 1.5 if key != "floor_scale" else "x", "8", [], {}, True):
            if not (key == "floor_scale" and value == 10**20):
                found[f"llama4 {key}={value!r}"] = {"model_type": "llama4", "text_config": TEXT4 | {key: value}}
    for key in ("no_rope_layers", "moe_layers", "layer_types"):
        for value in (
            7,
            "x",
            {},
            [1] * 3 if key != "moe_layers" else [48],
            ["a"] * 48,
            [-1] * 48,
            [10**30] * 48,
            [[]] * 48,
            [None] * 48,
        ):
            found[f"llama4 {key}={value!r:.40}"] = {"model_type": "llama4", "text_config": TEXT4 | {key: value}}
    for value in (None, 7, "x", [], {}, [TEXT4]):
        found[f"text_config={value!r:.20}"] = {"model_type": "llama4", "text_config": value}
    for key in ("rope_scaling", "rope_parameters", "tie_word_embeddings", "hidden_act", "model_type"):
        for value in ("x", [1], 1.5, [[]]):
            found[f"{key}={value!r}"] = DENSE | {key: value}
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "intermediate_size",
        "model_type",
    ):
        found[f"without {key}"] = {k: v for k, v in DENSE.items() if k != key}
        found[f"10 MB {key}"] = DENSE | {key: "9" * 10_000_000}
    found["heads do not divide"] = DENSE | {"num_attention_heads": 7, "num_key_value_heads": 7}
    found["kv heads do not divide"] = DENSE | {"num_key_value_heads": 5}
    found["odd head_dim"] = DENSE | {"head_dim": 127}
    found["high below low"] = DENSE | {"rope_scaling": DENSE["rope_scaling"] | {"high_freq_factor": 0.5}}
    found["more chosen than experts"] = {"model_type": "llama4", "text_config": TEXT4 | {"num_experts_per_tok": 17}}
    texts = {label: json.dumps(data) for label, data in found.items()}
    good = json.dumps(DENSE)
    texts |= {f"cut at {i}": good[:i] for i in range(0, len(good), 60)}
    texts |= {
        f"top level {text:.10}": text for text in ("[]", "7", "null", '"x"', "{", "", "NaN", DEEP, '{"a":' * 10_000)
    }
    for word in ("NaN", "Infinity", "-Infinity", "9" * 5000, DEEP, '"\\ud800"', "1e999", "01", "+1", "0x10"):
        texts[f"rms_norm_eps {word:.10}"] = good.replace("1e-05", word)
        texts[f"hidden_size {word:.10}"] = good.replace("4096", word)
    texts["deep unknown key"] = good[:-1] + f', "x": {DEEP}}}'
    texts["key twice"] = good[:-1] + ', "hidden_size": 8}'
    return texts


def test_hostile_configs(tmp_path: Path) -> None:
    """Every one is a ConfigError naming the file, in under 0.1 s and before anything is allocated."""
    cases = hostile()
    assert len(cases) > 300
    path = tmp_path / "config.json"
    slowest = 0.0
    for label, text in cases.items():
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        began = time.process_time()
        try:
            HFStore(tmp_path)
            outcome = "accepted"
        except ConfigError as error:
            message = str(error)
            outcome = "" if len(message) < 2000 and "config.json" in message else f"unhelpful: {message[:200]}"
        slowest = max(slowest, time.process_time() - began)
        assert outcome == "", label
    assert slowest < 0.1


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ConfigError, match="UTF-8"):
        HFStore(tmp_path)


def test_large_but_honest_numbers_pass() -> None:
    """405B, a model ten times its size and a context of ten million tokens are not refused."""
    large = {"hidden_size": 65536, "num_attention_heads": 512, "intermediate_size": 212992, "num_hidden_layers": 512}
    config = read(DENSE | large | {"max_position_embeddings": 10_485_760})
    assert math.isclose(config.rope_theta, 5e5)
