"""GPTQ, AWQ and compressed-tensors: the values are those that the formats define, bit for bit, and they run as they are held."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.checkpoint.fill import fill
from herd.checkpoint.hf import HFStore
from herd.checkpoint.names import homes
from herd.checkpoint.open import open_store
from herd.checkpoint.weights import plan_weights
from herd.kernels import native
from herd.quant.apply import dequantize, held
from tests.build import build, tokens
from tests.checkpoint.quantized import packers
from tests.checkpoint.quantized.packers import CONFIG, write_quantized

CPU = torch.device("cpu")


def matrices(pack: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]) -> packers.Pack:
    """`pack` for the matrices of layers; embedding and output stay plain."""
    return lambda name, weight: pack(weight) if ".layers." in name else None


def ct(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True} | weights}
    form = "pack-quantized" if weights.get("packed", True) else "int-quantized"
    group["weights"].pop("packed", None)
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

FORMS: dict[str, tuple[Callable[[Tensor], tuple[dict[str, Tensor], Tensor]], dict[str, Any], str, str | None]] = {
    "gptq": (packers.gptq, GPTQ, "GPTQ4", "Q4_0"),
    "gptq-asymmetric": (lambda w: packers.gptq(w, symmetric=False), GPTQ | {"sym": False}, "GPTQ4", "Q8_0"),
    "gptq-v2": (
        lambda w: packers.gptq(w, symmetric=False, version=2),
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        "GPTQ4",
        "Q8_0",
    ),
    "gptq-act-order": (lambda w: packers.gptq(w, act_order=True), GPTQ | {"desc_act": True}, "GPTQ4", None),
    "gptq-one-group": (
        lambda w: packers.gptq(w, group=-1),
        GPTQ | {"group_size": -1, "desc_act": True},
        "GPTQ4",
        "Q4_0",
    ),
    "gptq-8": (lambda w: packers.gptq(w, bits=8, group=64), GPTQ | {"bits": 8, "group_size": 64}, "GPTQ8", "Q8_0"),
    "gptq-3": (lambda w: packers.gptq(w, bits=3), GPTQ | {"bits": 3}, "GPTQ3", "Q4_0"),
    "gptq-2": (lambda w: packers.gptq(w, bits=2, symmetric=False), GPTQ | {"bits": 2, "sym": False}, "GPTQ2", "Q4_0"),
    "gptq-groups-of-16": (lambda w: packers.gptq(w, group=16), GPTQ | {"group_size": 16}, "GPTQ4", None),
    "awq": (packers.awq_gemm, AWQ, "AWQ4", "Q8_0"),
    "awq-one-group": (lambda w: packers.awq_gemm(w, group=-1), AWQ | {"group_size": -1}, "AWQ4", "Q8_0"),
    "awq-gemv": (packers.awq_gemv, AWQ | {"version": "GEMV"}, "AWQ4", "Q8_0"),
    "packed-int4": (packers.packed_int, ct(strategy="group", group_size=32), "INT4", "Q4_0"),
    "packed-int4-asymmetric": (
        lambda w: packers.packed_int(w, symmetric=False),
        ct(strategy="group", group_size=32, symmetric=False),
        "INT4",
        "Q8_0",
    ),
    "packed-int4-older-zeros": (
        lambda w: packers.packed_int(w, symmetric=False, zeros_packed=False),
        ct(strategy="group", group_size=32, symmetric=False),
        "INT4",
        "Q8_0",
    ),
    "packed-int4-act-order": (
        lambda w: packers.packed_int(w, act_order=True),
        ct(strategy="group", group_size=32, actorder="group"),
        "INT4",
        None,
    ),
    "packed-int8": (
        lambda w: packers.packed_int(w, bits=8, group=None),
        ct(num_bits=8, strategy="channel"),
        "INT8",
        "Q8_0",
    ),
    "int8-rows": (packers.int8_rows, ct(num_bits=8, strategy="channel", packed=False), "INT8", "Q8_0"),
    "int8-rows-float32": (
        lambda w: packers.int8_rows(w, torch.float32),
        ct(num_bits=8, strategy="channel", packed=False),
        "INT8",
        None,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_values_and_holders(form: str, tmp_path: Path) -> None:
    pack, config, word, holder = FORMS[form]
    model = build(CONFIG)
    expected = write_quantized(tmp_path, model, matrices(pack), config)
    store = open_store(tmp_path)
    assert isinstance(store, HFStore)
    parts = homes(CONFIG, "hf")
    seen = 0
    for name, home in parts.items():
        packed = store.packed(name)
        if home.name not in expected:
            assert packed is None
            continue
        seen += 1
        assert packed is not None
        assert store.info(name).stored == word
        values = home.read(expected[home.name], CONFIG)
        assert torch.equal(store.read(name), values), name
        assert packed.holder() == holder, (name, packed.why_not())
        assert packed.likely == holder, name
        assert store.info(name).nbytes < values.numel() * 2
        if holder is not None:
            assert torch.equal(store.raw(name).dequantize(), values), name
        else:
            assert packed.why_not()
    assert seen == 14


@pytest.mark.parametrize("form", ["gptq", "gptq-asymmetric", "gptq-act-order", "awq", "packed-int4", "int8-rows"])
def test_runs_as_it_is_held(form: str, tmp_path: Path) -> None:
    """Loaded as stored, plain and by default, the model has the weights of the file, and the notes say what was dequantized."""
    pack, config, _, holder = FORMS[form]
    model = build(CONFIG)
    expected = write_quantized(tmp_path, model, matrices(pack), config)
    store = open_store(tmp_path)
    for name, home in homes(CONFIG, "hf").items():
        if home.name in expected:
            with torch.no_grad():
                model.get_parameter(name).copy_(home.read(expected[home.name], CONFIG))
    plan = plan_weights(store, "auto", None, CPU)
    ids = tokens(CONFIG, 24)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = fill(store, weights="stored")
    if holder is None:
        assert plan.notes == tuple(str(w.message).removeprefix(f"{store.path}: ") for w in said)
        assert "dequantized to float16: 14 GPTQ4 matrices (columns that share a block of 32" in plan.notes[0]
        return
    assert not said
    assert holder in held(loaded)
    assert not (plan.notes and native.isa() is not None)
    twin = dequantize(loaded)
    with torch.no_grad():
        for name, home in homes(CONFIG, "hf").items():
            if home.name in expected:
                assert torch.equal(twin.get_parameter(name), model.get_parameter(name)), name
        difference = (loaded(ids).float() - twin(ids)).abs().max()
    assert difference < 0.1  # activations are rounded to 8 bits where kernels run


@pytest.mark.filterwarnings("ignore:.*not whole Q6_K blocks")
def test_int4_asked_for_by_name_keeps_what_fits(tmp_path: Path) -> None:
    """4-bit integers that are Q4_0 already are not rounded again, whether 4 or 8 bits were asked for."""
    expected = write_quantized(tmp_path, build(CONFIG), matrices(packers.gptq), GPTQ)
    store = open_store(tmp_path)
    for weights in ("int4", "int8"):
        twin = dequantize(fill(store, weights=weights))
        for name, home in homes(CONFIG, "hf").items():
            if home.name in expected:
                assert torch.equal(twin.get_parameter(name), home.read(expected[home.name], CONFIG)), (weights, name)
