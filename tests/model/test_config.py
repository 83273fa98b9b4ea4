"""ModelConfig refuses what cannot be built, naming the field."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from herd.errors import ConfigError
from herd.model.config import (
    MAX_LAYERS,
    LayerSpec,
    ModelConfig,
    MoEConfig,
    RopeScaling,
    Temper,
    hidden_dim_of,
    irope,
    plain,
)
from tests.build import tiny

NUMBERS = [field.name for field in fields(ModelConfig) if field.type in ("int", "float")]
WHOLE = [field.name for field in fields(ModelConfig) if field.type == "int"]


BAD = {
    "zero": 0,
    "negative": -1,
    "nan": math.nan,
    "infinity": math.inf,
    "400 digits": 10**400,
    "5000 digits": 10**5000,
    "true": True,
    "text": "8",
    "none": None,
    "list": [8],
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_must_be_positive_and_finite(name: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(tiny("llama-3"), **{name: bad})


@pytest.mark.parametrize("name", WHOLE)
def test_sizes_must_be_whole(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 8.0: expected a positive integer"):
        replace(tiny("llama-3"), **{name: 8.0})


def test_a_long_number_does_not_fill_the_screen() -> None:
    with pytest.raises(ConfigError) as caught:
        replace(tiny("llama-3"), dim=-(10**400))
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"layers": ()}, "0 layers"),
        ({"layers": (LayerSpec(),) * (MAX_LAYERS + 1)}, f"{MAX_LAYERS + 1} layers"),
        ({"layers": [LayerSpec()]}, "layers"),
        ({"layers": ("rope",)}, "layers"),
        ({"tie_embeddings": 1}, "tie_embeddings"),
        ({"moe": MoEConfig(n_experts=4, hidden_dim=8)}, "moe"),
        ({"layers": irope(4, moe_layers=[1])}, "moe"),
        ({"layers": irope(4)}, "temper"),
    ],
)
def test_parts_must_fit_together(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replace(tiny("llama-3"), **change)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MoEConfig(n_experts=4, top_k=5, hidden_dim=8), "top_k 5"),
        (lambda: MoEConfig(n_experts=0, hidden_dim=8), "n_experts"),
        (lambda: RopeScaling(factor=0), "factor"),
        (lambda: RopeScaling(factor=8, original_max_seq_len=-1), "original_max_seq_len"),
        (lambda: RopeScaling(factor=8, low_freq_factor=4, high_freq_factor=1), "high_freq_factor 1"),
        (lambda: Temper(floor_scale=0), "floor_scale"),
        (lambda: Temper(attn_scale=math.nan), "attn_scale"),
        (lambda: LayerSpec(placement="alibi"), "placement 'alibi'"),  # type: ignore[arg-type]
        (lambda: LayerSpec(chunk=0), "chunk"),
        (lambda: LayerSpec(moe=1), "moe"),  # type: ignore[arg-type]
        (lambda: plain(0), "n_layers"),
        (lambda: plain(True), "n_layers"),
        (lambda: plain(10**9), "n_layers"),
        (lambda: irope(-1), "n_layers"),
    ],
)
def test_parts_are_checked(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_configs_are_values() -> None:
    """Equal when their numbers are, usable as keys, unchangeable."""
    config = tiny("llama-4-scout")
    assert config == replace(config)
    assert hash(config) == hash(replace(config))
    with pytest.raises(FrozenInstanceError):
        config.dim = 3  # type: ignore[misc]


def test_irope_pattern() -> None:
    layers = irope(8, chunk=16, moe_layers=(1, 3))
    assert [spec.placement for spec in layers] == (["rope_norm"] * 3 + ["tempered"]) * 2
    assert [spec.chunk for spec in layers] == ([16] * 3 + [None]) * 2
    assert [spec.moe for spec in layers] == [False, True, False, True] + [False] * 4
    assert irope(8, nope=[3, 7]) == irope(8)
    assert {spec.placement for spec in irope(8, nope=[], qk_norm=False)} == {"rope"}
    assert irope(4, temper=False)[3].placement == "none"


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (4096, 256, None, 11_008),
        (8192, 4096, 1.3, 28_672),
        (4096, 1024, 1.3, 14_336),
        (16_384, 4096, 1.2, 53_248),
        (2048, 256, 1.5, 8192),
        (5120, 2048, 1.2, 16_384),
    ],
)
def test_feed_forward_width_rule(dim: int, multiple_of: int, multiplier: float | None, width: int) -> None:
    assert hidden_dim_of(dim, multiple_of=multiple_of, ffn_dim_multiplier=multiplier) == width
