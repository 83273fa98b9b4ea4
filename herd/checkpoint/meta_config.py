"""params.json -> ModelConfig, for Llama 1 to 3.3 and Llama 4.

params.json leaves things out that the tensors or the size of the model tell: the vocabulary of Llama 1 and 2, tied
embeddings, the context, and the frequency scaling factor of Llama 3.2. Source: llama-models models/llama3/args.py,
models/llama4/args.py and model.py.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from herd.checkpoint.fields import Fields, named
from herd.checkpoint.gguf_own import own_facts
from herd.checkpoint.limits import plausible
from herd.model.config import MAX_LAYERS, ModelConfig, MoEConfig, RopeScaling, Temper, hidden_dim_of, irope, plain

__all__ = ["EXPERT", "OWN", "OWN_SIZES", "read_params"]

SMALL_DIMS = (2048, 3072)
"""Widths of Llama 3.2 1B and 3B and what was pruned from them: the only released models whose frequencies are stretched by 32
(Meta's code ignores the factor) and whose output is tied to the embedding."""

_KNOWN = {
    "attention_chunk_size", "attn_scale", "attn_temperature_tuning", "dim", "ffn_dim_multiplier", "ffn_exp", "floor_scale",
    "head_dim", "lora_args", "max_batch_size", "max_seq_len", "moe_args", "multiple_of", "n_heads", "n_kv_heads", "n_layers",
    "herd", "nope_layer_interval", "norm_eps", "quantization_args", "rope_high_freq_factor", "rope_scaling_factor", "rope_theta",
    "tie_embeddings", "use_qk_norm", "use_scaled_rope", "vision_args", "vocab_size",
}  # fmt: skip

OWN = "herd"
"""A key of herd's own: an object with what Meta's keys cannot say of a model, which Meta's code does not read."""

EXPERT = "expert_hidden_dim"
OWN_SIZES = ("hidden_dim", "max_seq_len", EXPERT)

_VISION = ("vision_model", "vision_chunk_size", "vision_max_num_chunks", "vision_num_cross_attention_layers")


def read_params(data: Mapping[str, Any], where: str, *, fused: bool, rows: int, output: bool) -> ModelConfig:
    """The model in params.json, from the file `where`. Raises ConfigError naming the key that cannot be honoured.

    From the tensors: `fused` says that attention matrices are fused (Llama 4), `rows` how many the embedding has, `output`
    that there is an output matrix of its own.
    """
    f = Fields(data, where)
    for key in _VISION:
        if f.data.get(key) not in (None, -1, False):
            f.fail(key, "is set: Llama 3.2 Vision is not runnable yet, herd reads text models")
    unknown = sorted(data.keys() - _KNOWN - set(_VISION))
    if unknown:
        warnings.warn(f"{where}: unknown keys are ignored: {', '.join(unknown)[:200]}", stacklevel=2)
    if f.whole("n_layers") > MAX_LAYERS:
        f.fail("n_layers", f"is {data['n_layers']}: no Llama has more than {MAX_LAYERS} layers")
    with named(where):
        return plausible(_own(f, _llama4(f, rows, output) if fused else _dense(f, rows, output)), where)


def _own(f: Fields, config: ModelConfig) -> ModelConfig:
    """What the object `herd` says in addition: see `herd.checkpoint.write.meta_params`, which writes it."""
    own = f.object(OWN)
    if own is None:
        return config
    sizes = {name: own.whole(name) for name in OWN_SIZES if own.has(name)}
    rest = {key: value for key, value in own.data.items() if key not in OWN_SIZES}
    try:
        facts = own_facts(json.dumps(rest), Path(f.where))
    except RecursionError:
        f.fail(OWN, "is nested too deeply")
    if len(facts.get("layers", config.layers)) != config.n_layers:
        own.fail("layers", f"has {len(facts['layers'])} entries for {config.n_layers} layers")
    expert = sizes.pop(EXPERT, None)
    if expert is not None:
        if config.moe is None:
            own.fail(EXPERT, "is given, but this model has no experts")
        facts["moe"] = replace(config.moe, hidden_dim=expert)
    return replace(config, **sizes, **facts)


def _dense(f: Fields, rows: int, output: bool) -> ModelConfig:
    dim, heads = f.whole("dim"), f.whole("n_heads")
    scaled, groups = f.flag("use_scaled_rope", False), f.whole("n_kv_heads", heads)
    theta, eps = f.number("rope_theta", 10_000.0), f.number("norm_eps", 1e-5)
    return ModelConfig(
        dim=dim,
        n_heads=heads,
        n_kv_heads=groups,
        head_dim=_head_dim(f, dim, heads),
        hidden_dim=_hidden_dim(f, dim),
        vocab_size=_vocab_size(f, rows),
        layers=plain(f.whole("n_layers")),
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=_scaling(f, 32.0 if dim in SMALL_DIMS else 8.0, 4.0) if scaled else None,
        max_seq_len=f.whole("max_seq_len", _context(theta, eps, scaled, dim == 8192 and groups == heads)),
        tie_embeddings=f.flag("tie_embeddings", scaled and dim in SMALL_DIMS and not output),
    )


def _llama4(f: Fields, rows: int, output: bool) -> ModelConfig:
    dim, heads, count = f.whole("dim"), f.whole("n_heads"), f.whole("n_layers")
    scaled, every = f.flag("use_scaled_rope", False), f.whole("nope_layer_interval", None)
    moe = f.object("moe_args")
    step = 1 if moe is None else moe.whole("interleave_moe_layer_step", 1)
    return ModelConfig(
        dim=dim,
        n_heads=heads,
        n_kv_heads=f.whole("n_kv_heads", heads),
        head_dim=_head_dim(f, dim, heads),
        hidden_dim=_hidden_dim(f, dim),
        vocab_size=_vocab_size(f, rows),
        layers=irope(
            count,
            nope=() if every is None else None,
            nope_every=every or 1,
            chunk=f.whole("attention_chunk_size", None),
            moe_layers=() if moe is None else range(step - 1, count, step),
            qk_norm=f.flag("use_qk_norm", False),
            temper=f.flag("attn_temperature_tuning", False),
        ),
        norm_eps=f.number("norm_eps", 1e-5),
        rope_theta=f.number("rope_theta", 500_000.0),
        rope_scaling=_scaling(f, 16.0, 1.0) if scaled else None,
        max_seq_len=f.whole("max_seq_len", 10_485_760 if scaled else 1_048_576),
        tie_embeddings=f.flag("tie_embeddings", False) and not output,
        moe=None if moe is None else _moe(f, moe, dim),
        temper=Temper(floor_scale=f.number("floor_scale", 8192.0), attn_scale=f.number("attn_scale", 0.1)),
    )


def _head_dim(f: Fields, dim: int, heads: int) -> int:
    if dim % heads and not f.has("head_dim"):
        f.fail("n_heads", f"is {heads}, which does not divide dim {dim}")
    return f.whole("head_dim", max(dim // heads, 1))


def _hidden_dim(f: Fields, dim: int) -> int:
    return hidden_dim_of(
        dim,
        multiple_of=f.whole("multiple_of", 256),
        ffn_dim_multiplier=f.number("ffn_dim_multiplier", None),
    )


def _moe(f: Fields, moe: Fields, dim: int) -> MoEConfig:
    """Experts share the width of one dense layer between the routed and the shared one (`auto_scale_F`)."""
    hidden = int(f.number("ffn_dim_multiplier", 1.0) * int(2 * int(f.number("ffn_exp", 4.0) * dim) / 3))
    if moe.flag("auto_scale_F", True):
        hidden = int(hidden / (moe.number("capacity_factor", 1.0) + 1))
    multiple = f.whole("multiple_of", 256)
    return MoEConfig(
        n_experts=moe.whole("num_experts"),
        top_k=moe.whole("top_k", 1),
        hidden_dim=hidden + -hidden % multiple,
    )


def _vocab_size(f: Fields, rows: int) -> int:
    """Llama 1 and 2 say -1: the embedding has the number."""
    return rows if f.data.get("vocab_size", -1) == -1 else f.whole("vocab_size")


def _scaling(f: Fields, factor: float, high: float) -> RopeScaling:
    return RopeScaling(
        factor=f.number("rope_scaling_factor", factor), high_freq_factor=f.number("rope_high_freq_factor", high)
    )


def _context(theta: float, eps: float, scaled: bool, largest: bool) -> int:
    """The trained context, which params.json does not say, from what sets the generations apart.

    `largest` is Llama 1 65B: the only one without grouped heads at its width, and with the epsilon of Llama 2.
    """
    if scaled:
        return 131_072  # 3.1 and later
    if theta >= 1_000_000:
        return 16_384  # Code Llama
    if theta >= 500_000:
        return 8192  # Llama 3
    return 2048 if eps < 5e-6 or largest else 4096  # Llama 1, Llama 2
