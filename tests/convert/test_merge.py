"""`herd merge`: PEFT's own merged model, types kept, tied embeddings, quantized bases with their drift, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import herd
from herd.adapters.apply import LoraConfig, adapter_of, apply_lora, trained
from herd.checkpoint.load import load_model
from herd.checkpoint.open import open_store
from herd.checkpoint.peft import write_peft
from herd.cli.main import run
from herd.convert.merge import MAX_DRIFT
from herd.errors import CheckpointError, ConfigError
from tests.build import build, tokens
from tests.checkpoint.folders import write_hf, write_meta
from tests.checkpoint.test_adapters import SETTINGS, saved_by_peft

# PEFT asks transformers under a name that is going away; nothing in herd can change it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning"),
]

LOGITS = 1e-5
"""Largest difference of float32 logits of order one, W + scale * B A computed in another order."""
HALF = 2.0**-8
"""Relative error of one rounding to bfloat16."""


def nano_adapter(folder: Path, *, dora: bool = False, size: float = 0.02) -> Path:
    """A random adapter of every matrix of the embedded model."""
    torch.manual_seed(0)
    model = load_model("nano", "float32")
    apply_lora(model, LoraConfig(8, 16.0, use_dora=dora))
    with torch.no_grad():
        for name, weight in trained(model).items():
            if name.endswith(".b"):
                weight.normal_(0, size)
    folder.mkdir()
    write_peft(adapter_of(model, "nano"), folder, model.config, lambda _: None)
    return folder


@pytest.mark.parametrize("settings", ["every matrix", "dora", "own ranks and alphas", "whole output", "embedding"])
def test_the_merged_model_is_pefts(settings: str, tmp_path: Path) -> None:
    model = build("llama-3")
    write_hf(tmp_path / "base", model)
    theirs = saved_by_peft(tmp_path / "lora", model, **SETTINGS[settings])
    report = herd.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "merged")
    assert report.passed, report.text()
    ids = tokens(model.config, 24)
    with torch.no_grad():
        expected = theirs.merge_and_unload()(input_ids=ids).logits
        assert (load_model(tmp_path / "merged")(ids) - expected).abs().max() <= LOGITS
        assert (model(ids) - expected).abs().max() > 100 * LOGITS


def test_an_adapted_embedding_is_untied(tmp_path: Path) -> None:
    model = build("llama-3.2")
    write_hf(tmp_path / "base", model)
    theirs = saved_by_peft(tmp_path / "lora", model, **SETTINGS["embedding"])
    report = herd.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "merged")
    assert report.passed, report.text()
    assert any("matrix of its own" in note for note in report.notes)
    merged = load_model(tmp_path / "merged")
    assert not merged.config.tie_embeddings
    ids = tokens(model.config, 24)
    with torch.no_grad():
        assert (merged(ids) - theirs(input_ids=ids).logits).abs().max() <= LOGITS


@pytest.mark.parametrize("write", [write_hf, write_meta])
def test_types_and_format_stay_those_of_the_base(write: Any, tmp_path: Path) -> None:
    model = build("llama-3")
    saved_by_peft(tmp_path / "lora", model, **SETTINGS["queries and values"])
    exact = herd.merge(_base(tmp_path / "f32", model, write), tmp_path / "lora", tmp_path / "wide")
    base = _base(tmp_path / "bf16", model.bfloat16(), write)
    report = herd.merge(base, tmp_path / "lora", tmp_path / "merged")
    assert exact.passed
    assert report.passed, report.text()
    one, other = open_store(base), open_store(tmp_path / "merged")
    assert one.kind == other.kind
    assert {n: one.info(n).stored for n in one.names()} == {n: other.info(n).stored for n in other.names()}
    changed = [t.name for t in report.tensors if t.status != "exact"]
    assert changed
    assert all(name.endswith(("wq.weight", "wv.weight")) for name in changed)
    drift = next(check for check in report.checks if check.name == "drift")
    biggest = max(float(other.read(name).float().abs().max()) for name in changed)
    assert 0 < drift.figures["largest_rounding_error"] <= HALF * biggest
    assert "not measured" in drift.lines[1], "the tiny model has no tokenizer"


def _base(folder: Path, model: Any, write: Any) -> Path:
    made = write(folder, model)
    return made if isinstance(made, Path) else folder


def test_into_quantized_blocks_with_the_drift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = nano_adapter(tmp_path / "lora", dora=True)
    assert herd.quantize("nano", tmp_path / "q8_0.gguf", to="q8_0", report=False, greedy=0).passed
    good, bad = str(tmp_path / "good.gguf"), tmp_path / "bad.gguf"
    asked = ["merge", str(tmp_path / "q8_0.gguf"), str(lora), good, "--windows", "1", "--context", "64", "--json"]
    assert run(asked) == 0
    data = json.loads(capsys.readouterr().out)
    drift = next(check for check in data["checks"] if check["name"] == "drift")
    assert 0 < drift["figures"]["mean_kl_nats"] < MAX_DRIFT / 10
    assert 0 < drift["figures"]["rounding_of_change"] < 0.5
    assert any("trained on nano" in note for note in data["notes"])
    one, other = open_store(tmp_path / "q8_0.gguf"), open_store(good)
    assert {n: one.info(n).stored for n in one.names()} == {n: other.info(n).stored for n in other.names()}

    asked = ["merge", str(tmp_path / "q8_0.gguf"), str(lora), str(bad), "--windows", "1", "--context", "64"]
    asked += ["--max-drift", "0.000001"]
    assert run(asked) == 1
    out = capsys.readouterr().out
    assert "FAIL  drift" in " ".join(out.split("\n"))
    assert "refused" in out
    assert not bad.exists()
    assert run([*asked, "--force"]) == 0
    assert "accepted because of --force" in capsys.readouterr().out
    assert bad.exists()


def test_float_base_to_a_quantized_file_is_encoded_once(tmp_path: Path) -> None:
    """Not rounded to 16 bits first: each block is what encoding makes of the exact sum, which the report proves."""
    from herd.convert.sample import Reading

    lora = nano_adapter(tmp_path / "lora")
    report = herd.merge(
        "nano", lora, tmp_path / "m.gguf", to="gguf", quant="q4_0", reading=Reading(None, 128, 1), greedy=1
    )
    assert report.passed, report.text()
    assert report.counts["within"] == report.counts["failed"] == 0
    drift = next(check for check in report.checks if check.name == "drift")
    assert "limit_nats" not in drift.figures, "who asks for a quantization gets it"


def test_refusals(tmp_path: Path) -> None:
    model = build("llama-3")
    base = _base(tmp_path / "base", model, write_hf)
    saved_by_peft(tmp_path / "lora", model, target_modules=["q_proj"])
    saved_by_peft(tmp_path / "other", build("llama-2"), target_modules=["k_proj"])
    out = tmp_path / "out"
    for args, options, told in (
        ((base, tmp_path / "other", out), {}, "does not fit|changes a matrix"),
        ((base, tmp_path / "nothing", out), {}, "no such adapter"),
        ((base, base, out), {}, "is no LoRA adapter"),
        ((tmp_path / "lora", base, out), {}, "the first name is the base"),
        ((base, tmp_path / "lora", out), {"to": "peft"}, "merging makes a model"),
        ((base, tmp_path / "lora", out), {"max_drift": float("nan")}, "at least 0"),
        ((base, tmp_path / "lora", out), {"quant": "q8_0"}, "--quant makes GGUF"),
        ((base, tmp_path / "lora", base), {}, "is also the source"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=told):
            herd.merge(*args, **options)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ConfigError, match="cannot be merged or converted"):
        herd.merge(base, tmp_path / "lora", out)
    assert not out.exists()
