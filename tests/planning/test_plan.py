"""Plans against published figures: parameter bytes, file sizes, KV bytes, and speeds that were measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from herd.errors import ConfigError, UnknownModelError
from herd.model.presets import RELEASES
from herd.planning.devices import COMMON, DEVICES, GIB, device, this_machine
from herd.planning.plan import Plan, plan
from herd.planning.weights import SCHEMES
from tests.build import build
from tests.checkpoint.folders import write_hf

FILE_SIZE = 0.02
"""Relative: a GGUF file holds the vocabulary and names besides its tensors, some 8 MB."""

KEYS = {
    "parameters", "active_parameters", "weights_bytes", "kv_bytes_per_token", "kv_bytes", "total_bytes", "flops_per_token",
    "decode_tokens_per_second", "fits", "assumptions", "breakdown", "devices",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "weights", "gigabytes"),
    [
        # the model card's 405 billion in two bytes, and Meta's eight shards of 101.47 GB
        ("llama-3.1-405b", "bf16", 8 * 101.470976045),
        # files of llama.cpp's quantizer, as published by those who ran it
        ("llama-3.1-8b", "q4_k_m", 4.92),
        ("llama-3.1-8b", "q5_k_m", 5.73),
        ("llama-3.1-8b", "q6_k", 6.60),
        ("llama-3.1-8b", "q8_0", 8.54),
        ("llama-3.1-8b", "f16", 16.07),
        ("llama-3.1-70b", "q4_k_m", 42.52),
        ("llama-2-7b", "q4_0", 3.83),
        ("llama-3.2-1b", "q8_0", 1.32),
    ],
)
def test_weights_have_the_published_size(name: str, weights: str, gigabytes: float) -> None:
    assert plan(name, weights=weights).setup.weight_bytes.total / 1e9 == pytest.approx(gigabytes, rel=FILE_SIZE)


@pytest.mark.parametrize(
    ("name", "kib"), [("llama-3.1-8b", 128), ("llama-3.1-70b", 320), ("llama-2-7b", 512), ("llama-3.2-1b", 32)]
)
def test_keys_and_values_have_the_published_size(name: str, kib: int) -> None:
    found = plan(name, context=4096, batch=3).as_dict()
    assert found["kv_bytes_per_token"] == kib * 1024
    assert found["kv_bytes"] == 3 * 4096 * kib * 1024
    assert plan(name, kv="fp8").setup.kv_per_token == kib * 512


@pytest.mark.parametrize(
    ("device_name", "name", "weights", "measured"),
    [
        # llama.cpp, 7B: F16 61.0 and Q8_0 98.1 on a 4090 (pull request 4766); SGLang, 8B bf16 158 on an H100
        ("rtx4090", "llama-2-7b", "f16", 61.0),
        ("rtx4090", "llama-2-7b", "q8_0", 98.1),
        ("h100", "llama-3.1-8b", "bf16", 158.3),
        # llama.cpp, 7B Q4_0 with CUDA graphs (pull request 6766)
        ("rtx4090", "llama-2-7b", "q4_0", 146.8),
    ],
)
def test_speeds_are_near_measured_ones(device_name: str, name: str, weights: str, measured: float) -> None:
    found = plan(name, device=device_name, weights=weights, context=512).first.speed
    assert found.decode == pytest.approx(measured, rel=0.15), "the estimate is for good kernels, to 15 %"
    assert found.ceiling > measured, "nothing is faster than the memory"


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.id)
def test_every_release_has_a_plan(release: Any) -> None:
    found = plan(release.id, device="h100").as_dict()
    assert found.keys() >= KEYS
    assert json.loads(json.dumps(found)) == found
    parts = found["breakdown"]
    assert sum(value for value in parts.values() if value is not None) == found["total_bytes"]
    assert found["assumptions"]
    if release.total_params is not None:
        assert found["parameters"] == release.total_params


def test_a_stored_checkpoint_is_counted_to_the_byte(tmp_path: Path) -> None:
    model = build("llama-4-scout")
    write_hf(tmp_path, model)
    found = plan(tmp_path)
    assert found.setup.weight_bytes.total == sum(w.numel() * w.element_size() for w in model.state_dict().values())
    assert found.as_dict()["weights"] == "F32"
    assert found.setup.bits == 32
    half = plan(tmp_path, weights="bf16")
    assert half.setup.weight_bytes.total * 2 == found.setup.weight_bytes.total


def test_behemoth_rests_on_what_was_announced() -> None:
    found = plan("llama-4-behemoth", device="h200").as_dict()
    assert found["parameters"] == 2_000_000_000_000
    assert found["active_parameters"] == 288_000_000_000
    assert found["kv_bytes_per_token"] is None
    assert found["kv_bytes"] is None
    assert found["flops_per_token"] == 2 * 288_000_000_000
    assert sum("announced" in note for note in found["assumptions"]) == 2
    assert any("never published" in note for note in found["assumptions"])
    assert not found["fits"]


def test_vision_and_encoders_are_labelled() -> None:
    vision = plan("llama-3.2-11b-vision").as_dict()
    assert vision["parameters"] == 10_670_220_835
    assert vision["kv_bytes_per_token"] == 128 * 1024  # the self-attention layers are those of 3.1 8B
    assert vision["kv_bytes"] == 8192 * 128 * 1024 + 2 * 8 * 6404 * 8 * 128 * 2
    guard = plan("prompt-guard-1-86m").as_dict()
    assert (guard["decode_tokens_per_second"], guard["kv_bytes"]) == (None, 0)
    for found in (vision, guard):
        assert any("cannot run this model yet" in note for note in found["assumptions"])


def test_chunked_layers_can_free_their_keys() -> None:
    """Scout: 36 of 48 layers look back 8,192 tokens at most."""
    found = plan("llama-4-scout", context=1_000_000).as_dict()
    per_layer = 2 * 8 * 128 * 2
    assert found["kv_bytes"] == 48 * per_layer * 1_000_000
    assert found["kv_bytes_chunks_freed"] == per_layer * (12 * 1_000_000 + 36 * 8192)


def test_a_batch_reads_more_experts() -> None:
    one, many = (plan("llama-4-maverick", device="h200", devices=8, batch=n).setup.load for n in (1, 64))
    assert one.weights_read(1) < many.weights_read(64) < one.weights_read(10_000)
    assert one.weights_read(1) == pytest.approx(one.dense_bytes + one.expert_bytes / 128)


@pytest.mark.parametrize(
    "kwargs", [{"context": 32_768, "batch": 8}, {"kv": "int8"}, {"weights": "q4_k_m", "batch": 40}]
)
def test_the_largest_that_fits_is_the_largest(kwargs: dict[str, Any]) -> None:
    fit = plan("llama-3.1-8b", device="rtx4090", **kwargs).first
    assert fit.largest_context is not None
    assert fit.largest_batch is not None
    for name, most in (("context", fit.largest_context), ("batch", fit.largest_batch)):
        if 0 < most < 131_072:
            assert plan("llama-3.1-8b", device="rtx4090", **kwargs | {name: most}).first.fits
            assert not plan("llama-3.1-8b", device="rtx4090", **kwargs | {name: most + 1}).first.fits


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("llama-3.1-70b", {"device": "rtx4090", "batch": 4, "context": 32_768}),
        ("llama-3.1-8b", {"device": "t4"}),
        ("llama-3.1-405b", {"device": "h100", "devices": 8}),
        ("llama-3.1-8b", {"device": "rtx4090", "context": 131_072}),
        ("llama-4-behemoth", {"device": "h200", "devices": 8}),
        ("llama-3.1-8b", {"device": "rtx4090", "batch": 32}),
    ],
)
def test_every_proposed_flag_makes_it_fit(name: str, kwargs: dict[str, Any]) -> None:
    fit = plan(name, **kwargs).first
    assert not fit.fits
    assert fit.advice
    for one in fit.advice:
        words = one.flags.split()
        flags = {
            k.removeprefix("--"): int(v) if v.isdigit() else v for k, v in zip(words[::2], words[1::2], strict=True)
        }
        changed = plan(name, **kwargs | flags).first
        assert changed.fits, one.flags
        assert changed.total_bytes == one.total


def test_what_grouped_queries_and_the_vocabulary_save() -> None:
    saved = plan("llama-3.1-8b", context=1000).savings
    assert saved is not None
    assert saved.heads_per_kv == 4
    assert saved.mha_kv_bytes == 4 * 1000 * 128 * 1024
    assert saved.vocabulary_parameters == 2 * (128_256 - 32_000) * 4096
    assert saved.tokens_for_the_same_text == pytest.approx(3.17 / 3.94)
    plain = plan("llama-2-7b").savings
    assert plain is not None
    assert (plain.kv_bytes_saved, plain.vocabulary_parameters) == (0, 0)


def test_cost_is_price_over_speed() -> None:
    fit = plan("llama-3.1-8b", device="h100", batch=16, price_per_hour=3.6).first
    assert fit.cost_output == pytest.approx(0.001 * 1e6 / fit.speed.decode_total)
    assert fit.cost_input == pytest.approx(0.001 * 1e6 / fit.speed.prefill)


def test_a_quantized_name_is_planned_as_such() -> None:
    assert plan("llama3.1:8b-instruct-q4_K_M").as_dict()["weights"] == "q4_k_m"


def test_fp8_is_faster_only_where_there_are_units_for_it() -> None:
    for name, gain in (("h100", 1979 / 989), ("a100-80gb", 1.0)):
        pace = {
            w: plan("llama-3.1-8b", device=name, weights=w, prompt=4096).first.speed.prefill for w in ("bf16", "fp8")
        }
        assert pace["fp8"] / pace["bf16"] == pytest.approx(gain, rel=0.01)


def test_formats_get_smaller_in_order() -> None:
    sizes = [
        plan("llama-3.1-8b", weights=w).setup.weight_bytes.total for w in ("f32", "bf16", "int8", "q6_k", "q4_k_m")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert {"bf16", "f16", "f32", "int8", "int4", "fp8", "q4_k_m", "q8_0"} <= SCHEMES.keys()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"weights": "int3"}, "choose f32, bf16"),
        ({"kv": "int2"}, "choose f32, bf16"),
        ({"device": "h300"}, "choose cpu, b200"),
        ({"device": "custom", "memory": 10}, "needs --bandwidth, --flops"),
        ({"memory": 10}, "add --device custom"),
        ({"device": "cpu", "devices": 2}, "this machine is one"),
        ({"device": "h100", "bandwidth": -1.0}, "--bandwidth is -1"),
        ({"context": 10, "prompt": 11}, "does not fit into a context of 10"),
        ({"batch": 0}, "--batch is 0"),
    ],
)
def test_nonsense_is_refused(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan("llama-3.1-8b", **kwargs)


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match=r"nearest are .*llama-3\.1-8b"):
        plan("lama-3.1-8b")


def test_a_longer_context_than_the_model_was_made_for_is_said() -> None:
    found = plan("llama-2-7b", context=8192, device="h100")
    assert any("made for 4,096 tokens" in note for note in found.assumptions)


def test_this_machine_respects_container_limits(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16000000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    assert this_machine(tmp_path).memory == 16_000_000 * 1024
    group = tmp_path / "sys/fs/cgroup/a"
    (group / "b").mkdir(parents=True)
    (group / "b/memory.max").write_text("max\n")
    (group / "memory.max").write_text(f"{4 * GIB}\n")
    (group / "cpu.max").write_text("100000 100000\n")
    limited = this_machine(tmp_path)
    assert limited.memory == 4 * GIB
    assert limited.tflops == pytest.approx(0.05)
    assert any("bandwidth" in note for note in limited.assumed)
    old = tmp_path / "sys/fs/cgroup/memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text(str(GIB))
    assert this_machine(tmp_path).memory == GIB


def test_devices_have_sources() -> None:
    assert {"h200", "h100", "a100-80gb", "rtx4090", "rtx3090", "m3-max"} <= DEVICES.keys()
    for name in COMMON:
        found = device(name)
        assert found.source
        assert found.memory > GIB
    given = plan("nano", device="rtx4090", bandwidth=500.0).first.device
    assert given.bandwidth == 500e9
    assert given.memory == DEVICES["rtx4090"].memory
    custom = plan("nano", device="custom", memory=2, bandwidth=100, flops=1).first.device
    assert replace(custom, source="") == replace(custom, memory=2 * GIB, bandwidth=100e9, tflops=1, source="")


def test_it_takes_no_torch_and_no_time() -> None:
    code = (
        "import sys, time; import herd; herd.plan('llama-3.1-405b'); herd.plan('llama-4-behemoth');"
        "print(time.process_time()); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) < 1.0, "seconds of processor time, start of the process included"


def test_the_result_is_a_plan() -> None:
    assert isinstance(plan("nano"), Plan)
