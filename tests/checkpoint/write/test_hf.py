"""Hugging Face folders written by herd: transformers loads them and computes the original's logits; herd reads them back."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM

from herd.checkpoint.fill import fill
from herd.checkpoint.open import open_store
from herd.checkpoint.store import GenerationDefaults, TensorStore
from herd.checkpoint.write.hf import write_hf
from herd.checkpoint.write.hf_config import TokenIds
from herd.checkpoint.write.model_store import ModelStore
from herd.checkpoint.write.source import Source
from herd.errors import CheckpointError
from herd.model.llama import Llama
from herd.tokenizer.files import load_tokenizer
from herd.tokenizer.write.huggingface import hf_files
from tests.build import TINY, build, tiny, tokens
from tests.checkpoint.folders import meta_shards, oracle, write_meta
from tests.checkpoint.folders import write_hf as by_transformers
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.write.stores import MemoryStore
from tests.parity.oracles import hf_logits

pytestmark = pytest.mark.filterwarnings("ignore:.*rope_parameters.*")


def bare(store: TensorStore, generation: GenerationDefaults | None = None) -> Source:
    return Source(store, None, generation or getattr(store, "generation", GenerationDefaults()), None)


def loaded(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def often(name: str, bin: bool, shards: int) -> bool:
    """Every generation in both formats, whole and in shards, by turns; one generation every way."""
    return name == "llama-3" or shards == (1 if bin == bool(list(TINY).index(name) % 2) else 3)


@pytest.mark.parametrize(
    ("name", "bin", "shards"),
    [
        pytest.param(name, bin, shards, marks=[] if often(name, bin, shards) else pytest.mark.slow)
        for name, bin, shards in product(TINY, (False, True), (1, 2, 3))
    ],
)
def test_transformers_computes_the_same(tmp_path: Path, name: str, bin: bool, shards: int) -> None:
    """Every generation, whole and in shards, safetensors and bin: bit for bit the logits of the original."""
    model = build(name)
    told: list[int] = []
    assert write_hf(bare(ModelStore(model)), tmp_path, shards=shards, bin=bin, tick=told.append)[1:] == []
    assert sum(told) == sum(p.numel() * 4 for p in model.parameters())
    names = {path.name for path in tmp_path.iterdir()} - {"config.json", "generation_config.json"}
    stem, suffix = ("pytorch_model", "bin") if bin else ("model", "safetensors")
    parts = {f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" for i in range(shards)}
    assert names == ({f"{stem}.{suffix}"} if shards == 1 else parts | {f"{stem}.{suffix}.index.json"})
    ids = tokens(model.config, 40, batch=2)
    assert torch.equal(hf_logits(loaded(tmp_path), ids), hf_logits(oracle(model), ids))
    again = fill(open_store(tmp_path))
    for (one, ours), (other, theirs) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert one == other
        assert torch.equal(ours, theirs), one


def test_index(tmp_path: Path) -> None:
    model = build("llama-3")
    write_hf(bare(ModelStore(model)), tmp_path, shards=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    sizes = [p.stat().st_size for p in sorted(tmp_path.glob("model-*"))]
    assert max(sizes) < 1.5 * min(sizes)
    assert index["weight_map"]["model.embed_tokens.weight"].startswith("model-00001")


def test_as_many_shards_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("herd.checkpoint.write.hf.SHARD_BYTES", 200_000)
    model = build("llama-3")
    write_hf(bare(ModelStore(model)), tmp_path)
    total = sum(p.numel() * 4 for p in model.parameters())
    assert len(list(tmp_path.glob("model-*"))) == -(-total // 200_000)
    for count in (0, 100):
        with pytest.raises(CheckpointError, match=f"{count} shards: this model has 21 tensors"):
            write_hf(bare(ModelStore(model)), tmp_path, shards=count)
    write_hf(bare(ModelStore(model)), tmp_path / "most", shards=21)
    assert len(list((tmp_path / "most").glob("model-*.safetensors"))) == 21


@pytest.mark.parametrize("kind", ["hf", "meta", "gguf"])
@pytest.mark.parametrize("name", ["llama-2", "llama-3.2", "llama-4-maverick"])
def test_from_every_format(tmp_path: Path, name: str, kind: str) -> None:
    model = build(name).bfloat16()
    src, dst = tmp_path / "src", tmp_path / "dst"
    if kind == "hf":
        by_transformers(src, model)
    elif kind == "meta":
        write_meta(src, model)
    else:
        src = write_gguf(tmp_path / "model.gguf", oracle(model), GGMLQuantizationType.BF16)
    store = open_store(src)
    write_hf(bare(store), dst)
    copy = open_store(dst)
    assert list(copy.names()) == list(store.names())
    for parameter in copy.names():
        assert copy.info(parameter).stored == "BF16", parameter
        assert torch.equal(copy.read(parameter), model.state_dict()[parameter]), parameter
    assert AutoConfig.from_pretrained(dst).dtype == torch.bfloat16


def test_dtype(tmp_path: Path) -> None:
    model = build("llama-3.1")
    write_hf(bare(ModelStore(model)), tmp_path, dtype=torch.float16)
    store = open_store(tmp_path)
    assert {store.info(name).stored for name in store.names()} == {"F16"}
    assert torch.equal(store.read("norm.weight"), model.norm.weight.half())
    assert loaded(tmp_path).dtype == torch.float16


def test_what_a_folder_said_travels(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "dst"
    by_transformers(src, build("llama-3"))
    config = json.loads((src / "config.json").read_text())
    config |= {"initializer_range": 0.5, "eos_token_id": 7, "pretraining_tp": 1}
    (src / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [7, 8], "temperature": 0.3, "assistant_lookbehind": 3}
    (src / "generation_config.json").write_text(json.dumps(generation))
    (src / "tokenizer.json").write_text("{}")
    (src / "chat_template.jinja").write_text("{{ 1 }}")
    store = open_store(src)
    tokenizer = load_tokenizer(Path(__file__).parents[3] / "herd" / "embedded" / "nano")
    source = Source(store, tokenizer, store.generation, tokenizer.template)  # type: ignore[attr-defined]
    assert write_hf(source, dst) == []
    written = json.loads((dst / "config.json").read_text())
    assert (written["initializer_range"], written["eos_token_id"], written["pretraining_tp"]) == (0.5, 7, 1)
    assert json.loads((dst / "generation_config.json").read_text()) == generation
    assert (dst / "tokenizer.json").read_text() == "{}"
    assert (dst / "chat_template.jinja").read_text() == "{{ 1 }}"
    write_hf(Source(store, tokenizer, GenerationDefaults(temperature=0.0), "new"), tmp_path / "other")
    assert json.loads((tmp_path / "other" / "generation_config.json").read_text())["do_sample"] is False
    assert (tmp_path / "other" / "chat_template.jinja").read_text() == "new"


def test_tokenizer_files(tmp_path: Path) -> None:
    """From a source without Hugging Face files they are made, and the configs name its ids."""
    tokenizer = load_tokenizer(Path(__file__).parents[3] / "herd" / "embedded" / "nano")
    model = build(replace(tiny("llama-3"), vocab_size=tokenizer.vocab_size))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    source = Source(ModelStore(model), tokenizer, GenerationDefaults(), template)
    assert write_hf(source, tmp_path, dtype=torch.bfloat16) == []
    for name, content in hf_files(tokenizer, template, max_length=8192).items():
        assert (tmp_path / name).read_bytes() == content, name
    assert (tmp_path / "chat_template.jinja").read_text() == template
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.bos_token_id == tokenizer.special.bos
    assert set(config.eos_token_id) == tokenizer.special.stop


def test_given_ids(tmp_path: Path) -> None:
    write_hf(bare(ModelStore(build("llama-3"))), tmp_path, ids=TokenIds(5, frozenset([6]), 7))
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (5, 6, 7)


def test_the_vision_half_is_said(tmp_path: Path) -> None:
    write_meta(tmp_path / "src", build("llama-4-scout"), rope_high_freq_factor=1.0)
    (state,) = meta_shards(build("llama-4-scout"), 1)
    torch.save(state | {"vision_projection.weight": torch.zeros(2, 2)}, tmp_path / "src" / "consolidated.00.pth")
    notes = write_hf(bare(open_store(tmp_path / "src")), tmp_path / "dst")
    assert any("1 tensors of the vision half are not carried over" in note for note in notes)


def test_nothing_is_written_before_it_is_clear(tmp_path: Path) -> None:
    store = MemoryStore.of(Llama(tiny("llama-3")))
    del store.tensors["norm.weight"]
    with pytest.raises(CheckpointError, match="is missing"):
        write_hf(bare(store), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
