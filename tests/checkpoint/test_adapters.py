"""LoRA adapters from PEFT and GGUF files: what PEFT saves is read, what herd writes PEFT loads, and all is the same change."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from herd.adapters.lora import Factors, LoraAdapter
from herd.checkpoint.gguf import GGUFFile
from herd.checkpoint.gguf_lora import read_gguf_lora, write_gguf_lora
from herd.checkpoint.peft import read_peft, write_peft
from herd.errors import CheckpointError, ConfigError
from herd.model.llama import Llama
from tests.build import build, tokens
from tests.checkpoint.folders import oracle

# PEFT asks transformers under a name that is going away; nothing in herd can change it.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LOGITS = 1e-5
"""Largest difference of float32 logits of order one, W + scale * B A computed in another order."""

ROUNDED = 2.0**-22
"""Relative: a scale multiplied into B is two roundings to float32."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

SETTINGS: dict[str, dict[str, Any]] = {
    "queries and values": {"target_modules": ["q_proj", "v_proj"]},
    "every matrix": {"target_modules": LINEAR, "lora_alpha": 32},
    "a pattern": {"target_modules": r".*\.self_attn\.(q|k)_proj"},
    "one layer": {"target_modules": LINEAR, "layers_to_transform": [1]},
    "rank-stabilised": {"target_modules": ATTENTION, "use_rslora": True},
    "own ranks and alphas": {
        "target_modules": ATTENTION,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 8},
        "alpha_pattern": {"k_proj": 3, "model.layers.0.self_attn.o_proj": 5.5},
    },
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole output": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "dora of an embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "use_rslora": True},
}


def saved_by_peft(folder: Path, model: Llama, seed: int = 3, **settings: Any) -> Any:
    """PEFT's model with random factors, saved to `folder`."""
    config = peft.LoraConfig(r=4, **({"lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings))
    made = peft.get_peft_model(oracle(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "magnitude" in name:
                weight.mul_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
            elif "lora_" in name or "modules_to_save" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    with warnings.catch_warnings():  # the base has no name to look up
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return made.eval()


def with_adapter(model: Llama, adapter: LoraAdapter) -> Llama:
    """W + scale * B A in herd's own model, in place."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in [*adapter.whole, *adapter.factors]:
            weights[name].copy_(adapter.merged(name, weights[name]))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        ids = tokens(build("llama-3").config, 24)
        return model(ids) if isinstance(model, Llama) else model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *(("llama-3", settings) for settings in SETTINGS),
        ("llama-2", "every matrix"),
        *(
            pytest.param("llama-2", settings, marks=pytest.mark.slow)
            for settings in SETTINGS
            if settings != "every matrix"
        ),
    ],
)
def test_an_adapter_saved_by_peft_gives_the_same_logits(name: str, settings: str, tmp_path: Path) -> None:
    model = build(name)
    ids = tokens(model.config, 24)
    theirs = saved_by_peft(tmp_path, model, **SETTINGS[settings])
    adapter = read_peft(tmp_path, model.config)
    with torch.no_grad():
        plain = model(ids)
        expected = theirs(input_ids=ids).logits
        found = with_adapter(model, adapter)(ids)
    assert (found - expected).abs().max() <= LOGITS
    assert (plain - expected).abs().max() > 100 * LOGITS, "the adapter does something"


@pytest.mark.parametrize("settings", SETTINGS)
def test_peft_loads_what_is_written(settings: str, tmp_path: Path) -> None:
    model = build("llama-3")
    saved_by_peft(tmp_path / "theirs", model, **SETTINGS[settings])
    adapter = read_peft(tmp_path / "theirs", model.config)
    (tmp_path / "ours").mkdir()
    write_peft(adapter, tmp_path / "ours", model.config, lambda _: None)
    loaded = peft.PeftModel.from_pretrained(oracle(model), tmp_path / "ours").eval()
    assert (logits(loaded) - logits(with_adapter(model, adapter))).abs().max() <= LOGITS
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["llama-4-scout", "llama-guard-4"])
def test_llama4_attention_is_not_paired_again(name: str, tmp_path: Path) -> None:
    model = build(name)
    ids = tokens(model.config, 24)
    theirs = saved_by_peft(tmp_path, model, target_modules=ATTENTION)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        found = with_adapter(model, read_peft(tmp_path, model.config))(ids)
    assert (found - expected).abs().max() <= LOGITS


@pytest.mark.parametrize(
    "settings", [s for s in SETTINGS if "whole" not in s and "embedding" not in s and "dora" not in s]
)
def test_through_gguf_and_back(settings: str, tmp_path: Path) -> None:
    model = build("llama-3")
    saved_by_peft(tmp_path, model, **SETTINGS[settings])
    adapter = read_peft(tmp_path, model.config)
    write_gguf_lora(adapter, tmp_path / "lora.gguf", model.config, lambda _: None)
    back = read_gguf_lora(tmp_path / "lora.gguf", model.config)
    assert back.factors.keys() == adapter.factors.keys()
    for key in adapter.factors:
        expected = adapter.delta(key, torch.float64)
        assert (back.delta(key, torch.float64) - expected).abs().max() <= ROUNDED * expected.abs().max()
    if "own" not in settings:
        assert all(torch.equal(back.factors[key].b, adapter.factors[key].b) for key in adapter.factors)


def test_the_embedding_lies_the_other_way_in_gguf(tmp_path: Path) -> None:
    """llama.cpp looks rows of lora_a up and multiplies them with lora_b."""
    config = build("llama-3").config
    pair = Factors(torch.randn(4, config.dim), torch.randn(config.vocab_size, 4), 4.0)
    adapter = LoraAdapter({"tok_embeddings.weight": pair}, 4, 4.0)
    write_gguf_lora(adapter, tmp_path / "lora.gguf", config, lambda _: None)
    entries = GGUFFile(tmp_path / "lora.gguf").entries
    assert entries["token_embd.weight.lora_a"].shape == (config.vocab_size, 4)
    assert entries["token_embd.weight.lora_b"].shape == (config.dim, 4)
    back = read_gguf_lora(tmp_path / "lora.gguf", config).factors["tok_embeddings.weight"]
    assert torch.equal(back.a, pair.a)
    assert torch.equal(back.b, pair.b)


def test_the_old_bin_file_is_read_without_running_anything(tmp_path: Path) -> None:
    model = build("llama-3")
    saved_by_peft(tmp_path, model, target_modules=["q_proj"])
    state = load_file(tmp_path / "adapter_model.safetensors")
    expected = read_peft(tmp_path, model.config)
    renamed = {key.replace("lora_A.", "lora_A.default."): value for key, value in state.items()}
    torch.save(renamed, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    found = read_peft(tmp_path, model.config)
    assert all(torch.equal(found.factors[key].b, expected.factors[key].b) for key in expected.factors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", "yes"), ("bias", "all"), ("fan_in_fan_out", True), ("lora_bias", True), ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]), ("target_parameters", "x"), ("use_qalora", True), ("peft_type", "IA3"),
        ("alora_invocation_tokens", [1, 2]), ("init_lora_weights", "pissa_niter_4"), ("invented_later", 7), ("r", 0),
        ("lora_alpha", "8"), ("alpha_pattern", {"(": 4}), ("rank_pattern", {"q_proj": 3}),
    ],
)  # fmt: skip
def test_what_would_change_the_result_is_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    model = build("llama-3")
    saved_by_peft(tmp_path, model, target_modules=["q_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises((ConfigError, CheckpointError), match="rank 4" if key == "rank_pattern" else key):
        read_peft(tmp_path, model.config)


def test_a_pattern_that_never_ends_is_refused(tmp_path: Path) -> None:
    model = build("llama-3")
    saved_by_peft(tmp_path, model, target_modules=["q_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"alpha_pattern": {r"(\w|\w\w|\.|\w\.)+[!=]": 1}})
    )
    with pytest.raises(ConfigError, match="no usable pattern"):
        read_peft(tmp_path, model.config)


@pytest.mark.parametrize("damage", ["lost", "shape", "foreign", "magnitude", "none"])
def test_damaged_tensors_are_named(damage: str, tmp_path: Path) -> None:
    model = build("llama-3")
    saved_by_peft(tmp_path, model, target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    first = "base_model.model.model.layers.0.self_attn.q_proj."
    if damage == "lost":
        del state[first + "lora_B.weight"]
    elif damage == "shape":
        state[first + "lora_B.weight"] = torch.zeros(6, 4)
    elif damage == "foreign":
        state["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)
    elif damage == "magnitude":
        state[first + "lora_magnitude_vector"] = torch.ones(64)
    if damage == "none":
        file.unlink()
    else:
        save_file(state, file)
    told = {
        "lost": "has no lora_B",
        "shape": "q_proj",
        "foreign": "layers.9",
        "magnitude": "use_dora False",
        "none": "neither",
    }
    with pytest.raises(CheckpointError, match=told[damage]):
        read_peft(tmp_path, model.config)


def test_gguf_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    config = build("llama-3.2").config
    pair = Factors(torch.zeros(2, config.dim), torch.zeros(config.vocab_size, 2), 4.0)
    turned = Factors(torch.zeros(2, 64), torch.zeros(64, 2), 4.0, torch.ones(64))
    with pytest.raises(CheckpointError, match=r"wq\.weight.*DoRA"):
        write_gguf_lora(
            LoraAdapter({"layers.0.attention.wq.weight": turned}, 2, 4.0), tmp_path / "d.gguf", config, lambda _: None
        )
    norm = LoraAdapter({}, 2, 4.0, whole={"norm.weight": torch.ones(config.dim)})
    with pytest.raises(CheckpointError, match=r"norm\.weight.*replaced as a whole"):
        write_gguf_lora(norm, tmp_path / "a.gguf", config, lambda _: None)
    with pytest.raises(CheckpointError, match=r"output\.weight.*no such parameter"):  # tied
        write_gguf_lora(LoraAdapter({"output.weight": pair}, 2, 4.0), tmp_path / "b.gguf", config, lambda _: None)


def test_a_gguf_model_is_no_adapter(tmp_path: Path) -> None:
    from tests.checkpoint.gguf_files import write_gguf

    model = build("llama-3")
    path = write_gguf(tmp_path / "model.gguf", oracle(model))
    with pytest.raises(CheckpointError, match=r"general\.type"):
        read_gguf_lora(path, model.config)


def test_a_dora_adapter_without_its_magnitudes_is_refused(tmp_path: Path) -> None:
    model = build("llama-3")
    saved_by_peft(tmp_path, model, target_modules=["q_proj"], use_dora=True)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file({key: value for key, value in state.items() if key != name}, file)
    with pytest.raises(CheckpointError, match="no magnitude"):
        read_peft(tmp_path, model.config)
    save_file(state | {name: torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match="does not fit"):
        read_peft(tmp_path, model.config)
