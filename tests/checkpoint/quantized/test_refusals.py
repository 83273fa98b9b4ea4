"""What cannot be read is refused in one line that names the file and the tensor or key; nothing crashes on damage."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from herd.checkpoint.open import open_store
from herd.errors import CheckpointError, ConfigError, HerdError
from tests.build import build
from tests.checkpoint.quantized import packers
from tests.checkpoint.quantized.packers import CONFIG, write_quantized
from tests.checkpoint.quantized.test_floats import FOUR, compressed, llm_int8, nf4
from tests.checkpoint.quantized.test_integers import AWQ, GPTQ, ct, matrices

NAME = "model.layers.0.mlp.up_proj"
OURS = "layers.0.feed_forward.w3.weight"

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "hqq"}, "quant_method is 'hqq': herd reads gptq, awq, bitsandbytes"),
    ({"bits": 4}, "quant_method is None"),
    (GPTQ | {"bits": 5}, "bits is 5"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    (GPTQ | {"group_size": 0}, "group_size is 0"),
    (AWQ | {"version": "gemv_fast"}, "version is 'gemv_fast'"),
    (AWQ | {"bits": 8}, "bits is 8: AWQ weights have 4 bits"),
    ({"quant_method": "bitsandbytes"}, "both off"),
    (FOUR | {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4'"),
    ({"quant_method": "compressed-tensors"}, "config_groups is missing"),
    (ct(strategy="group", group_size=32) | {"format": "marlin-24"}, "format is 'marlin-24'"),
    (ct(strategy="group", group_size=32) | {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
    (ct(strategy="tensor_group", group_size=16), "strategy is 'tensor_group'"),
    (ct(num_bits=4, type="float", strategy="channel"), "num_bits is 4, type 'float'"),
    (ct(strategy="channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse files cannot be read"),
    (ct(strategy="channel") | {"transform_config": {"config_groups": {"R1": {}}}}, "rotations while the model runs"),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size is"),
    ({"quant_method": 4}, "quant_method is 4"),
]


@pytest.mark.parametrize(("config", "why"), CONFIGS)
def test_configs(config: dict[str, Any], why: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, build(CONFIG), matrices(packers.gptq), config)
    with pytest.raises(ConfigError) as caught:
        open_store(tmp_path)
    assert "config.json" in str(caught.value)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def without(part: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__delitem__(f"{NAME}.{part}")


def changed(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(state: dict[str, Tensor]) -> None:
        state[f"{NAME}.{part}"] = change(state[f"{NAME}.{part}"]).contiguous()

    return apply


def added(part: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__setitem__(f"{NAME}.{part}", value)


ORDERED = (lambda w: packers.gptq(w, act_order=True), GPTQ | {"desc_act": True})
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (packers.gptq, GPTQ),
    "ordered": ORDERED,
    "awq": (packers.awq_gemm, AWQ),
    "nf4": (nf4, FOUR),
    "int8": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fp8": (packers.fp8, compressed(strategy="channel")),
    "packed": (packers.packed_int, ct(strategy="group", group_size=32)),
}

DAMAGE: list[tuple[str, Callable[[dict[str, Tensor]], None], str]] = [
    ("gptq", without("qweight"), "up_proj.qweight: is missing"),
    ("gptq", without("scales"), "up_proj.scales: is missing"),
    ("gptq", without("qzeros"), "up_proj.qzeros: is missing"),
    ("ordered", without("g_idx"), "up_proj.g_idx: is missing"),
    ("gptq", changed("qweight", lambda t: t[:-1]), "qweight: has shape (7, 192)"),
    ("gptq", changed("scales", lambda t: t[:1]), "group_size 32 makes 2"),
    ("gptq", changed("scales", lambda t: t.int()), "scales: is int32"),
    ("gptq", changed("scales", lambda t: t * torch.inf), "scales: holds a value that is infinite"),
    ("ordered", changed("g_idx", lambda t: t + 1), "g_idx: names a group outside of 0 to 1"),
    ("gptq", added("bias", torch.ones(192)), "bias: is not zero"),
    ("awq", without("qzeros"), "up_proj.qzeros: is missing"),
    ("awq", changed("qweight", lambda t: t.T), "qweight: has shape (24, 64)"),
    ("nf4", without("weight.quant_state.bitsandbytes__nf4"), "bitsandbytes__nf4: is missing"),
    ("nf4", without("weight.absmax"), "weight.absmax: is missing"),
    ("nf4", changed("weight", lambda t: t[1:]), "weight: has 6143 bytes"),
    ("nf4", changed("weight.quant_map", lambda t: t.flip(0)), "quant_map: is not the table of NF4"),
    (
        "nf4",
        changed(
            "weight.quant_state.bitsandbytes__nf4", lambda t: torch.tensor(list(b'{"shape": [1, 1]}'), dtype=t.dtype)
        ),
        "says shape [1, 1]",
    ),
    (
        "nf4",
        changed("weight.quant_state.bitsandbytes__nf4", lambda t: torch.zeros(7, dtype=t.dtype)),
        "model.safetensors",
    ),
    ("int8", without("SCB"), "up_proj.SCB: is missing"),
    ("int8", changed("weight_format", lambda t: t + 2), "weight_format: is not 0"),
    ("fp8", without("weight_scale"), "up_proj.weight_scale: is missing"),
    ("fp8", changed("weight_scale", lambda t: t[:3]), "in no form that config_groups describe (float8 per channel)"),
    ("fp8", changed("weight", lambda t: t.bfloat16()), "the weights were not compressed yet"),
    ("packed", without("weight_scale"), "up_proj.weight_scale: is missing"),
    ("packed", changed("weight_shape", lambda t: t.flip(0)), "weight_shape: says (64, 192)"),
    ("packed", changed("weight_packed", lambda t: t[:, :3]), "in no form that config_groups describe"),
]


@pytest.mark.parametrize(("form", "damage", "why"), DAMAGE)
def test_damaged_tensors(form: str, damage: Callable[[dict[str, Tensor]], None], why: str, tmp_path: Path) -> None:
    pack, config = FORMS[form]
    write_quantized(tmp_path, build(CONFIG), matrices(pack), config)
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_store(tmp_path).read(OURS)
    assert why in str(caught.value).replace("':", ":")


@pytest.mark.parametrize(("form", "key"), [("packed", "ignore"), ("awq", "modules_to_not_convert")])
def test_lists_of_plain_modules_are_honoured(form: str, key: str, tmp_path: Path) -> None:
    """A module that the config calls plain is plain, or the checkpoint contradicts itself."""
    pack, config = FORMS[form]
    kept = lambda name, weight: None if name == NAME else matrices(pack)(name, weight)  # noqa: E731
    config = config | {key: [NAME, "lm_head"]}
    write_quantized(tmp_path / "a", build(CONFIG), kept, config)
    assert open_store(tmp_path / "a").info(OURS).stored == "F16"
    write_quantized(tmp_path / "b", build(CONFIG), matrices(pack), config)
    with pytest.raises(CheckpointError, match=r"up_proj.*is quantized, but"):
        open_store(tmp_path / "b")


def test_groups_of_the_config_may_differ(tmp_path: Path) -> None:
    """Some modules in 4 bits, some in 8, some plain; patterns of targets are never run, however bad they are."""
    eight = lambda w: packers.packed_int(w, bits=8, group=None)  # noqa: E731
    config = ct(strategy="group", group_size=32)
    config["config_groups"]["group_0"]["targets"] = ["re:(a+)+$"]
    config["config_groups"]["group_1"] = {
        "targets": ["re:.*down_proj"],
        "weights": {"num_bits": 8, "strategy": "channel"},
    }
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
        if ".mlp." not in name:
            return None
        return eight(weight) if "down" in name else packers.packed_int(weight)

    write_quantized(tmp_path, build(CONFIG), pack, config)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(state, tmp_path / "model.safetensors")
    store = open_store(tmp_path)
    assert [store.info(f"layers.0.feed_forward.{w}.weight").stored for w in ("w1", "w2", "w3")] == [
        "INT4",
        "INT8",
        "INT4",
    ]
    assert any("float8 cache of keys and values" in note for note in store.notes)  # pyright: ignore[reportAttributeAccessIssue]


def test_random_damage_is_refused_or_read(tmp_path: Path) -> None:
    """Bytes and shapes at random: a HerdError or values, and nothing else."""
    for number, (pack, config) in enumerate(FORMS.values()):
        folder = tmp_path / str(number)
        write_quantized(folder, build(CONFIG), matrices(pack), config)
        whole = load_file(folder / "model.safetensors")
        parts = [name for name in whole if name.startswith(NAME)]
        draw = torch.Generator().manual_seed(number)
        for _ in range(12):
            state = dict(whole)
            name = parts[int(torch.randint(len(parts), (1,), generator=draw))]
            tensor = state[name]
            match int(torch.randint(4, (1,), generator=draw)):
                case 0:
                    state[name] = tensor.flatten()[
                        : int(torch.randint(tensor.numel() + 1, (1,), generator=draw))
                    ].clone()
                case 1:
                    state[name] = tensor.unsqueeze(0)
                case 2:
                    raw = tensor.flatten().contiguous().view(torch.uint8)
                    noise = torch.randint(256, raw.shape, generator=draw, dtype=torch.uint8)
                    state[name] = noise.view(tensor.dtype).view(tensor.shape)
                case _:
                    state[name] = tensor.float()
            save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
            with contextlib.suppress(HerdError):
                assert open_store(folder).read(OURS).shape == (192, 64)


def test_old_files_beside_the_config(tmp_path: Path) -> None:
    """quantize_config.json and quant_config.json of the first AutoGPTQ and AutoAWQ."""
    write_quantized(tmp_path / "a", build(CONFIG), matrices(packers.gptq), None)
    (tmp_path / "a" / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    assert open_store(tmp_path / "a").info(OURS).stored == "GPTQ4"
    write_quantized(tmp_path / "b", build(CONFIG), matrices(packers.awq_gemm), None)
    (tmp_path / "b" / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 32, "version": "GEMM"}))
    assert open_store(tmp_path / "b").info(OURS).stored == "AWQ4"
