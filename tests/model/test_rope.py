"""Rotary frequencies and rotation against transformers and against complex arithmetic; what survives a move."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import Llama4TextConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from herd.model.config import ModelConfig, RopeScaling, Temper
from herd.model.llama import Llama
from herd.model.presets import RELEASES
from herd.model.release import Release
from herd.model.rope import Rope, Temperature, frequencies, rotate
from tests.build import TINY, build, tiny, tokens

BUILT = [release for release in RELEASES if release.config is not None]


def transformers_frequencies(config: ModelConfig) -> torch.Tensor:
    """The same table by transformers' functions."""
    kind = LlamaConfig if config.temper is None else Llama4TextConfig
    scaling = config.rope_scaling
    parameters: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        parameters |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    theirs = kind(
        hidden_size=config.dim,
        num_attention_heads=config.n_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_seq_len,
        rope_parameters=parameters,
    )
    if scaling is None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_theta**exponents)
    table, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](theirs)
    assert attention_factor == 1.0
    return table


@pytest.mark.parametrize("release", BUILT, ids=lambda r: r.id)
def test_frequencies_equal_transformers_bit_for_bit(release: Release) -> None:
    config = release.config
    assert config is not None
    ours = frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, transformers_frequencies(config))


def test_every_branch_of_the_scaling_rule() -> None:
    """Short wavelengths unchanged, long ones divided, those between blended; Scout's rule is a step."""
    plain = frequencies(128, 500_000.0)
    wavelength = 2 * math.pi / plain
    scaled = frequencies(128, 500_000.0, RopeScaling(factor=8.0))
    short, long = wavelength < 2048, wavelength > 8192
    between = ~short & ~long
    assert short.any()
    assert long.any()
    assert between.any()
    assert torch.equal(scaled[short], plain[short])
    assert torch.equal(scaled[long], plain[long] / 8)
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()
    step = frequencies(128, 500_000.0, RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0))
    assert torch.equal(step, torch.where(long, plain / 16, plain))


def test_rotation_is_a_complex_product() -> None:
    rope = Rope(tiny("llama-3.1"))
    positions = torch.tensor([0, 1, 8191, 131_071])
    x = torch.randn(2, 4, 3, 16)
    angles = positions[:, None].float() * rope.inv_freq
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    ours = rotate(x, rope(positions))
    assert torch.allclose(ours, torch.view_as_real(turned).flatten(-2), rtol=0, atol=1e-6)
    assert torch.equal(ours[:, 0], x[:, 0])  # position 0 stays


def test_positions_of_ten_million() -> None:
    """Scout's context: no table is held, and fp32 still tells neighbouring positions apart."""
    config = next(release.config for release in BUILT if release.id == "llama-4-scout")
    assert config is not None
    rope = Rope(config)
    assert sum(buffer.numel() for buffer in rope.buffers()) == 64
    rotary = rope(torch.tensor([10_485_758, 10_485_759]))
    assert not torch.equal(rotary.cos[0], rotary.cos[1])


@pytest.mark.parametrize("move", ["bfloat16", "half", "to", "deepcopy"])
def test_frequencies_survive_a_move(move: str) -> None:
    """Casting a model never rounds its angles."""
    model = build("llama-3.1")
    exact = model.rope.inv_freq.clone()
    moved = {
        "bfloat16": lambda: model.bfloat16(),
        "half": lambda: model.half(),
        "to": lambda: model.to("cpu", torch.bfloat16),
        "deepcopy": lambda: copy.deepcopy(model).to(torch.bfloat16),
    }[move]()
    assert moved.tok_embeddings.weight.dtype in (torch.bfloat16, torch.float16)
    assert moved.rope.inv_freq.dtype == torch.float32
    assert torch.equal(moved.rope.inv_freq, exact)


@pytest.mark.parametrize("name", TINY)
def test_meta_models_become_real(name: str) -> None:
    """Built without storage, given some, filled: the same model, frequencies included."""
    real = build(name)
    with torch.device("meta"):
        empty = Llama(tiny(name))
    assert {p.device.type for p in (*empty.parameters(), *empty.buffers())} == {"meta"}
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(real.state_dict())
    ids = tokens(tiny(name), 9)
    with torch.no_grad():
        assert torch.equal(filled(ids), real(ids))
    assert not [key for key in real.state_dict() if "rope" in key]


def test_temperature_steps() -> None:
    """Exactly one below position 8,191, then by the logarithm of whole multiples."""
    place = Temperature(Temper())
    rope = Rope(tiny("llama-4-scout"))
    positions = torch.tensor([0, 8190, 8191, 16_382, 16_383, 10_485_759])
    q = torch.ones(6, 1, 16)
    scaled, untouched = place(q, q, rope(positions))
    steps = [0, 0, 1, 1, 2, 1280]
    expected = torch.tensor([1 + 0.1 * math.log(n + 1) for n in steps])
    assert torch.allclose(scaled[:, 0, 0], expected, rtol=1e-6)
    assert scaled[0, 0, 0] == scaled[1, 0, 0] == 1
    assert untouched is q
