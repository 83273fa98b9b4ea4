"""Quantized results: what is written is what encoding makes of the source; other encoders' work must lie in the bound."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import herd
from herd.checkpoint.gguf import GGUFFile
from herd.checkpoint.write.gguf import Encoded, write_gguf_file
from herd.checkpoint.write.planned import Planned
from herd.quant.scheme import QuantTensor
from tests.build import build
from tests.checkpoint.folders import oracle, write_hf
from tests.checkpoint.gguf_files import GGML, WIDE, write_gguf


def wide(folder: Path) -> Path:
    """A model with rows of whole super-blocks, as transformers writes it."""
    write_hf(folder, build(WIDE))
    return folder


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "q6_k", "q4_k_m"])
def test_quantized_with_proof(quant: str, tmp_path: Path) -> None:
    report = herd.convert(wide(tmp_path / "hf"), tmp_path / "q.gguf", to="gguf", quant=quant, greedy=1)
    assert report.passed, report.text()
    assert report.counts["encoded"] > 0
    assert report.counts["failed"] == report.counts["within"] == 0
    logits = next(check for check in report.checks if check.name == "logits")
    assert "bit for bit what encoding makes of A" in logits.lines[0]
    assert logits.figures["max_abs_difference"] > 0
    assert logits.figures["mean_kl_nats"] > 0
    assert any("were quantized" in note for note in report.notes)
    assert report.b.bits_per_weight < 9


def test_the_same_blocks_go_from_gguf_to_gguf_and_become_bfloat16_elsewhere(tmp_path: Path) -> None:
    herd.convert(wide(tmp_path / "hf"), tmp_path / "q.gguf", to="gguf", quant="q4_k_m", greedy=0)
    again = herd.convert(tmp_path / "q.gguf", tmp_path / "again.gguf", to="gguf", greedy=0)
    assert again.passed
    assert again.counts["exact"] == len(again.tensors)
    report = herd.convert(tmp_path / "q.gguf", tmp_path / "back", to="hf", greedy=0)
    assert report.passed, report.text()
    assert any("dequantized: Q4_K to BF16" in note for note in report.notes)
    exact = herd.convert(tmp_path / "q.gguf", tmp_path / "wide", to="hf", dtype="f32", greedy=0)
    assert exact.counts["exact"] == len(exact.tensors)


@pytest.mark.parametrize("kind", [GGML.Q8_0, GGML.Q4_0])
def test_the_gguf_packages_blocks_pass(kind: GGML, tmp_path: Path) -> None:
    model = build(WIDE)
    write_hf(tmp_path / "hf", model)
    path = write_gguf(tmp_path / "theirs.gguf", oracle(model), kind)
    report = herd.verify(tmp_path / "hf", path, greedy=1)
    assert report.passed, report.text()
    assert report.counts["failed"] == 0


def changed(path: Path, name: str, at: int, value: int) -> None:
    """One byte of the tensor `name` set."""
    entry = GGUFFile(path).entries[name]
    data = bytearray(path.read_bytes())
    data[entry.start + at] = value
    path.write_bytes(data)


def test_one_wrong_nibble_breaks_the_bound(tmp_path: Path) -> None:
    """A q at the other end of its range is no rounding of anything."""
    a = wide(tmp_path / "hf")
    path = tmp_path / "q.gguf"
    herd.convert(a, path, to="gguf", quant="q4_k_m", greedy=0)
    raw = GGUFFile(path).raw("blk.0.ffn_gate.weight")
    assert isinstance(raw, QuantTensor)
    byte = int(raw.blocks.flatten()[100])
    changed(path, "blk.0.ffn_gate.weight", 100, (byte & 0xF0) | (15 if byte & 15 < 8 else 0))
    report = herd.verify(a, path, greedy=0)
    assert [t.name for t in report.failed_tensors] == ["layers.0.feed_forward.w1.weight"]
    failed = report.failed_tensors[0]
    assert failed.bound is not None
    assert failed.max_error > failed.bound
    assert failed.why.startswith("1 of 131072 numbers differ")


def test_rounding_with_other_scales_is_within_the_bound(tmp_path: Path) -> None:
    """Another encoder: the fp16 scale one step away, every q the nearest with that scale."""
    a = wide(tmp_path / "hf")
    path = tmp_path / "q.gguf"
    herd.convert(a, path, to="gguf", quant="q8_0", greedy=0)
    name = "blk.0.ffn_gate.weight"
    raw = GGUFFile(path).raw(name)
    assert isinstance(raw, QuantTensor)
    scale = raw.blocks.flatten()[:2].clone().view(torch.float16)
    quants = raw.blocks.flatten()[2:34].clone().view(torch.int8)
    other = torch.tensor([scale.view(torch.int16).item() + 1], dtype=torch.int16).view(torch.float16)
    requantized = (quants.float() * scale.float() / other.float()).round().to(torch.int8)
    for at, value in enumerate([*other.view(torch.uint8).tolist(), *requantized.view(torch.uint8).tolist()]):
        changed(path, name, at, value)
    report = herd.verify(a, path, greedy=0)
    assert report.passed, report.text()
    found = next(t for t in report.tensors if t.name == "layers.0.feed_forward.w1.weight")
    assert found.status == "within"
    assert found.bound is not None
    logits = next(check for check in report.checks if check.name == "logits")
    assert "another program" in logits.lines[0]


def with_importance(path: Path, out: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The file again, with the key that quantizers leave when they had an importance matrix, and other blocks."""
    file = GGUFFile(path)
    plans = []
    for name, entry in file.entries.items():
        raw = file.raw(name)
        if name in tensors:
            assert isinstance(raw, QuantTensor)
            raw = QuantTensor(tensors[name], raw.type, raw.shape)
        plans.append(Planned(name, entry.shape, entry.type.name, lambda raw=raw: raw))
    keys = {key: Encoded(file.metadata.encoded(key)) for key in file.metadata}
    write_gguf_file(out, keys | {"quantize.imatrix.file": "calibration.dat"}, plans, lambda nbytes: None)
    return out


def test_an_importance_matrix_changes_what_is_held_against_k_quants(tmp_path: Path) -> None:
    """Scales that no plain search would take, every value at its nearest level: fine with the key, wrong without it."""
    name, canonical = "blk.0.ffn_gate.weight", "layers.0.feed_forward.w1.weight"
    model = build(WIDE)
    with torch.no_grad():
        model.get_parameter(canonical).fill_(8.3)
    write_hf(tmp_path / "hf", model)
    herd.convert(tmp_path / "hf", tmp_path / "q.gguf", to="gguf", quant="q4_k_s", greedy=0)
    one = torch.tensor([1 / 64, 0.0], dtype=torch.float16).view(torch.uint8)  # d and dmin
    scales = torch.tensor([255] * 4 + [0] * 4 + [15] * 4, dtype=torch.uint8)  # every scale 63, every minimum 0
    block = torch.cat((one, scales, torch.full((128,), 0x88, dtype=torch.uint8)))  # every q 8
    blocks = block.repeat(WIDE.hidden_dim, 1)
    path = with_importance(tmp_path / "q.gguf", tmp_path / "i.gguf", {name: blocks})
    report = herd.verify(tmp_path / "hf", path, greedy=0)
    assert report.passed, report.text()
    assert next(t for t in report.tensors if t.name == canonical).status == "within"
    assert any("importance matrix (calibration.dat)" in note for note in report.notes)
    data = bytearray((tmp_path / "q.gguf").read_bytes())
    entry = GGUFFile(tmp_path / "q.gguf").entries[name]
    data[entry.start : entry.start + blocks.numel()] = blocks.numpy().tobytes()
    (tmp_path / "q.gguf").write_bytes(data)
    report = herd.verify(tmp_path / "hf", tmp_path / "q.gguf", greedy=0)
    assert [t.name for t in report.failed_tensors] == [canonical]


def test_an_importance_matrix_leaves_no_bound_for_the_older_types(tmp_path: Path) -> None:
    herd.convert(wide(tmp_path / "hf"), tmp_path / "q.gguf", to="gguf", quant="q4_0", greedy=0)
    raw = GGUFFile(tmp_path / "q.gguf").raw("blk.0.ffn_gate.weight")
    assert isinstance(raw, QuantTensor)
    other = raw.blocks.clone()
    other[0, 2] ^= 1
    path = with_importance(tmp_path / "q.gguf", tmp_path / "i.gguf", {"blk.0.ffn_gate.weight": other})
    report = herd.verify(tmp_path / "hf", path, greedy=0)
    assert not report.passed
    assert "the scales of Q4_0 come from a search that has no bound" in report.failed_tensors[0].why


def test_k_quants_of_llama_cpp_shape_are_compared_block_for_block(tmp_path: Path) -> None:
    """Random blocks are no encoding of anything: every tensor of them fails."""
    model = build(replace(WIDE))
    write_hf(tmp_path / "hf", model)
    path = write_gguf(tmp_path / "noise.gguf", oracle(model), GGML.Q6_K)
    report = herd.verify(tmp_path / "hf", path, greedy=0)
    assert not report.passed
    assert all(t.status == "failed" for t in report.tensors if t.stored_b == "Q6_K")
    assert np.isfinite([t.max_error for t in report.failed_tensors]).all()
