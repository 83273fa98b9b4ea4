"""ModelConfig -> config.json, and sampling defaults -> generation_config.json: the inverse of `checkpoint.hf_config`.

Rotary settings are written as `rope_theta` and `rope_scaling`, which transformers 4 and 5 both read (5 alone knows
`rope_parameters`), and the dtype under both of its names. Source: transformers configuration_llama.py, configuration_llama4.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from herd.checkpoint.hf_config import read_config
from herd.checkpoint.store import GenerationDefaults
from herd.errors import ConfigError
from herd.model.config import LayerSpec, ModelConfig

__all__ = ["TokenIds", "carried_keys", "config_json", "generation_json", "is_dense", "same_model"]


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids that both files name: start of text, what ends a reply, padding. None or empty: not known."""

    bos: int | None = None
    stop: frozenset[int] = frozenset()
    pad: int | None = None

    def fields(self) -> dict[str, Any]:
        """As the files spell them; one stop id stands alone, several in a list."""
        stop = sorted(self.stop)
        eos = stop if len(stop) > 1 else stop[0] if stop else None
        pad = {} if self.pad is None else {"pad_token_id": self.pad}
        return {"bos_token_id": self.bos, "eos_token_id": eos, **pad}


def config_json(
    config: ModelConfig, ids: TokenIds, dtype: str, carried: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM or, for what only Llama 4 has, a Llama4ForCausalLM; `dtype` is a torch name.

    `carried` holds further keys of the checkpoint that the model came from; they are kept where herd does not write its own.
    Raises ConfigError when the format cannot say what `config` says: what is written always reads back as `config`.
    """
    written = (_dense(config) if is_dense(config) else _llama4(config)) | ids.fields()
    written |= {"torch_dtype": dtype, "dtype": dtype}
    kept = {key: value for key, value in (carried or {}).items() if key not in written and key not in _REPLACED}
    data = dict(sorted((kept | written).items()))
    found = read_config(data, "config.json").config
    if not same_model(found, config):
        raise ConfigError(f"config.json cannot say what this model is: {_difference(found, config)}")
    return data


def generation_json(generation: GenerationDefaults, ids: TokenIds) -> dict[str, Any]:
    """generation_config.json: token ids, and the sampling defaults that are known."""
    chosen = {
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "top_k": generation.top_k,
        "min_p": generation.min_p,
    }
    data: dict[str, Any] = dict(generation.extra) | ids.fields()
    if generation.temperature == 0:
        data["do_sample"] = False
    elif any(value is not None for value in chosen.values()):
        data |= {key: value for key, value in chosen.items() if value is not None} | {"do_sample": True}
    more = {"repetition_penalty": generation.repetition_penalty, "max_new_tokens": generation.max_tokens}
    return dict(sorted((data | {key: value for key, value in more.items() if value is not None}).items()))


def is_dense(config: ModelConfig) -> bool:
    """Whether the model is one that LlamaForCausalLM runs: no experts, chunks or position-free layers."""
    return all(spec == LayerSpec() for spec in config.layers)


def same_model(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configs describe the same model: equal, but for a temper that no layer uses."""
    return _settled(one) == _settled(other)


def _settled(config: ModelConfig) -> ModelConfig:
    used = any(spec.placement == "tempered" for spec in config.layers)
    return config if used else replace(config, temper=None)


def _difference(found: ModelConfig, config: ModelConfig) -> str:
    for name in ModelConfig.__dataclass_fields__:
        one, other = getattr(found, name), getattr(config, name)
        if one != other:
            if name == "layers":
                i = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
                one, other, name = one[i], other[i], f"layer {i}"
            return f"{name} would be {one}, not {other}"
    return "nothing differs"


def _common(c: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "hidden_size": c.dim,
        "max_position_embeddings": c.max_seq_len,
        "num_attention_heads": c.n_heads,
        "num_hidden_layers": c.n_layers,
        "num_key_value_heads": c.n_kv_heads,
        "rms_norm_eps": c.norm_eps,
        "rope_scaling": _scaling(c),
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tie_embeddings,
        "vocab_size": c.vocab_size,
    }


def _dense(c: ModelConfig) -> dict[str, Any]:
    return _common(c) | {
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": c.hidden_dim,
        "mlp_bias": False,
        "model_type": "llama",
    }


def _llama4(c: ModelConfig) -> dict[str, Any]:
    chunk = _only(c, "attention chunks", {spec.chunk for spec in c.layers if spec.chunk is not None})
    turned = [spec.placement in ("rope", "rope_norm") for spec in c.layers]
    norm = _only(c, "rotary placements", {s.placement for s, r in zip(c.layers, turned, strict=True) if r})
    free = _only(c, "position-free placements", {s.placement for s, r in zip(c.layers, turned, strict=True) if not r})
    moe = [i for i, spec in enumerate(c.layers) if spec.moe]
    data = _common(c) | {
        "architectures": ["Llama4ForCausalLM"],
        # transformers builds a chunked mask even where no layer uses it, and refuses null
        "attention_chunk_size": chunk or c.max_seq_len,
        "attn_temperature_tuning": free == "tempered" if free else c.temper is not None,
        "intermediate_size": c.moe.hidden_dim if c.moe else c.hidden_dim,
        "intermediate_size_mlp": c.hidden_dim,
        "layer_types": ["full_attention" if spec.chunk is None else "chunked_attention" for spec in c.layers],
        "model_type": "llama4_text",
        "moe_layers": moe,
        "no_rope_layers": [int(rotary) for rotary in turned],
        "num_experts_per_tok": c.moe.top_k if c.moe else 1,
        "num_local_experts": c.moe.n_experts if c.moe else 1,
        "use_qk_norm": norm != "rope",
    }
    if c.temper is not None:
        scale = c.temper.floor_scale
        data["floor_scale"] = int(scale) if scale == int(scale) else scale  # transformers insists on an integer
        data["attn_scale"] = c.temper.attn_scale
    return data


def _only(c: ModelConfig, what: str, values: Collection[Any]) -> Any:
    """The one value that all layers share, or None."""
    if len(values) > 1:
        listed = " and ".join(map(str, sorted(values)))
        raise ConfigError(f"Hugging Face's Llama 4 has no layers with different {what}: this model has {listed}")
    return next(iter(values), None)


def _scaling(c: ModelConfig) -> dict[str, Any] | None:
    scaling = c.rope_scaling
    if scaling is None:
        return None
    return {
        "factor": scaling.factor,
        "high_freq_factor": scaling.high_freq_factor,
        "low_freq_factor": scaling.low_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
        "rope_type": "llama3",
    }


def carried_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a source's config.json says of the text model beyond the model itself; of a nested one, its text part."""
    text = data.get("text_config")
    return dict(text if isinstance(text, Mapping) else data)


_REPLACED: Iterable[str] = {
    "_commit_hash", "_name_or_path", "quantization_config", "rope_parameters", "text_config", "transformers_version",
    "vision_config",
}  # fmt: skip
"""Keys that are not carried over: said in another way, no longer true, or about the vision half."""
