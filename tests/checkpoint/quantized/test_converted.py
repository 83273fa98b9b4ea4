"""Checkpoints that other tools quantized, converted: values survive, and the report says what became of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from herd.checkpoint.names import homes, shapes
from herd.checkpoint.open import open_store
from herd.convert.driver import convert
from herd.planning.plan import plan
from tests.build import build
from tests.checkpoint.quantized import packers
from tests.checkpoint.quantized.packers import CONFIG, write_quantized
from tests.checkpoint.quantized.test_floats import FOUR, in_layers, nf4
from tests.checkpoint.quantized.test_integers import AWQ, GPTQ, matrices

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer")

CASES = {
    "gptq": (packers.gptq, GPTQ, "Q4_0", "14 tensors were repacked with the same values: GPTQ4 to Q4_0"),
    "awq": (packers.awq_gemm, AWQ, "Q8_0", "14 tensors were repacked with the same values: AWQ4 to Q8_0"),
    "nf4": (nf4, FOUR, "F16", "14 tensors were dequantized: NF4 to F16"),
}


@pytest.mark.parametrize("form", CASES)
def test_to_gguf(form: str, tmp_path: Path) -> None:
    """GGUF has blocks that hold integers exactly; what they cannot hold is rounded once, to 16 bits."""
    pack, config, stored, note = CASES[form]
    expected = write_quantized(tmp_path / "a", build(CONFIG), matrices(pack), config)
    report = convert(tmp_path / "a", tmp_path / "b.gguf", to="gguf", greedy=0)
    assert report.passed
    assert note in report.notes
    made = open_store(tmp_path / "b.gguf")
    for name, home in homes(CONFIG, "hf").items():
        if home.name in expected:
            values = home.read(expected[home.name], CONFIG)
            assert made.info(name).stored == stored
            assert torch.equal(made.read(name).float(), values if stored != "F16" else values.half().float()), name


def test_to_hugging_face(tmp_path: Path) -> None:
    expected = write_quantized(tmp_path / "a", build(CONFIG), in_layers(nf4), FOUR, dtype=torch.bfloat16)
    report = convert(tmp_path / "a", tmp_path / "b", to="hf", greedy=0)
    assert report.passed
    assert "14 tensors were dequantized: NF4 to BF16" in report.notes
    made = open_store(tmp_path / "b")
    assert "quantization_config" not in made.metadata()
    for name, home in homes(CONFIG, "hf").items():
        if home.name in expected:
            assert torch.equal(made.read(name), home.read(expected[home.name], CONFIG).bfloat16()), name


def test_to_gguf_in_another_quantization(tmp_path: Path) -> None:
    """Rounding twice is said."""
    write_quantized(tmp_path / "a", build(CONFIG), matrices(packers.awq_gemm), AWQ)
    report = convert(tmp_path / "a", tmp_path / "b.gguf", to="gguf", quant="q4_0", greedy=0)
    assert any("AWQ4 blocks are decoded and rounded again, which loses more" in note for note in report.notes)
    assert "14 tensors were dequantized and quantized again: AWQ4 to Q4_0" in report.notes


@pytest.mark.parametrize(("form", "bits"), [("gptq", 4.5), ("awq", 8.5), ("nf4", 16)])
def test_planned_bytes_are_those_in_memory(form: str, bits: float, tmp_path: Path) -> None:
    pack, config, _, _ = CASES[form]
    write_quantized(tmp_path, build(CONFIG), matrices(pack), config)
    found = plan(tmp_path)
    matrices_of_layers = [
        name for name, shape in shapes(CONFIG).items() if name.startswith("layers.") and len(shape) == 2
    ]
    values = sum(torch.Size(shapes(CONFIG)[name]).numel() for name in matrices_of_layers)
    assert found.setup.weight_bytes.layers == values * bits / 8
    assert any(open_store(tmp_path).info(matrices_of_layers[0]).stored in note for note in found.assumptions)
