"""Meta's own quantized releases, made by hand: int4 with LoRA or a rotation, FP8 of several ranks and of experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from herd.checkpoint.fill import fill
from herd.checkpoint.names import shapes
from herd.checkpoint.open import open_store
from herd.errors import CheckpointError
from herd.quant.apply import dequantize, held
from tests.build import build, tiny, tokens
from tests.checkpoint.folders import meta_params, meta_shards

CONFIG = replace(tiny("llama-3"), hidden_dim=256)

ROTATION = 1e-6
"""Sums of 256 products in float32, in another order, of values below one."""


def groups_of_32(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(int8, scales, values): rounding to nearest, 15 levels."""
    runs = weight.unflatten(1, (-1, 32))
    scales = (runs.abs().amax(2) / 7).half().float()
    small = (runs / scales[..., None]).round().clamp(-8, 7)
    return small.flatten(1).to(torch.int8), scales, (small * scales[..., None]).flatten(1)


def hadamard(size: int) -> Tensor:
    """Entry (i, j) is the parity of i & j."""
    signs = [[1.0 - 2.0 * (bin(i & j).count("1") % 2) for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


def int4(folder: Path, kind: str) -> dict[str, Tensor]:
    """A folder of the release `kind`; returns the weights it stands for, in float64."""
    torch.manual_seed(2)
    state, out, wanted = meta_shards(build(CONFIG), 1)[0], {}, {}
    for name, tensor in state.items():
        base = name.removesuffix(".weight")
        if tensor.ndim != 2:
            out[name] = tensor.bfloat16()
        elif not name.startswith("layers."):
            scales = tensor.abs().amax(1, keepdim=True) / 127
            out[name], out[f"{base}.scales"] = (tensor / scales).round().to(torch.int8), scales
            wanted[name] = out[name].double() * scales.double()
        else:
            out[name], out[f"{base}.scales"], wanted[name] = groups_of_32(tensor)
            wanted[name] = wanted[name].double()
            if kind == "qlora":
                a, b = torch.randn(4, tensor.shape[1]).bfloat16() * 0.1, torch.randn(len(tensor), 4).bfloat16() * 0.1
                out[f"{base}.adaptor.A.weight"], out[f"{base}.adaptor.B.weight"] = a, b
                wanted[name] += 2.0 * b.double() @ a.double()
            elif kind == "spinquant" and base.endswith("w2"):
                wanted[name] = wanted[name] @ hadamard(tensor.shape[1])
    params = meta_params(CONFIG) | {"quantization_args": {"group_size": 256}}
    if kind == "qlora":
        params["lora_args"] = {"rank": 4, "scale": 2.0}
    else:
        params["quantization_args"] |= {
            "scheme": "int4_weight_int8_dynamic_activation",
            "spinquant": kind == "spinquant",
        }
    folder.mkdir(exist_ok=True)
    torch.save(out, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return wanted


@pytest.mark.parametrize("kind", ["spinquant", "qlora", "neither"])
def test_int4(kind: str, tmp_path: Path) -> None:
    wanted = int4(tmp_path, kind)
    store = open_store(tmp_path)
    assert store.config == CONFIG
    for name, values in wanted.items():
        found = store.read(name)
        assert (found.double() - values).abs().max() <= ROTATION * values.abs().max(), name
        assert store.info(name).nbytes >= values.numel()
    changed = {"spinquant": "2 INT4+H", "qlora": "14 INT4+LoRA", "neither": None}[kind]
    with pytest.warns(UserWarning, match="dequantized to bfloat16") as said:
        model = fill(store, weights="stored")
    assert changed is None or any(changed in str(w.message) for w in said)
    assert ("Q4_0" in held(model)) == (kind != "qlora")
    twin = dequantize(model)
    for name in ("layers.0.attention.wq.weight", "layers.1.feed_forward.w1.weight"):
        exact = store.read(name) if kind != "qlora" else store.read(name).bfloat16().float()
        assert torch.equal(twin.get_parameter(name), exact)
    assert model(tokens(CONFIG, 8)).isfinite().all()


def test_a_release_that_does_not_say_whether_it_is_rotated(tmp_path: Path) -> None:
    int4(tmp_path, "spinquant")
    params = json.loads((tmp_path / "params.json").read_text())
    del params["quantization_args"]["spinquant"]
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.warns(UserWarning, match='taken for a SpinQuant release.*write "spinquant": false'):
        store = open_store(tmp_path)
    assert store.info("layers.0.feed_forward.w2.weight").stored == "INT4+H"


def test_fp8_of_two_ranks(tmp_path: Path) -> None:
    """As 405B: feed-forward matrices, each rank's rows with scales of their own. The first and last layer would be plain."""
    config, wanted = CONFIG, {}
    for rank, state in enumerate(meta_shards(build(config), 2)):
        out, scales = {}, {}
        for name, tensor in state.items():
            if ".feed_forward." not in name or name.startswith("layers.0"):
                out[name] = tensor.bfloat16()
                continue
            layer, which = name.split(".")[1], name.split(".")[3]
            scale = tensor.abs().amax(1) / 448
            out[name] = (tensor / scale[:, None]).to(torch.float8_e4m3fn)
            scales[f"{layer}_feed_forward.{which}_{rank}"] = scale
            wanted.setdefault(name, []).append(out[name].float() * scale[:, None])
        torch.save(out, tmp_path / f"consolidated.{rank:02d}.pth")
        torch.save(scales, tmp_path / f"fp8_scales_{rank}.pt")
    (tmp_path / "params.json").write_text(json.dumps(meta_params(config)))
    store = open_store(tmp_path)
    assert len(wanted) == 3
    for name, parts in wanted.items():
        assert torch.equal(store.read(name), torch.cat(parts, 1 if "w2" in name else 0)), name
        assert store.info(name).stored == "F8_E4M3"
    with pytest.warns(UserWarning, match="dequantized to bfloat16: 3 F8_E4M3 matrices"):
        assert fill(store)(tokens(config, 8)).isfinite().all()
    (tmp_path / "fp8_scales_1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"fp8_scales_1.pt: is missing, but other ranks have their scales"):
        open_store(tmp_path)


def test_fp8_experts(tmp_path: Path) -> None:
    """As Maverick: routed experts [E * in, out] with scales [E, out]."""
    config = tiny("llama-4-maverick")
    assert config.moe is not None
    state, scales, wanted = meta_shards(build(config), 1)[0], {}, {}
    for layer in (1, 3):
        for which, foreign in (("w1", "moe_w_in_eD_F"), ("w2", "moe_w_out_eF_D"), ("w3", "moe_w_swiglu_eD_F")):
            name = f"layers.{layer}.feed_forward.experts.{foreign}"
            each = state[name].unflatten(0, (config.moe.n_experts, -1))
            scale = each.abs().amax(1) / 448
            small = (each / scale[:, None]).to(torch.float8_e4m3fn)
            state[name], scales[f"layers.{layer}.feed_forward.experts.{which}"] = small.flatten(0, 1), scale
            wanted[f"layers.{layer}.feed_forward.experts.{which}"] = (small.float() * scale[:, None]).transpose(1, 2)
    torch.save(state, tmp_path / "consolidated.00.pth")
    torch.save(scales, tmp_path / "fp8_scales_0.pt")
    (tmp_path / "params.json").write_text(json.dumps(meta_params(config)))
    store = open_store(tmp_path)
    for name, values in wanted.items():
        assert values.shape == shapes(config)[name]
        assert torch.equal(store.read(name), values), name
    with pytest.warns(UserWarning, match="dequantized to bfloat16: 6 F8_E4M3 matrices"):
        assert fill(store)(tokens(config, 8)).isfinite().all()
    del scales["layers.1.feed_forward.experts.w1"]
    torch.save(scales, tmp_path / "fp8_scales_0.pt")
    with pytest.raises(CheckpointError, match=r"is FP8, but fp8_scales_0.pt has no scales for it"):
        open_store(tmp_path)
