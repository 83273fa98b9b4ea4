"""`herd quantize` and `herd verify --quality`: what is written, what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import herd
from herd.checkpoint.open import open_store
from herd.cli.main import run
from herd.convert.importance import importance_of
from herd.convert.quantize import TARGETS, named
from herd.convert.sample import Reading, Sample
from herd.errors import ConfigError
from tests.build import build
from tests.checkpoint.folders import write_hf
from tests.convert.damaged import copy_of_nano
from tests.quant.wide import WIDE

Captured = pytest.CaptureFixture[str]
QUICK = {"context": 64, "windows": 2, "greedy": 0}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano as Q4_K_M."""
    path = tmp_path_factory.mktemp("quantized") / "nano.gguf"
    assert herd.quantize("nano", path, **QUICK).passed
    return path


def test_the_report(small: Path) -> None:
    data = json.loads(small.with_name("nano.gguf.report.json").read_text())
    assert data["passed"]
    found = data["quality"]
    assert found["scored"] == 2 * 31
    assert found["kl"]["mean"] > 0
    assert 0.5 < found["same_top"] < 1
    assert set(found["kinds"]) == {"tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2", "w3"}
    assert found["kinds"]["wq"]["bits"] == 4.5
    assert len(found["layers"]) == 1 + open_store(small).config.n_layers
    text = small.with_name("nano.gguf.report.txt").read_text()
    assert "same first choice" in text
    assert "the sample text of herd" in text
    assert all(len(line) <= 80 for line in text.splitlines() if "/" not in line)


def test_more_bits_lose_less(small: Path, tmp_path: Path) -> None:
    eight = herd.quantize("nano", tmp_path / "8.gguf", to="int8", **QUICK)
    four = json.loads(small.with_name("nano.gguf.report.json").read_text())["quality"]
    assert eight.quality is not None
    assert eight.b.stored["Q8_0"] > 40
    assert 20 * eight.quality.kl.mean < four["kl"]["mean"]
    assert eight.quality.layers[-1].total < four["layers"][-1]["total"] / 5


def test_the_command(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "n.gguf", tmp_path / "n.png"
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a dog. " * 20)
    options = ["--to", "q4_0", "--text", str(text), "--context", "32", "--greedy", "0", "--plot", str(plot)]
    assert run(["quantize", "nano", str(out), *options]) == 0
    said = capsys.readouterr().out
    assert said.startswith("PASS")
    assert "perplexity" in said
    assert str(text) in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run(["quantize", "nano", str(out), "--greedy", "0"]) == 1, "the name is taken"
    assert run(["quantize", "nano", str(out), "--no-report", "--text", "x"]) == 2
    assert "--no-report leaves out" in capsys.readouterr().err


def test_quality_of_any_two_models(small: Path, capsys: Captured) -> None:
    assert run(["verify", "nano", str(small), "--context", "64", "--windows", "1", "--greedy", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["quality"]
    assert found["windows"] == 1
    report = herd.verify(small, "nano", greedy=0, quality=Reading(None, 64, 1))
    assert not report.passed, "a file is not made from what was made of it"
    assert report.quality is not None
    assert report.quality.a.value == pytest.approx(found["b"]["value"], rel=1e-6)


def test_names() -> None:
    assert [named(to) for to in ("int8", "INT4", "q4_k", "q6_k")] == ["q8_0", "q4_0", "q4_k_m", "q6_k"]
    for wrong, why in (
        ("fp8", "GGUF has no FP8 type"),
        ("w8a8", "write int8"),
        ("f16", f"choose one of {', '.join(TARGETS)}"),
        ("", "choose one of"),
    ):
        with pytest.raises(ConfigError, match=why):
            named(wrong)


def test_what_is_quantized_already_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantized already .*Quantize the original, or say --requantize"):
        herd.quantize(small, tmp_path / "again.gguf", to="q4_0", **QUICK)
    assert not (tmp_path / "again.gguf").exists()
    report = herd.quantize(small, tmp_path / "again.gguf", to="q4_0", requantize=True, **QUICK)
    assert report.passed
    assert any("rounded again" in note for note in report.notes)


def test_nothing_is_written_before_the_text_is_known_to_do(tmp_path: Path, capsys: Captured) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    with pytest.raises(ConfigError, match="fewer than one window"):
        herd.quantize("nano", tmp_path / "n.gguf", text=text, greedy=0)
    write_hf(tmp_path / "hf", build(WIDE))
    with pytest.raises(ConfigError, match="has no tokenizer: leave it out"):
        herd.quantize(tmp_path / "hf", tmp_path / "n.gguf", greedy=0)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf", "short.txt"]
    with pytest.raises(ConfigError, match=r"name it n\.gguf"):
        herd.quantize("nano", tmp_path / "n", greedy=0)
    asked = [str(tmp_path / "hf"), str(tmp_path / "n.gguf"), "--to", "q8_0", "--no-report", "--greedy", "0", "--json"]
    assert run(["quantize", *asked]) == 0
    assert json.loads(capsys.readouterr().out)["quality"] is None


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    other = copy_of_nano(tmp_path)
    file = other / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    vocab[";"], vocab["?"] = vocab["?"], vocab[";"]
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ConfigError, match="other ids for the text"):
        herd.verify("nano", other, greedy=0, quality=True)


def test_calibrated(tmp_path: Path) -> None:
    """Bit for bit what the encoder makes of the source with that matrix; the loss on such texts is smaller."""
    text = tmp_path / "calibration.txt"
    text.write_text("Once upon a time there was a dog. He ran to the house and saw a cat in the tree. " * 60)
    plain = herd.quantize("nano", tmp_path / "plain.gguf", to="q4_0", text=text, **QUICK)
    report = herd.quantize("nano", tmp_path / "made.gguf", to="q4_0", text=text, calibrate=text, **QUICK)
    assert report.passed, report.text()
    assert report.counts["within"] == 0
    assert any("importance of columns from" in note for note in report.notes)
    assert report.quality is not None
    assert plain.quality is not None
    assert report.quality.kl.mean < 0.9 * plain.quality.kl.mean
    keys = open_store(tmp_path / "made.gguf").metadata()
    assert keys["quantize.imatrix.file"] == "calibration.txt"
    assert keys["quantize.imatrix.entries_count"] == 7 * open_store(tmp_path / "made.gguf").config.n_layers
    with pytest.raises(ConfigError, match="say with --quant to what"):
        herd.convert("nano", tmp_path / "x.gguf", to="gguf", calibrate=text)


def test_importance_is_the_mean_square_of_inputs(tmp_path: Path) -> None:
    """Against hooks on the modules of transformers, whose rows of a matrix may lie otherwise, its columns not."""
    hf = write_hf(tmp_path, build(WIDE)).eval()
    ids = torch.randint(WIDE.vocab_size, (2, 12), generator=torch.Generator().manual_seed(5))
    seen: dict[str, torch.Tensor] = {}
    for name, module in hf.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    with torch.no_grad():
        hf(ids)
    found = importance_of(open_store(tmp_path), Sample("ids", ids, ids.numel()))
    names = {"wq": "self_attn.q_proj", "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj"}
    assert len(found) == 7 * WIDE.n_layers
    for key, value in found.items():
        _, layer, _, field, _ = key.split(".")
        if field in names:
            expected = seen[f"model.layers.{layer}.{names[field]}"].flatten(0, 1).square().mean(0)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
