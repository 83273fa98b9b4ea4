"""Keys of config.json: what changes nothing is silent, what is not known is said once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Llama4Config, Llama4TextConfig, LlamaConfig

from tests.checkpoint.hf_configs import DENSE, read, text4

NEUTRAL = [
    {"sliding_window": None},
    {"logit_scale": 1.0, "embedding_multiplier": 1, "residual_multiplier": 1.0, "final_logit_softcapping": None},
    {"layer_types": ["full_attention"] * 32},
    {"pretraining_tp": 2},  # another order of the same sums
    {"architectures": None},
    {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "num_beams": 1, "do_sample": False, "prefix": None},
    {"some_new_key": None},
]


@pytest.mark.parametrize("change", NEUTRAL)
def test_what_changes_nothing_is_silent(change: dict[str, Any]) -> None:
    assert read(DENSE | change) == read(DENSE)


def test_unknown_keys_are_said_once() -> None:
    with pytest.warns(UserWarning, match=r"config\.json: unknown keys are ignored: newer_key, newest_key$") as said:
        assert read(DENSE | {"newest_key": 1, "newer_key": False}) == read(DENSE)
    assert len(said) == 1
    scaling = DENSE["rope_scaling"] | {"beta_fast": 32}
    with pytest.warns(UserWarning, match=r"unknown keys are ignored: rope_scaling\.beta_fast$"):
        read(DENSE | {"rope_scaling": scaling})
    with pytest.warns(UserWarning, match=r"unknown keys are ignored: text_config\.new, text_config\.top_k$"):
        text4(new=7, top_k=10, top_p=1.0)
    with pytest.warns(UserWarning, match=r"unknown keys are ignored: num_local_experts, use_qk_norm$"):
        read(DENSE | {"use_qk_norm": True, "num_local_experts": 8})  # Llama 4's, in a dense model


RELEASED = [
    # Llama 1 (transformers 4.28), Llama 2, Code Llama, 3, 3.1, 3.2, as they are on the hub beside the numbers
    {"architectures": ["LLaMAForCausalLM"], "initializer_range": 0.02, "max_sequence_length": 2048, "use_cache": True}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.28.0.dev0"},
    {"_name_or_path": "meta-llama/Llama-2-7b-hf", "pretraining_tp": 1, "rope_scaling": None, "torch_dtype": "float16"},
    {"max_length": 4096, "pad_token_id": 0, "transformers_version": "4.31.0.dev0"},
    {"attention_dropout": 0.0, "pretraining_tp": 1, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0"},
    {"mlp_bias": False, "head_dim": 128, "use_cache": True, "transformers_version": "4.45.0.dev0"},
    {"dtype": "bfloat16", "unsloth_fixed": True, "pad_token_id": 128004},
]


@pytest.mark.parametrize("keys", RELEASED)
def test_released_configs_are_silent(keys: dict[str, Any]) -> None:
    read(DENSE | keys)


ROPES = {
    "1": {"rope_type": "default", "rope_theta": 10_000.0},
    "3": {"rope_type": "default", "rope_theta": 500_000.0},
    "3.1": {"rope_theta": 500_000.0, **DENSE["rope_scaling"]},
}


@pytest.mark.parametrize("whole", [True, False], ids=["every key", "what is saved"])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_configs_of_transformers_are_silent(rope: dict[str, Any], whole: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    written = LlamaConfig(**sizes, num_key_value_heads=2, rope_parameters=rope, architectures=["LlamaForCausalLM"])
    written.save_pretrained(tmp_path)
    data = written.to_dict() if whole else json.loads((tmp_path / "config.json").read_text())
    assert read(data).rope_theta == rope["rope_theta"]


@pytest.mark.parametrize("whole", [True, False], ids=["every key", "what is saved"])
def test_llama4_configs_of_transformers_are_silent(whole: bool, tmp_path: Path) -> None:
    text = Llama4TextConfig(num_hidden_layers=8)
    both = Llama4Config(text_config=text, architectures=["Llama4ForConditionalGeneration"])
    for written in (text, both):
        written.save_pretrained(tmp_path)
        data = written.to_dict() if whole else json.loads((tmp_path / "config.json").read_text())
        assert read(data).n_layers == 8
