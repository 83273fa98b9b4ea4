"""Hugging Face folders written by transformers load to the same weights and give the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4Config, Llama4ForConditionalGeneration

from herd.chat.params import SamplingParams
from herd.checkpoint.fill import fill
from herd.checkpoint.hf import HFStore
from herd.checkpoint.inspect import inspect
from herd.checkpoint.open import open_store
from herd.checkpoint.store import GenerationDefaults
from tests.build import TINY, build, tiny, tokens
from tests.checkpoint.folders import save_bin, write_hf
from tests.parity.oracles import hf_logits

Measured = Callable[[str, str, float], None]

TABLE = "checkpoints: fp32 logits against transformers, max abs difference"


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


@pytest.mark.parametrize("name", TINY)
def test_logits_equal(tmp_path: Path, name: str, measured: Measured) -> None:
    """Single and sharded safetensors; the config that is read equals the one that was written."""
    model = build(name)
    hf = write_hf(tmp_path / "one", model)
    write_hf(tmp_path / "many", model, shard_size="60KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    ids = tokens(model.config, 40, batch=2)
    for folder in ("one", "many"):
        store = open_store(tmp_path / folder)
        assert store.kind == "hf"
        loaded = fill(store)
        if name != "llama-guard-4":  # the oracle needs some chunk size for a model without chunks
            assert loaded.config == model.config
        worst = float((loaded(ids) - hf_logits(hf, ids)).abs().max())
        measured(TABLE, f"Hugging Face, {name}", worst)
        assert worst <= 1e-5


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["llama-2", "llama-3.2", "llama-4-maverick"])
def test_pytorch_bin(tmp_path: Path, name: str, shards: int) -> None:
    model = build(name)
    hf = save_bin(tmp_path, model, shards)
    loaded = fill(open_store(tmp_path))
    ids = tokens(model.config, 12)
    assert (loaded(ids) - hf_logits(hf, ids)).abs().max() <= 1e-5


def test_vision_checkpoint_loads_its_text_half(tmp_path: Path) -> None:
    model = build("llama-4-scout")
    text = write_hf(tmp_path / "text", model)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision |= {"vision_output_dim": 32, "image_size": 28, "projector_input_dim": 32, "projector_output_dim": 32}
    whole = Llama4ForConditionalGeneration(Llama4Config(text_config=text.config.to_dict(), vision_config=vision))
    whole.language_model.load_state_dict(text.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    with pytest.warns(UserWarning, match="text model only; 26 tensors of multi_modal_projector, vision_model"):
        loaded = fill(open_store(tmp_path / "whole"))
    ids = tokens(model.config, 40)
    assert (loaded(ids) - hf_logits(text, ids)).abs().max() <= 1e-5
    assert loaded.config == model.config


def test_older_config_spellings(tmp_path: Path) -> None:
    """transformers 4: rope_theta and rope_scaling at the top level, "type" for "rope_type", torch_dtype."""
    model = build("llama-3.1")
    write_hf(tmp_path, model)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    for key in ("rope_type", "type"):
        edit(
            tmp_path / "config.json",
            rope_parameters=None,
            rope_theta=500_000.0,
            rope_scaling=scaling | {key: "llama3"},
            dtype=None,
            torch_dtype="float32",
            head_dim=None,
        )
        assert HFStore(tmp_path).config == model.config


def test_old_rotary_tables_are_ignored(tmp_path: Path) -> None:
    model = build("llama-2")
    write_hf(tmp_path, model)
    state = load_file(tmp_path / "model.safetensors")
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(fill(HFStore(tmp_path)).norm.weight, model.norm.weight)


def test_tied_output_may_be_stored_twice(tmp_path: Path) -> None:
    model = build("llama-3.2")
    write_hf(tmp_path, model)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, file)
    assert fill(HFStore(tmp_path)).output.weight is not None
    state["lm_head.weight"][5, 3] += 1  # one number
    save_file(state, file)
    with pytest.raises(ValueError, match=r"lm_head\.weight.*differs from the embedding"):
        HFStore(tmp_path)


def test_headers_alone_compare_samples_of_a_tied_output(tmp_path: Path) -> None:
    write_hf(tmp_path, build(replace(tiny("llama-3.2"), vocab_size=4000)))
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    embedding = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = embedding.clone()
    save_file(state, file)
    assert inspect(tmp_path).findings[-1].text.startswith("lm_head.weight repeats the embedding")
    state["lm_head.weight"][200, 3] += 1  # between two samples
    save_file(state, file)
    assert HFStore(tmp_path, headers_only=True).sampled == ("lm_head.weight",)
    state["lm_head.weight"] = torch.randn_like(embedding)
    save_file(state, file)
    with pytest.raises(ValueError, match="differs from the embedding"):
        HFStore(tmp_path, headers_only=True)


def test_weights_are_views_and_the_rest_is_cast(tmp_path: Path) -> None:
    model = build("llama-3.2")
    write_hf(tmp_path, model)
    store = HFStore(tmp_path)
    loaded = fill(store)
    assert loaded.output.weight is loaded.tok_embeddings.weight
    assert not any(p.requires_grad for p in loaded.parameters())
    for name in (
        "tok_embeddings.weight",
        "layers.0.attention.wv.weight",
        "layers.1.feed_forward.w2.weight",
        "norm.weight",
    ):
        assert loaded.get_parameter(name).data_ptr() == store.read(name).data_ptr(), name
    half = fill(store, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.output.weight is half.tok_embeddings.weight
    assert half.rope.inv_freq.dtype == torch.float32
    assert torch.equal(half.norm.weight, model.norm.weight.bfloat16())
    loaded.norm.weight.zero_()  # private: the file keeps its bytes
    assert torch.equal(fill(HFStore(tmp_path)).norm.weight, model.norm.weight)


def test_generation_defaults(tmp_path: Path) -> None:
    write_hf(tmp_path, build("llama-3"))
    file = tmp_path / "generation_config.json"
    file.write_text(
        '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128009], "bos_token_id": 128000,'
        ' "max_length": 8192, "num_beams": 1, "min_p": 0.05, "repetition_penalty": 1.2, "max_new_tokens": 7,'
        ' "typical_p": 1.0, "cache_implementation": "static", "suppress_tokens": [], "transformers_version": "4.31.0"}'
    )
    found = HFStore(tmp_path).generation
    assert (found.temperature, found.top_p, found.top_k) == (0.6, 0.9, None)
    assert found.stop_ids == {128001, 128009}
    assert (found.min_p, found.repetition_penalty, found.max_tokens, found.extra) == (0.05, 1.2, 7, {})
    chosen = found.params(temperature=1.5, seed=3)
    assert chosen == SamplingParams(
        temperature=1.5, top_p=0.9, min_p=0.05, repetition_penalty=1.2, max_tokens=7, seed=3, stop_ids=found.stop_ids
    )
    assert GenerationDefaults().params() == SamplingParams()
    file.write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 7}')
    found = HFStore(tmp_path).generation
    assert (found.temperature, found.stop_ids) == (0.0, {7})
    file.write_text('{"max_length": 4096, "typical_p": 0.5, "no_repeat_ngram_size": 3, "new_key": 1, "num_beams": 1}')
    with pytest.warns(
        UserWarning, match=r"generation_config\.json: not honoured: 'max_length': 4096, 'new_key': 1"
    ) as said:
        found = HFStore(tmp_path).generation
    assert len(said) == 1
    assert found.extra == {"max_length": 4096, "typical_p": 0.5, "no_repeat_ngram_size": 3, "new_key": 1}
    file.unlink()
    edit(tmp_path / "config.json", eos_token_id=5)
    assert HFStore(tmp_path).generation.stop_ids == {5}
    for wrong in (
        '{"temperature": "hot"}',
        '{"top_p": 2}',
        '{"top_p": 0}',
        '{"max_new_tokens": 0}',
        '{"min_p": "x"}',
        '{"top_k": -1}',
        '{"eos_token_id": ["x"]}',
        "[]",
        "{",
    ):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"generation_config\.json"):
            HFStore(tmp_path)


def test_one_file_of_a_folder(tmp_path: Path) -> None:
    """A shard, an index, the weights or the config stand for their folder."""
    model = build("llama-3")
    write_hf(tmp_path, model, shard_size="60KB")
    shard = next(tmp_path.glob("model-00002-of-*.safetensors"))
    for file in (shard, tmp_path / "model.safetensors.index.json", tmp_path / "config.json"):
        assert set(open_store(file).names()) == set(model.state_dict())
