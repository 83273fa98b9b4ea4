"""config.json -> ModelConfig. A closed schema: known keys are honoured or refused by name, unknown ones named in a warning.

Both spellings of rotary settings are read: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`.
Source: transformers configuration_llama.py and configuration_llama4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from herd.checkpoint.fields import Fields, named
from herd.checkpoint.hf_keys import check_keys, check_rope
from herd.checkpoint.limits import plausible
from herd.checkpoint.names import Column
from herd.errors import ConfigError
from herd.files import short
from herd.model.config import MAX_LAYERS, LayerSpec, ModelConfig, MoEConfig, Placement, RopeScaling, Temper, plain

__all__ = ["HFModel", "read_config"]


class HFModel(NamedTuple):
    """What config.json describes: the text model, its column of the name table, and the prefix of its tensors."""

    config: ModelConfig
    column: Column
    prefix: Literal["", "language_model."]


def read_config(data: Mapping[str, Any], where: str) -> HFModel:
    """config.json as parsed, from the file `where`. Raises ConfigError naming the key that cannot be honoured."""
    with named(where):
        return _read(data, where)


def _read(data: Mapping[str, Any], where: str) -> HFModel:
    top = Fields(data, where)
    kind = top.text("model_type", "")
    if kind in ("mllama", "mllama_text_model"):
        raise ConfigError(
            f"{where}: Llama 3.2 Vision (model_type {kind!r}) is not runnable yet: herd reads text models"
        )
    if kind not in ("llama", "llama4", "llama4_text"):
        top.fail("model_type", f"is {short(kind or None)}: herd knows 'llama', 'llama4' and 'llama4_text'")
    check_keys(top, kind)
    if kind == "llama":
        return HFModel(plausible(_dense(top), where), "hf", "")
    if kind == "llama4_text":
        return HFModel(plausible(_llama4(top), where), "hf4", "")
    text = top.object("text_config")
    if text is None:
        top.fail("text_config", "is missing")
    check_keys(text, "llama4_text")
    return HFModel(plausible(_llama4(text), where), "hf4", "language_model.")


def _dense(f: Fields) -> ModelConfig:
    _refuse_variants(f)
    dim, heads = f.whole("hidden_size"), f.whole("num_attention_heads")
    return ModelConfig(
        dim=dim,
        n_heads=heads,
        n_kv_heads=f.whole("num_key_value_heads", heads),
        head_dim=_head_dim(f, dim, heads),
        hidden_dim=f.whole("intermediate_size"),
        vocab_size=f.whole("vocab_size"),
        layers=plain(_layers(f)),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        rope_theta=_theta(f, 10_000.0),
        rope_scaling=_scaling(f),
        max_seq_len=f.whole("max_position_embeddings", 2048),
        tie_embeddings=f.flag("tie_word_embeddings", False),
    )


def _llama4(f: Fields) -> ModelConfig:
    _refuse_variants(f)
    count, experts = _layers(f), set(_moe_layers(f))
    return ModelConfig(
        dim=f.whole("hidden_size"),
        n_heads=f.whole("num_attention_heads"),
        n_kv_heads=f.whole("num_key_value_heads", f.whole("num_attention_heads")),
        head_dim=f.whole("head_dim", 128),
        hidden_dim=f.whole("intermediate_size_mlp", 16384),
        vocab_size=f.whole("vocab_size"),
        layers=_llama4_layers(f, count, experts),
        norm_eps=f.number("rms_norm_eps", 1e-5),
        rope_theta=_theta(f, 500_000.0),
        rope_scaling=_scaling(f),
        max_seq_len=f.whole("max_position_embeddings", 131_072),
        tie_embeddings=f.flag("tie_word_embeddings", False),
        moe=_moe(f) if experts else None,
        temper=Temper(floor_scale=f.number("floor_scale", 8192.0), attn_scale=f.number("attn_scale", 0.1)),
    )


def _refuse_variants(f: Fields) -> None:
    """Switches of the Hugging Face classes that no released Llama uses and this decoder does not have."""
    f.refuse("attention_bias", "attention biases are not part of any Llama")
    f.refuse("mlp_bias", "feed-forward biases are not part of any Llama")
    act = f.text("hidden_act", "silu")
    if act not in ("silu", "swish"):
        f.fail("hidden_act", f"is {short(act)}: Llamas use 'silu'")


def _layers(f: Fields) -> int:
    count = f.whole("num_hidden_layers")
    if count > MAX_LAYERS:
        f.fail("num_hidden_layers", f"is {count}: no Llama has more than {MAX_LAYERS} layers")
    return count


def _head_dim(f: Fields, dim: int, heads: int) -> int:
    if dim % heads and not f.has("head_dim"):
        f.fail("num_attention_heads", f"is {heads}, which does not divide hidden_size {dim}, and head_dim is not given")
    return f.whole("head_dim", max(dim // heads, 1))


def _theta(f: Fields, default: float) -> float:
    rope = f.object("rope_parameters")
    if rope is not None and rope.has("rope_theta"):
        return rope.number("rope_theta")
    return f.number("rope_theta", default)


def _scaling(f: Fields) -> RopeScaling | None:
    """Frequency scaling from rope_parameters or rope_scaling; only Llama 3.1's kind exists in the family."""
    rope = f.object("rope_parameters") or f.object("rope_scaling")
    if rope is None:
        return None
    check_rope(rope)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        rope.fail("rope_type", f"is {short(kind)}: herd knows 'default' and 'llama3'")
    return RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_seq_len=rope.whole("original_max_position_embeddings"),
    )


def _moe(f: Fields) -> MoEConfig:
    return MoEConfig(
        n_experts=f.whole("num_local_experts", 16),
        top_k=f.whole("num_experts_per_tok", 1),
        hidden_dim=f.whole("intermediate_size", 8192),
    )


def _moe_layers(f: Fields) -> list[int]:
    """Indices of the layers with experts: an explicit list (empty in Llama Guard 4), or every n-th layer."""
    count = _layers(f)
    listed = f.integers("moe_layers")
    if listed is None:
        step = f.whole("interleave_moe_layer_step", 1)
        return list(range(step - 1, count, step))
    if any(i >= count for i in listed):
        f.fail("moe_layers", f"names layer {max(listed)}, but there are {count}")
    return listed


def _llama4_layers(f: Fields, count: int, experts: set[int]) -> tuple[LayerSpec, ...]:
    """One LayerSpec per layer. `no_rope_layers` holds 1 where RoPE IS used; empty or missing is the every-4th pattern."""
    rotary = f.integers("no_rope_layers")
    if not rotary:
        every = f.whole("no_rope_layer_interval", 4)
        rotary = [int((i + 1) % every != 0) for i in range(count)]
    if len(rotary) < count:
        f.fail("no_rope_layers", f"has {len(rotary)} entries for {count} layers")
    local = _local_layers(f, rotary, count)
    chunk = f.whole("attention_chunk_size", None) if "attention_chunk_size" in f.data else 8192
    turned: Placement = "rope_norm" if f.flag("use_qk_norm", True) else "rope"
    free: Placement = "tempered" if f.flag("attn_temperature_tuning", True) else "none"
    return tuple(
        LayerSpec(placement=turned if rotary[i] else free, chunk=chunk if local[i] else None, moe=i in experts)
        for i in range(count)
    )


def _local_layers(f: Fields, rotary: list[int], count: int) -> list[bool]:
    """Which layers attend in chunks: `layer_types` where given, otherwise the rotary ones."""
    kinds = f.data.get("layer_types")
    if kinds is None:
        return [bool(r) for r in rotary[:count]]
    known = {"chunked_attention": True, "full_attention": False}
    if not isinstance(kinds, list) or len(kinds) < count or not all(isinstance(k, str) and k in known for k in kinds):
        f.fail("layer_types", f"is {short(kinds)}: expected {count} times 'chunked_attention' or 'full_attention'")
    return [known[k] for k in kinds[:count]]
