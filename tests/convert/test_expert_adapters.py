"""Adapters of routed experts: merged into float and quantized bases, to GGUF and back, applied by llama.cpp."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import herd
from herd.adapters.apply import LoraConfig, adapter_of, apply_lora, trained
from herd.adapters.lora import Factors, LoraAdapter
from herd.checkpoint.gguf import GGUFFile
from herd.checkpoint.gguf_lora import write_gguf_lora
from herd.checkpoint.load import load_model
from herd.checkpoint.open import open_store
from herd.checkpoint.peft import read_peft, write_peft
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.gguf_model import write_gguf
from herd.checkpoint.write.source import Source
from herd.cli.main import run
from herd.convert.sample import Reading
from herd.model.config import MoEConfig
from herd.model.llama import Llama
from tests.adapters.test_experts import DOWN, GATE_UP, by_peft
from tests.build import build, tokens
from tests.checkpoint.folders import oracle, write_hf
from tests.checkpoint.gguf_files import LLAMA_CPP
from tests.checkpoint.write.stores import MemoryStore
from tests.vocabularies import llama4

# PEFT asks transformers under a name that is going away; nothing in herd can change it.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LOGITS = 1e-5
"""Largest difference of float32 logits of order one, computed in another order."""
LLAMA_CPP_LOGITS = 1e-3
"""llama.cpp's sums of some hundred products, of logits of order one, in another order."""


def tuned(model: Llama, folder: Path, targets: tuple[str, ...] = ("experts", "wq"), size: float = 0.05) -> Llama:
    """`model` with a random adapter, which lies in `folder`, too."""
    torch.manual_seed(0)
    apply_lora(model, LoraConfig(4, 8.0, targets=targets))
    with torch.no_grad():
        for name, weight in trained(model).items():
            if name.rpartition(".")[2].startswith("b"):
                weight.normal_(0, size)
    folder.mkdir()
    write_peft(adapter_of(model), folder, model.config, lambda _: None)
    return model.eval()


def test_the_merged_model_is_the_tuned_one_and_pefts(tmp_path: Path) -> None:
    write_hf(tmp_path / "base", build("llama-4-scout"))
    model = tuned(build("llama-4-scout"), tmp_path / "lora")
    report = herd.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "merged")
    assert report.passed, report.text()
    ids = tokens(model.config, 24)
    theirs = peft.PeftModel.from_pretrained(oracle(build("llama-4-scout")), tmp_path / "lora").merge_and_unload()
    with torch.no_grad():
        found = load_model(tmp_path / "merged")(ids)
        assert (found - model(ids)).abs().max() <= LOGITS
        assert (found - theirs(input_ids=ids).logits).abs().max() <= LOGITS
        assert (found - build("llama-4-scout")(ids)).abs().max() > 100 * LOGITS
    changed = {t.name for t in report.tensors if t.status != "exact"}
    assert not any("router" in name for name in changed)


WIDE = {"dim": 256, "n_heads": 4, "head_dim": 64, "hidden_dim": 512, "n_kv_heads": 2}
"""Rows of whole super-blocks of 256."""


def with_words() -> tuple[Llama, Source]:
    """A model that GGUF can say, with a vocabulary, and what a file is made of."""
    tokenizer = llama4()
    model = build(replace(quantizable().config, vocab_size=tokenizer.vocab_size))
    return model, Source(MemoryStore.of(model), tokenizer, GenerationDefaults(), None)


def quantizable() -> Llama:
    return build(
        replace(LLAMA_CPP["llama-4-scout as llama.cpp has it"], **WIDE, moe=MoEConfig(n_experts=4, hidden_dim=256))
    )


@pytest.mark.filterwarnings("ignore:.*the source has no tokenizer:UserWarning")
def test_into_quantized_experts(tmp_path: Path) -> None:
    model = quantizable()
    write_gguf(Source(MemoryStore.of(model), None, GenerationDefaults(), None), tmp_path / "base.gguf", quant="q8_0")
    tuned(model, tmp_path / "lora", ("experts",), size=0.2)
    names = tmp_path / "base.gguf", tmp_path / "lora", tmp_path / "m.gguf"
    assert not herd.merge(*names, greedy=0).passed, "without a tokenizer the drift is not known"
    assert not (tmp_path / "m.gguf").exists()
    report = herd.merge(*names, greedy=0, force=True)
    assert report.passed, report.text()
    drift = next(check for check in report.checks if check.name == "drift")
    assert 0 < drift.figures["rounding_of_change"] < 0.5
    one, other = open_store(tmp_path / "base.gguf"), open_store(tmp_path / "m.gguf")
    assert {n: one.info(n).stored for n in one.names()} == {n: other.info(n).stored for n in other.names()}
    assert one.info("layers.0.feed_forward.experts.w1").stored == "Q8_0"
    name = "layers.1.feed_forward.experts.w3"
    total = adapter_of(model).merged(name, one.read(name))
    assert (other.read(name) - total).abs().max() <= total.abs().max() / 127, "the nearest of 255 steps"


@pytest.mark.slow
def test_the_drift_of_quantized_experts_on_a_text(tmp_path: Path) -> None:
    model, source = with_words()
    write_gguf(source, tmp_path / "base.gguf", quant="q8_0")
    tuned(model, tmp_path / "lora", ("experts",), size=0.2)
    names = tmp_path / "base.gguf", tmp_path / "lora", tmp_path / "m.gguf"
    reading = Reading(None, 64, 1)
    strict = herd.merge(*names, reading=reading, max_drift=0.0, greedy=0)
    assert not strict.passed
    report = herd.merge(*names, reading=reading, max_drift=1.0, greedy=0)
    assert report.passed, report.text()
    drift = next(check for check in report.checks if check.name == "drift")
    assert drift.figures["mean_kl_nats"] > 0


def test_to_gguf_and_back_with_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("llama-4-maverick")
    write_hf(tmp_path / "base", model)
    by_peft(tmp_path / "lora", model, target_parameters=[GATE_UP, DOWN], target_modules=["q_proj"])
    file, back = tmp_path / "lora.gguf", tmp_path / "back"
    assert run(["convert", str(tmp_path / "lora"), str(file), "--to", "gguf", "--base", str(tmp_path / "base")]) == 0
    assert run(["convert", str(file), str(back), "--to", "peft", "--base", str(tmp_path / "base")]) == 0
    assert capsys.readouterr().out.count("PASS") == 2
    moe = model.config.moe
    assert moe is not None
    shapes = {name: entry.shape for name, entry in GGUFFile(file).entries.items()}
    assert shapes["blk.1.ffn_gate_exps.weight.lora_a"] == (moe.n_experts, 4, model.config.dim)
    assert shapes["blk.1.ffn_down_exps.weight.lora_b"] == (moe.n_experts, model.config.dim, 4)
    for settings in (tmp_path / "lora", back):
        config = json.loads((settings / "adapter_config.json").read_text())
        assert sorted(config["target_parameters"]) == [DOWN, GATE_UP]
    one, other = ((folder / "adapter_model.safetensors").read_bytes() for folder in (tmp_path / "lora", back))
    assert one[-1000:] == other[-1000:]


def test_verify_compares_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("llama-4-scout")
    write_hf(tmp_path / "base", model)
    tuned(model, tmp_path / "lora", ("experts",))
    write_gguf_lora(adapter_of(model), tmp_path / "lora.gguf", model.config, lambda _: None)
    asked = ["verify", str(tmp_path / "lora"), str(tmp_path / "lora.gguf"), "--base", str(tmp_path / "base")]
    assert run(asked) == 0
    assert "PASS" in capsys.readouterr().out
    assert run([*asked, "--greedy", "2"]) == 1
    assert "are for models" in capsys.readouterr().err
    assert run(["verify", str(tmp_path / "lora"), str(tmp_path / "base"), "--base", str(tmp_path / "base")]) == 1
    assert "is an adapter and" in capsys.readouterr().err
    assert run(["verify", str(tmp_path / "base"), str(tmp_path / "base"), "--base", "nano"]) == 1
    assert "--base is for LoRA adapters" in capsys.readouterr().err
    with torch.no_grad():
        trained(model)["layers.2.feed_forward.experts.b2"].mul_(1.001)
    other = adapter_of(model)
    write_gguf_lora(other, tmp_path / "other.gguf", model.config, lambda _: None)
    assert not herd.verify(tmp_path / "lora", tmp_path / "other.gguf", base=tmp_path / "base").passed


def test_gate_and_up_of_their_own_become_pefts_one_parameter(tmp_path: Path) -> None:
    model = build("llama-4-scout")
    write_hf(tmp_path / "base", model)
    moe = model.config.moe
    assert moe is not None
    torch.manual_seed(0)

    def pair(rank: int, alpha: float) -> Factors:
        a = torch.randn(moe.n_experts, rank, model.config.dim)
        return Factors(a, torch.randn(moe.n_experts, moe.hidden_dim, rank), alpha)

    home = "layers.{}.feed_forward.experts.{}"
    pairs = {home.format(0, "w1"): pair(2, 4.0), home.format(0, "w3"): pair(3, 6.0), home.format(1, "w3"): pair(2, 4.0)}
    write_gguf_lora(LoraAdapter(pairs, 2, 4.0), tmp_path / "lora.gguf", model.config, lambda _: None)
    report = herd.convert(tmp_path / "lora.gguf", tmp_path / "lora", to="peft", base=tmp_path / "base")
    assert report.passed, report.text()
    again = read_peft(tmp_path / "lora", model.config)
    assert again.factors[home.format(0, "w1")].rank == 5
    assert not again.factors[home.format(1, "w1")].b.any()


def test_inspect_names_the_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(build("llama-4-scout"), tmp_path / "lora", ("experts",))
    run(["inspect", str(tmp_path / "lora")])
    assert GATE_UP in capsys.readouterr().out


@pytest.mark.slow
def test_llama_cpp_applies_it(tmp_path: Path) -> None:
    llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model, source = with_words()
    write_gguf(source, tmp_path / "base.gguf", dtype=torch.float32)
    base = load_model(tmp_path / "base.gguf")
    tuned(base, tmp_path / "lora", ("experts",))
    report = herd.convert(tmp_path / "lora", tmp_path / "lora.gguf", to="gguf", base=tmp_path / "base.gguf")
    assert report.passed, report.text()
    ids = tokens(model.config, 24)[0].tolist()
    llm = llama_cpp.Llama(
        str(tmp_path / "base.gguf"), n_ctx=256, n_threads=1, logits_all=True, verbose=False, use_mmap=False,
        type_k=0, type_v=0, swa_full=True, lora_path=str(tmp_path / "lora.gguf"),
    )  # fmt: skip
    llm.eval(ids)
    theirs = torch.tensor(llm.scores[: len(ids)])
    llm.close()
    with torch.no_grad():
        assert (base(torch.tensor([ids]))[0] - theirs).abs().max() <= LLAMA_CPP_LOGITS
        plain = load_model(tmp_path / "base.gguf")(torch.tensor([ids]))[0]
        assert (plain - theirs).abs().max() > 10 * LLAMA_CPP_LOGITS
