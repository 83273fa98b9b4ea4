"""`herd convert` of LoRA adapters: PEFT to GGUF and back, with a report of their own; llama.cpp applies what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import herd
from herd.adapters.lora import Factors, LoraAdapter
from herd.checkpoint.open import open_store
from herd.checkpoint.peft import read_peft, write_peft
from herd.checkpoint.resolve import resolve
from herd.cli.main import run
from herd.errors import ConfigError
from tests.build import build
from tests.checkpoint.folders import write_meta

Captured = pytest.CaptureFixture[str]
NAMES = ("wq", "wk", "wv", "wo")


def nano_adapter(folder: Path, size: float = 0.02, *, rslora: bool = False, base: str | None = None) -> Path:
    """A random adapter of the embedded model's attention, in a PEFT folder."""
    config = open_store(resolve("nano")).config
    generator = torch.Generator().manual_seed(5)
    outs = {"wq": config.dim, "wk": config.n_kv_heads * config.head_dim, "wv": config.n_kv_heads * config.head_dim}
    factors = {}
    for layer in range(config.n_layers):
        for name in NAMES:
            a = torch.randn(4, config.dim, generator=generator)
            b = size * torch.randn(outs.get(name, config.dim), 4, generator=generator)
            factors[f"layers.{layer}.attention.{name}.weight"] = Factors(a, b, 8.0)
    folder.mkdir()
    write_peft(LoraAdapter(factors, 4, 8.0, rslora, base=base), folder, config, lambda _: None)
    return folder


def test_there_and_back_with_reports(tmp_path: Path, capsys: Captured) -> None:
    first = nano_adapter(tmp_path / "lora", base="nano")
    gguf, back = str(tmp_path / "lora.gguf"), tmp_path / "back"
    assert run(["convert", str(first), gguf, "--to", "gguf", "--base", "nano"]) == 0
    assert run(["convert", gguf, str(back), "--to", "peft"]) == 0  # the file names its base
    out, _ = capsys.readouterr()
    assert out.count("PASS") == 2
    assert "48 exact" in out
    one, other = (load_file(f / "adapter_model.safetensors") for f in (first, back))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    data = json.loads((back / "herd-report.json").read_text())
    assert data["passed"]
    assert next(c for c in data["checks"] if c["name"] == "changes")["figures"]["largest_relative_difference"] == 0


def test_a_scale_that_gguf_cannot_say_moves_into_b(tmp_path: Path) -> None:
    config = build("llama-3").config
    base = write_meta(tmp_path / "base", build("llama-3"))
    pairs = {
        f"layers.{i}.attention.wq.weight": Factors(torch.randn(3, 64), torch.randn(64, 3), alpha)
        for i, alpha in enumerate((3.0, 7.0))
    }
    (tmp_path / "lora").mkdir()
    write_peft(LoraAdapter(pairs, 3, 3.0, rslora=True), tmp_path / "lora", config, lambda _: None)
    report = herd.convert(tmp_path / "lora", tmp_path / "lora.gguf", to="gguf", base=base)
    assert report.passed, report.text()
    assert report.counts == {"exact": 2, "encoded": 0, "within": 2, "failed": 0}
    assert any("multiplied into B" in note for note in report.notes)


def test_a_wrong_factor_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from herd.convert import adapters

    plain = adapters.read_gguf_lora

    def wrong(path: Any, base: Any) -> LoraAdapter:
        read = plain(path, base)
        name = next(iter(read.factors))
        pair = read.factors[name]
        return replace(read, factors={**read.factors, name: replace(pair, b=pair.b.flip(0))})

    first = nano_adapter(tmp_path / "lora")
    monkeypatch.setattr(adapters, "read_gguf_lora", wrong)
    report = herd.convert(first, tmp_path / "lora.gguf", to="gguf", base="nano")
    assert not report.passed
    assert [t.name for t in report.failed_tensors] == ["layers.0.attention.wq.weight.lora_b"]
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [({"to": "hf"}, "cannot become hf"), ({"to": "gguf", "quant": "q8_0"}, "--quant is for models")],
)
def test_what_adapters_cannot_become(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    first = nano_adapter(tmp_path / "lora")
    with pytest.raises(ConfigError, match=told):
        herd.convert(first, tmp_path / ("x.gguf" if options["to"] == "gguf" else "x"), base="nano", **options)


def test_without_a_base_it_says_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give it with --base"):
        herd.convert(nano_adapter(tmp_path / "lora"), tmp_path / "x.gguf", to="gguf")
    with pytest.raises(ConfigError, match=r"someone/nowhere.*give it with --base"):
        herd.convert(nano_adapter(tmp_path / "two", base="someone/nowhere"), tmp_path / "x.gguf", to="gguf")


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_llama_cpp_applies_the_adapter(rslora: bool, tmp_path: Path) -> None:
    """Greedy tokens of llama.cpp with our GGUF adapter = those of herd with W + scale * B A; without it they differ."""
    llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    first = nano_adapter(tmp_path / "lora", rslora=rslora)
    assert herd.convert(first, tmp_path / "lora.gguf", to="gguf", base="nano").passed
    assert herd.convert("nano", tmp_path / "nano.gguf", to="gguf", dtype="f32", greedy=0).passed
    model, tokenizer = herd.load("nano", "float32")
    adapter = read_peft(first, model.config)
    prompt = tokenizer.encode("Once upon a time there was", bos=True)

    def ours() -> list[int]:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(16):
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        return ids[len(prompt) :]

    def theirs(lora: str | None) -> list[int]:
        llm = llama_cpp.Llama(str(tmp_path / "nano.gguf"), n_ctx=256, n_threads=1, verbose=False, lora_path=lora)
        made = []
        for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
            made.append(token)
            if len(made) == 16:
                break
        llm.close()
        return made

    plain = ours()
    assert theirs(None) == plain
    with torch.no_grad():
        for name in adapter.factors:
            dict(model.named_parameters())[name].add_(adapter.delta(name))
    changed = ours()
    assert changed != plain, "the adapter does something"
    assert theirs(str(tmp_path / "lora.gguf")) == changed
