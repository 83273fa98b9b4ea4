"""Models whose matrices are swapped for quantized ones on the fly."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from herd.errors import ConfigError
from herd.kernels import native
from herd.quant.apply import WEIGHTS, dequantize, kind_of, quantize, rule_named
from herd.quant.encode import encode
from herd.quant.linear import QuantEmbedding, QuantExperts, QuantLinear
from herd.quant.mix import mix
from herd.quant.scheme import QuantTensor
from tests.build import build, tiny, tokens
from tests.modes.pairs import pairs
from tests.quant.wide import EXPERTS, TIED, WIDE

CONFIGS = {"wide": WIDE, "tied": TIED, "experts": EXPERTS}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        *product(["wide"], ["int8", "int4", "q4_k_m", "Q6_K"]),
        *pairs(["tied", "experts"], ["q4_k_m", "int8", "Q6_K", "int4"]),
    ],
)
def test_values_are_those_of_the_encoder(name: str, weights: str) -> None:
    """Every matrix becomes what a file of this mix would hold; everything else stays."""
    model, config = build(CONFIGS[name]), CONFIGS[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert quantize(model, weights) == []
    after = dequantize(model).state_dict()
    rule = mix({"int8": "Q8_0", "int4": "Q4_0"}.get(weights, weights))
    assert after.keys() == before.keys()
    for key, value in before.items():
        first = "tok_embeddings.weight" if key == "output.weight" and config.tie_embeddings else key
        kind = rule.kind(first, tuple(value.shape), config).kind
        made = encode(value, kind) if kind != "F32" else value
        expected = made.dequantize() if isinstance(made, QuantTensor) else made
        assert torch.equal(after[key], expected), key


def test_a_tied_table_is_held_once() -> None:
    model = build(TIED)
    quantize(model, "int8")
    assert isinstance(model.output, QuantLinear)
    assert isinstance(model.tok_embeddings, QuantEmbedding)
    assert model.output.matrix is model.tok_embeddings.matrix


def test_kinds_of_modules() -> None:
    model = build(EXPERTS)
    assert kind_of(model) is None
    quantize(model, "q4_k_m")
    assert kind_of(model) == "Q4_K"
    assert isinstance(model.layers[0].feed_forward.experts, QuantExperts)
    assert type(model.layers[0].feed_forward.router) is torch.nn.Linear, "routers stay as they are"


def test_rows_that_are_no_whole_blocks_are_named() -> None:
    model = build("llama-3")  # rows of 64 and 176
    notes = quantize(model, "int8")
    assert any("layers.0.feed_forward.w2.weight" in note and "176" in note for note in notes)
    assert type(model.layers[0].feed_forward.w2) is torch.nn.Linear
    assert isinstance(model.layers[0].attention.wq, QuantLinear)


def test_experts_of_which_some_are_no_whole_blocks_stay_one_module() -> None:
    """Rows of 80 in gate and up, of 96 in down: those that cannot be quantized stay as numbers, beside those that are."""
    model = build("llama-4-scout")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    quantize(model, "int8")
    after = dequantize(model).state_dict()
    home = "layers.0.feed_forward.experts"
    assert torch.equal(after[f"{home}.w1"], before[f"{home}.w1"])
    assert torch.equal(after[f"{home}.w3"], before[f"{home}.w3"])
    assert not torch.equal(after[f"{home}.w2"], before[f"{home}.w2"])
    ids = tokens(model.config, 8)
    assert (model(ids) - dequantize(model)(ids)).abs().max() <= 0.03 * model(ids).abs().max()  # inputs of 8 bits


def test_without_the_library_the_blocks_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "isa", lambda: None)
    model = build(WIDE)
    quantize(model, "int8")
    ids = tokens(WIDE, 12)
    with torch.no_grad():
        assert torch.equal(model(ids), dequantize(model)(ids))


@pytest.mark.skipif(native.isa() is None, reason="no native kernels")
def test_memory_is_held_once() -> None:
    model = build(WIDE)
    quantize(model, "int4")
    matrix = model.layers[0].attention.wq.matrix
    assert matrix.blocks is None
    assert matrix.panels.nbytes == matrix.nbytes  # Q4_0 panels have the size of their blocks


def test_names() -> None:
    for name in WEIGHTS:
        assert rule_named(name).quantized
    for wrong, why in (("int3", "choose one of int8"), ("f16", "choose one of"), ("", "choose one of")):
        with pytest.raises(ConfigError, match=why):
            rule_named(wrong)


def test_twice_is_refused() -> None:
    model = build(WIDE)
    quantize(model, "int8")
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(model, "int4")


def test_a_model_in_bfloat16_stays_so() -> None:
    model = build(tiny("llama-2")).to(torch.bfloat16)
    quantize(model, "int8")
    with torch.no_grad():
        assert model(tokens(model.config, 5)).dtype == torch.bfloat16
