"""bitsandbytes and scaled FP8: values bit for bit, against formulas written here and against bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from herd.checkpoint.fill import fill
from herd.checkpoint.hf import HFStore
from herd.checkpoint.names import homes, shapes
from herd.checkpoint.open import open_store
from herd.model.llama import Llama
from herd.quant.apply import dequantize, held
from tests.build import build, tiny, tokens
from tests.checkpoint.folders import write_hf
from tests.checkpoint.quantized import packers
from tests.checkpoint.quantized.packers import CONFIG, write_quantized

GOLDEN = Path(__file__).with_name("bitsandbytes.safetensors")
"""Made by bitsandbytes 0.50.2: packed matrices and what dequantize_4bit gives in float32; see `golden.py`."""

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip

FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def nf4(weight: Tensor, *, block: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    """Nearest numbers of the table, without double quantization."""
    table, flat = torch.tensor(NF4), weight.flatten()
    absmax = flat.view(-1, block).abs().amax(1)
    index = ((flat.view(-1, block) / absmax[:, None]).unsqueeze(-1) - table).abs().argmin(-1).flatten()
    octets = (index[0::2] * 16 + index[1::2]).to(torch.uint8)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(weight.shape)}
    raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts = {"weight": octets[:, None], "weight.absmax": absmax, "weight.quant_map": table}
    values = (table[index].view(-1, block) * absmax[:, None]).view(weight.shape)
    return parts | {"weight.quant_state.bitsandbytes__nf4": raw}, values


def llm_int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    top = weight.abs().amax(1)
    small = (weight / top[:, None] * 127).round().to(torch.int8)
    parts = {"weight": small, "SCB": top, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, small * top[:, None] * torch.tensor(np.float32(1 / 127))


def in_layers(pack: Any) -> packers.Pack:
    return lambda name, weight: pack(weight) if ".layers." in name else None


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True} | weights}
    group["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": True}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


FORMS: dict[str, tuple[Any, dict[str, Any], str, str | None]] = {
    "nf4": (nf4, FOUR, "NF4", None),
    "nf4-blocks-of-128": (lambda w: nf4(w, block=128), FOUR, "NF4", None),
    "llm-int8": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "INT8", None),
    "fp8-channel": (packers.fp8, compressed(strategy="channel"), "F8_E4M3", "FP8"),
    "fp8-tensor": (lambda w: packers.fp8(w, per="tensor"), compressed(strategy="tensor"), "F8_E4M3", "FP8"),
    "fp8-block": (
        lambda w: packers.fp8(w, per="block", block=24),
        compressed(strategy="block", block_structure=[24, 24]),
        "F8_E4M3",
        None,
    ),
    "fbgemm": (packers.fp8, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200}, "F8_E4M3", "FP8"),
    "auto-fp8": (
        lambda w: packers.fp8(w, per="tensor"),
        {"quant_method": "fp8", "activation_scheme": "static"},
        "F8_E4M3",
        "FP8",
    ),
    "fine-grained-fp8": (
        lambda w: packers.fp8(w, per="block", scale="weight_scale_inv", block=32),
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        "F8_E4M3",
        None,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_values(form: str, tmp_path: Path) -> None:
    pack, config, word, holder = FORMS[form]
    model = build(CONFIG)
    expected = write_quantized(tmp_path, model, in_layers(pack), config, dtype=torch.bfloat16)
    store = open_store(tmp_path)
    assert isinstance(store, HFStore)
    found = 0
    for name, home in homes(CONFIG, "hf").items():
        if home.name in expected:
            packed, found = store.packed(name), found + 1
            assert packed is not None
            assert (store.info(name).stored, packed.holder()) == (word, holder)
            assert torch.equal(store.read(name), home.read(expected[home.name], CONFIG)), name
    assert found == 14
    with pytest.warns(UserWarning, match=r"dequantized to bfloat16: 14 \w+ matrices"):
        fill(store)
    loaded = fill(store, dtype="bfloat16")
    home = homes(CONFIG, "hf")["layers.1.attention.wk.weight"]
    values = home.read(expected[home.name], CONFIG)
    assert torch.equal(loaded.get_parameter("layers.1.attention.wk.weight"), values.bfloat16())
    if holder == "FP8":
        kept = fill(store, weights="stored")
        assert "FP8" in held(kept)
        assert torch.equal(dequantize(kept).get_parameter("layers.1.attention.wk.weight"), values)


@pytest.mark.parametrize("case", ["nf4", "nf4_nested", "fp4", "fp4_nested", "int8"])
def test_bitsandbytes_itself(case: str, tmp_path: Path) -> None:
    """The value of every byte is what bitsandbytes makes of it."""
    golden = {k.removeprefix(f"{case}/"): v for k, v in load_file(GOLDEN).items() if k.startswith(f"{case}/")}
    write_hf(tmp_path, build(CONFIG))
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    del state[f"{name}.weight"]
    state |= {f"{name}.{part}": value for part, value in golden.items() if part != "values"}
    save_file(state, tmp_path / "model.safetensors")
    data = json.loads((tmp_path / "config.json").read_text())
    four = case != "int8"
    data["quantization_config"] = {
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": case[:3] if four else "fp4",
    }
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert torch.equal(open_store(tmp_path).read("layers.0.feed_forward.w2.weight"), golden["values"])


def split_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused experts one by one, as [out, in] matrices."""
    out = {}
    for name, tensor in state.items():
        base, _, part = name.rpartition(".")
        if part == "gate_up_proj":
            for e, both in enumerate(tensor):
                gate, up = both.T.chunk(2)
                out[f"{base}.{e}.gate_proj.weight"], out[f"{base}.{e}.up_proj.weight"] = gate, up
        elif part == "down_proj":
            out |= {f"{base}.{e}.down_proj.weight": one.T for e, one in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


def write_experts(folder: Path, model: Llama, *, fused: bool = False) -> dict[str, Tensor]:
    """A folder of Llama 4 with routed experts in FP8; returns their values one by one, as [out, in]."""
    write_hf(folder, model)
    out: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    state = load_file(folder / "model.safetensors")
    for name, tensor in (state if fused else split_experts(state)).items():
        if ".experts." not in name:
            out[name] = tensor.bfloat16()
        elif fused:
            scales = tensor.abs().amax(1, keepdim=True) / 448
            small = (tensor / scales).to(torch.float8_e4m3fn)
            out |= {name: small, f"{name}_scale": scales if "gate_up" in name else scales.transpose(1, 2).contiguous()}
            wanted[name] = small.float() * scales
        else:
            parts, wanted[name] = packers.fp8(tensor)
            out |= {f"{name.removesuffix('.weight')}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(out, folder / "model.safetensors")
    data = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "fbgemm_fp8"} if fused else compressed(strategy="channel")
    (folder / "config.json").write_text(json.dumps(data | {"quantization_config": said}))
    return split_experts(wanted) if fused else wanted


@pytest.mark.parametrize("form", ["compressed", "fbgemm"])
def test_experts(form: str, tmp_path: Path) -> None:
    """Llama 4 in FP8: experts one by one (Maverick on the hub), or fused with a scale per output (transformers' fbgemm)."""
    config = tiny("llama-4-maverick")
    wanted = write_experts(tmp_path, build(config), fused=form == "fbgemm")
    store = open_store(tmp_path)
    experts = [name for name in shapes(config) if ".experts." in name]
    assert len(experts) == 6
    for name in experts:
        layer, kind = name.split(".")[1], {"w1": "gate", "w2": "down", "w3": "up"}[name[-2:]]
        for e, one in enumerate(store.read(name)):
            assert torch.equal(one, wanted[f"model.layers.{layer}.feed_forward.experts.{e}.{kind}_proj.weight"])
    with pytest.warns(UserWarning, match="dequantized to bfloat16: 6 F8_E4M3 matrices"):
        loaded = fill(store)
    assert loaded(tokens(config, 8)).isfinite().all()
    if form == "compressed":
        kept = fill(store, weights="stored")
        assert "FP8" in held(kept)
        for name in experts:
            assert torch.equal(dequantize(kept).get_parameter(name), store.read(name))
