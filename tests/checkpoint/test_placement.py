"""Devices and dtypes by name: the same words everywhere, and what is not here is refused with what is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import herd
from herd.checkpoint.load import load_model
from herd.checkpoint.placement import device_named, dtype_named
from herd.errors import ConfigError
from tests.build import build
from tests.checkpoint.folders import write_hf


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ("float32", torch.float32),
        ("fp32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        ("fp16", torch.float16),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(value: Any, dtype: torch.dtype) -> None:
    assert dtype_named(value) == dtype_named(value, torch.bfloat16) == dtype


def test_auto_is_the_default() -> None:
    assert dtype_named("auto") is dtype_named(None) is None
    assert dtype_named("auto", torch.float16) == dtype_named(None, torch.float16) == torch.float16


@pytest.mark.parametrize("value", ["int8", "float", "", "q" * 999, torch.int8, torch.complex64, 16, [1]])
def test_unknown_dtypes(value: Any) -> None:
    with pytest.raises(ConfigError, match="choose auto, float32, bfloat16 or float16") as caught:
        dtype_named(value)
    assert len(str(caught.value)) < 300


def test_devices() -> None:
    assert device_named("cpu") == device_named(torch.device("cpu")) == torch.device("cpu")
    assert device_named("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["banana", "cuda:99", "cpu:x", "", "vulkan"])
def test_devices_that_are_not_here(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no device .*: choose cpu.* or auto"):
        device_named(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda() -> None:
    with pytest.raises(ConfigError, match=r"no device 'cuda': choose cpu"):
        device_named("cuda")


def test_load_takes_the_names(tmp_path: Path) -> None:
    write_hf(tmp_path, build("llama-3"))
    assert herd.load(tmp_path, dtype="bfloat16", device="auto")[0].norm.weight.dtype == torch.bfloat16
    assert load_model(tmp_path, "auto").norm.weight.dtype == torch.float32
    for wrong in ({"dtype": "int8"}, {"dtype": torch.int8}, {"device": "banana"}):
        with pytest.raises(ConfigError, match="choose"):
            herd.load(tmp_path, **wrong)
