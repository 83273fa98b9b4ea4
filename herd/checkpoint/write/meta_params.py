"""ModelConfig -> params.json: the inverse of `checkpoint.meta_config`.

Meta's keys come first, and only those that a release of this kind has: its code for Llama 1 and 2 fails on keys that it does not
know, and that for Llama 3 and 4 on `max_seq_len`. The feed-forward width follows from Meta's rule, so a pair of `multiple_of`
and `ffn_dim_multiplier` is searched that gives it exactly. What no key of Meta's can say stands in the object `herd`.
Source: llama-models models/llama3/args.py, models/llama4/args.py, moe.py, model.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from herd.checkpoint.gguf_own import own_text
from herd.checkpoint.meta_config import EXPERT, OWN, OWN_SIZES, read_params
from herd.checkpoint.write.hf_config import is_dense
from herd.errors import ConfigError
from herd.model.config import LayerSpec, ModelConfig, hidden_dim_of

__all__ = ["Params", "params_json"]

_MULTIPLES = (256, 1024, 4096, 2048, 512, 128, 64, 32, 16, 8, 4, 2, 1)
"""What widths are rounded up to, the released values first."""

_EXP = 4.0


@dataclass(frozen=True, slots=True)
class Params:
    """params.json, and what Meta's own code would get wrong because only herd reads it (empty: nothing)."""

    data: dict[str, Any]
    only_herd: tuple[str, ...]


def params_json(config: ModelConfig) -> Params:
    """params.json of `config`; what is written reads back as `config`. Raises ConfigError when it would not."""
    fused = not is_dense(config)
    data = _llama4(config) if fused else _dense(config)
    seen = _read(data, config, fused)
    own = [f.name for f in fields(ModelConfig) if getattr(seen, f.name) != getattr(config, f.name)]
    if own:
        data[OWN] = _own(config, seen, own)
    found = _read(data, config, fused)
    if found != config:
        names = [f.name for f in fields(ModelConfig) if getattr(found, f.name) != getattr(config, f.name)]
        raise ConfigError(f"params.json cannot say what this model is: {', '.join(names)} would read back differently")
    used = any(spec.placement == "tempered" for spec in config.layers)
    told = [name for name in own if name != "max_seq_len" and (used or name != "temper")]
    if not fused:  # Meta's code for dense models ignores these, too; it stretches all frequencies by 8
        told += [key for key in ("head_dim", "rope_scaling_factor", "rope_high_freq_factor") if key in data]
    return Params(data, tuple(told))


def _read(data: dict[str, Any], config: ModelConfig, fused: bool) -> ModelConfig:
    return read_params(data, "params.json", fused=fused, rows=config.vocab_size, output=not config.tie_embeddings)


def _own(config: ModelConfig, seen: ModelConfig, names: list[str]) -> dict[str, Any]:
    """The object `herd`: the fields `names` of `config`."""
    own: dict[str, Any] = json.loads(own_text(config, [n for n in names if n not in (*OWN_SIZES, "moe")]))
    own |= {name: getattr(config, name) for name in names if name in OWN_SIZES}
    if "moe" in names and config.moe and seen.moe:
        own[EXPERT] = config.moe.hidden_dim
    return own


def _common(c: ModelConfig) -> dict[str, Any]:
    data: dict[str, Any] = {"dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads}
    if c.n_kv_heads != c.n_heads:
        data["n_kv_heads"] = c.n_kv_heads
    data |= {"vocab_size": c.vocab_size, "norm_eps": c.norm_eps}
    if c.tie_embeddings:
        data["tie_embeddings"] = True
    return data


def _dense(c: ModelConfig) -> dict[str, Any]:
    data = _common(c) | _width(c.dim, c.hidden_dim)
    if c.rope_theta != 10_000.0:
        data["rope_theta"] = c.rope_theta
    if c.head_dim * c.n_heads != c.dim:
        data["head_dim"] = c.head_dim
    if c.rope_scaling is not None:
        data["use_scaled_rope"] = True
        _scale(c, data)
    return data


def _llama4(c: ModelConfig) -> dict[str, Any]:
    free = [i for i, spec in enumerate(c.layers) if spec.placement in ("none", "tempered")]
    rotary = [spec for i, spec in enumerate(c.layers) if i not in set(free)] or [LayerSpec(placement="rope_norm")]
    data = _common(c) | {
        "n_kv_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "rope_theta": c.rope_theta,
        "use_qk_norm": rotary[0].placement == "rope_norm",
        "attn_temperature_tuning": any(spec.placement == "tempered" for spec in c.layers),
        "ffn_exp": _EXP,
    }
    if rotary[0].chunk is not None:
        data["attention_chunk_size"] = rotary[0].chunk
    if free:
        data["nope_layer_interval"] = free[0] + 1
    if c.temper is not None:
        data |= {"floor_scale": c.temper.floor_scale, "attn_scale": c.temper.attn_scale}
    if c.rope_scaling is not None:
        data["use_scaled_rope"] = True
        _scale(c, data)
    return data | _widths(c)


def _scale(c: ModelConfig, data: dict[str, Any]) -> None:
    """Factors of the frequency scaling, where they are not what a release of this size has."""
    assert c.rope_scaling is not None
    for key, value, name in (
        ("rope_scaling_factor", c.rope_scaling.factor, "factor"),
        ("rope_high_freq_factor", c.rope_scaling.high_freq_factor, "high_freq_factor"),
    ):
        seen = _read(data | _widths(c), c, not is_dense(c)).rope_scaling
        assert seen is not None
        if getattr(seen, name) != value:
            data[key] = value


def _width(dim: int, hidden: int) -> dict[str, Any]:
    """multiple_of and ffn_dim_multiplier with which Meta's rule gives `hidden`: there is always a pair."""
    for multiple, factor in _pairs(dim, hidden):
        if hidden_dim_of(dim, multiple_of=multiple, ffn_dim_multiplier=factor) == hidden:
            return {"multiple_of": multiple} | ({} if factor is None else {"ffn_dim_multiplier": factor})
    raise ConfigError(f"no multiple_of and ffn_dim_multiplier give hidden_dim {hidden} for dim {dim}")


def _widths(c: ModelConfig) -> dict[str, Any]:
    """The same for Llama 4, where one pair gives the width of dense layers and of experts; Meta's code insists on both."""
    if c.moe is None:
        return _width(c.dim, c.hidden_dim)
    step = 1 + next(i for i, spec in enumerate(c.layers) if spec.moe)
    moe: dict[str, Any] = {"num_experts": c.moe.n_experts, "top_k": c.moe.top_k, "interleave_moe_layer_step": step}
    for capacity in _capacities(c.hidden_dim, c.moe.hidden_dim):
        for multiple, factor in _pairs(c.dim, c.hidden_dim):
            wide = int((1.0 if factor is None else factor) * int(2 * int(_EXP * c.dim) / 3))
            expert = wide if capacity is None else int(wide / (capacity + 1))
            rounded = tuple(width + -width % multiple for width in (wide, expert))
            if rounded == (c.hidden_dim, c.moe.hidden_dim):
                scale = {"auto_scale_F": capacity is not None, "capacity_factor": capacity or 1.0}
                pair = {"multiple_of": multiple, "ffn_dim_multiplier": 1.0 if factor is None else factor}
                return pair | {"moe_args": moe | scale}
    # Experts wider than dense layers: Meta's rule has no such models.
    return {"ffn_dim_multiplier": 1.0} | _width(c.dim, c.hidden_dim) | {"moe_args": moe}


def _capacities(hidden: int, expert: int) -> Iterator[float | None]:
    """Values of capacity_factor, which only divides the width of experts; None: experts as wide as dense layers."""
    yield 1.0
    yield None
    if hidden > expert + 0.5:
        yield hidden / (expert + 0.5) - 1


def _pairs(dim: int, hidden: int) -> Iterator[tuple[int, float | None]]:
    """Candidates, plain numbers first; the last one always gives `hidden`."""
    base = int(2 * int(_EXP * dim) / 3)
    multiples = [m for m in _MULTIPLES if hidden % m == 0]
    for multiple in multiples:
        yield multiple, None
        for digits in (1, 2, 3):
            for width in (hidden, hidden - multiple / 2):
                yield multiple, round(width / base, digits)
    for multiple in multiples:
        for shift in (0.5, 0.25, 0.75):
            yield multiple, (hidden + shift - (multiple - 1) / 2) / base
    yield 1, (hidden + 0.5) / base
