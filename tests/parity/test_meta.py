"""Logits equal those of Meta's own model code (llama-models): Llama 3 for the dense family, Llama 4 for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from herd.model.config import RopeScaling, irope
from tests.build import DENSE, LLAMA4, build, tiny, tokens
from tests.parity.meta import meta_llama3, meta_llama4, meta_logits
from tests.parity.test_transformers import FP32_BOUND

Measured = Callable[[str, str, float], None]
TABLE = "fp32 logits against Meta's llama-models, max abs difference"


def _as_meta_runs_it(name: str):
    """Meta's reference applies factor 8 to every scaled model and does not read the file; 3.2 1B and 3B were made with 32."""
    config = tiny(name)
    return replace(config, rope_scaling=RopeScaling(factor=8.0)) if name == "llama-3.2" else config


@pytest.mark.parametrize("name", DENSE | LLAMA4)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 100])
def test_logits_equal(name: str, length: int, measured: Measured) -> None:
    model = build(_as_meta_runs_it(name))
    meta = (meta_llama3 if name in DENSE else meta_llama4)(model, length)
    ids = tokens(model.config, length, batch=2)
    with torch.no_grad():
        worst = float((model(ids) - meta_logits(meta, ids)).abs().max())
    measured(TABLE, name, worst)
    assert worst <= FP32_BOUND


@pytest.mark.parametrize("name", DENSE)
def test_meta_cache(name: str, measured: Measured) -> None:
    """Meta's incremental decoding gives the logits of our full forward."""
    model = build(_as_meta_runs_it(name))
    meta = meta_llama3(model, 30)
    ids = tokens(model.config, 30, batch=2)
    with torch.no_grad():
        worst = float((model(ids) - meta_logits(meta, ids, (11, 1, 1, 7, 1, 9))).abs().max())
    measured(TABLE, f"{name}, step by step", worst)
    assert worst <= FP32_BOUND


@pytest.mark.slow
def test_real_chunk_and_temperature(measured: Measured) -> None:
    """Llama 4's chunk of 8,192 and temperature from position 8,191, against the code that defines them."""
    small = replace(tiny("llama-guard-4"), dim=16, n_heads=1, head_dim=16)
    layers = irope(2, nope=[1], chunk=8192)
    assert small.temper is not None
    model = build(replace(small, layers=layers, temper=replace(small.temper, floor_scale=8192.0)))
    ids = tokens(model.config, 8192 + 60)
    with torch.no_grad():
        worst = float((model(ids) - meta_logits(meta_llama4(model, 8252), ids)).abs().max())
    measured(TABLE, "llama-4, 8,252 tokens, chunk 8,192", worst)
    assert worst <= FP32_BOUND
