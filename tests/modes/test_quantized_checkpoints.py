"""A checkpoint that another tool quantized is one model: full, step by step and in every form that holds its values exactly.

Compared with the plain model of the same values. Where native kernels run, activations are rounded to 8 bits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from herd.checkpoint.fill import fill
from herd.checkpoint.names import homes, shapes
from herd.checkpoint.open import open_store
from herd.engine.cache import StaticCache
from herd.model.config import ModelConfig
from herd.quant.apply import dequantize
from tests.build import build, tiny, tokens
from tests.checkpoint.quantized.packers import write_quantized
from tests.checkpoint.quantized.test_floats import FORMS as FLOATS
from tests.checkpoint.quantized.test_floats import write_experts
from tests.checkpoint.quantized.test_integers import FORMS as INTEGERS
from tests.modes.test_modes import MODES_BOUND

ROUNDED = 0.2
"""Logits are of order one; products with inputs of 8 bits differ by a percent or two."""

GENERATIONS: dict[str, str] = {
    "llama-2": "gptq",
    "llama-2-70b": "gptq-act-order",
    "code-llama": "awq-gemv",
    "llama-3": "awq",
    "llama-3.1": "fbgemm",
    "llama-3.2": "nf4",
    "llama-guard-4": "packed-int4",
}
"""Generation -> form."""


def widened(config: ModelConfig) -> ModelConfig:
    """Whole groups of 32 columns in every matrix."""
    return replace(config, dim=64, n_heads=4, n_kv_heads=min(config.n_kv_heads, 4), hidden_dim=192)


@pytest.mark.filterwarnings("ignore:.*dequantized to")
@pytest.mark.parametrize("name", GENERATIONS)
def test_every_generation(name: str, tmp_path: Path) -> None:
    config = widened(tiny(name))
    form = GENERATIONS[name]
    pack, said, *_ = (INTEGERS | FLOATS)[form]
    model = build(config)

    def layers(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor] | None:
        return pack(weight) if ".layers." in module else None

    expected: dict[str, Any] = write_quantized(tmp_path, model, layers, said, dtype=torch.float16)
    store = open_store(tmp_path)
    assert len(expected) == 7 * config.n_layers
    for canonical, home in homes(config, "hf4" if config.temper else "hf").items():
        with torch.no_grad():
            wanted = expected.get(home.name)
            plain = model.get_parameter(canonical).half().float()
            model.get_parameter(canonical).copy_(plain if wanted is None else home.read(wanted, config))
    ids = tokens(config, 24, batch=2)
    exact = fill(store, dtype="float32")
    with torch.no_grad():
        logits = model(ids)
        assert (exact(ids) - logits).abs().max() <= MODES_BOUND
        kv = StaticCache(config, batch=2, max_len=24)
        for pieces in (torch.arange(15), torch.arange(15, 24)):
            stepped = exact(ids[:, pieces], pieces, kv.bind(pieces))
            assert (stepped - logits[:, pieces]).abs().max() <= MODES_BOUND
        held = fill(store, weights="stored")
        assert (held(ids).float() - logits).abs().max() <= ROUNDED
        twin = dequantize(held)
        if form not in ("nf4", "gptq-act-order"):
            assert torch.equal(
                twin.get_parameter("layers.1.attention.wq.weight"), model.get_parameter("layers.1.attention.wq.weight")
            )


@pytest.mark.filterwarnings("ignore:.*dequantized to")
def test_experts_in_fp8(tmp_path: Path) -> None:
    """Maverick as it is on the hub: routed experts one by one, FP8 with a scale per row, everything else in 16 bits."""
    config = tiny("llama-4-maverick")
    wanted = write_experts(tmp_path, build(config))
    store = open_store(tmp_path)
    model = build(config)
    with torch.no_grad():
        for canonical in shapes(config):
            if ".experts." in canonical:
                layer, kind = canonical.split(".")[1], {"w1": "gate", "w2": "down", "w3": "up"}[canonical[-2:]]
                base = f"model.layers.{layer}.feed_forward.experts"
                each = [wanted[f"{base}.{e}.{kind}_proj.weight"] for e in range(8)]
                model.get_parameter(canonical).copy_(torch.stack(each))
            else:
                model.get_parameter(canonical).copy_(model.get_parameter(canonical).bfloat16().float())
        ids = tokens(config, 24, batch=2)
        logits = model(ids)
        exact = fill(store, dtype="float32")
        assert (exact(ids) - logits).abs().max() <= MODES_BOUND
        kv = StaticCache(config, batch=2, max_len=24)
        for pieces in (torch.arange(15), torch.arange(15, 24)):
            stepped = exact(ids[:, pieces], pieces, kv.bind(pieces))
            assert (stepped - logits[:, pieces]).abs().max() <= MODES_BOUND
        held = dequantize(fill(store, weights="stored"))
        assert all(torch.equal(held.get_parameter(name), model.get_parameter(name)) for name in shapes(config))
