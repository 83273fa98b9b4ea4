"""Which keys of config.json mean something: some are read (`hf_config`), some change nothing, some only other models have.

A key of another model is refused unless it is neutral; what is left is named in one warning.
Source: transformers configuration_utils.py, configuration_llama.py, configuration_llama4.py, from 4.28 to 5.
"""

from __future__ import annotations

import warnings
from typing import Any

from herd.checkpoint.fields import Fields
from herd.files import short

__all__ = ["check_keys", "check_rope"]

_READ = {
    "architectures", "attention_bias", "compression_config", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "intermediate_size", "layer_types", "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "quantization_config", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "tie_word_embeddings", "vocab_size",
}  # fmt: skip
_READ_4 = {
    "attention_chunk_size", "attn_scale", "attn_temperature_tuning", "floor_scale", "interleave_moe_layer_step",
    "intermediate_size_mlp", "moe_layers", "no_rope_layer_interval", "no_rope_layers", "num_experts_per_tok",
    "num_local_experts", "text_config", "use_qk_norm", "vision_config",
}  # fmt: skip

_HARMLESS = {
    # training
    "attention_dropout", "initializer_range", "output_router_logits", "pretraining_tp", "router_aux_loss_coef",
    "router_jitter_noise",
    # how transformers runs it; pretraining_tp cuts matrices into parts whose sum is the same
    "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "attn_implementation",
    "cache_implementation", "chunk_size_feed_forward", "dtype", "for_llm_compressor", "output_attentions",
    "output_hidden_states", "return_dict", "torch_dtype", "torchscript", "use_bfloat16", "use_cache",
    # bookkeeping
    "_commit_hash", "_name_or_path", "model_max_length", "max_length", "max_sequence_length", "tokenizer_class",
    "transformers_version", "unsloth_fixed", "unsloth_version",
    # token ids, which the tokenizer knows better
    "boi_token_index", "bos_token_id", "eoi_token_index", "image_token_index", "pad_token_id",
    # other kinds of model that share the class: labels of classifiers, encoders beside decoders
    "add_cross_attention", "cross_attention_hidden_size", "finetuning_task", "id2label", "is_decoder", "is_encoder_decoder",
    "label2id", "problem_type", "pruned_heads", "task_specific_params", "tf_legacy_loss", "tie_encoder_decoder",
}  # fmt: skip

_FOREIGN: dict[str, tuple[Any, ...]] = {
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "sliding_window": (),
}
"""Keys of Granite, Gemma, Cohere and Mistral -> the values with which they change nothing, beside null and false."""

_DEFAULTS = {
    "diversity_penalty": 0, "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "length_penalty": 1, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_scores": False, "remove_invalid_values": False, "repetition_penalty": 1,
    "return_dict_in_generate": False, "temperature": 1, "top_k": 50, "top_p": 1, "typical_p": 1,
}  # fmt: skip
"""Sampling keys that transformers 4 wrote into every nested config -> their values, which mean nothing was chosen."""

_CLASSES = {
    "llama": ("LlamaForCausalLM", "LLaMAForCausalLM"),
    "llama4": ("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
    "llama4_text": ("Llama4ForCausalLM",),
}

_ROPE = {
    "attention_factor", "factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings",
    "partial_rotary_factor", "rope_theta", "rope_type", "type",
}  # fmt: skip


def check_keys(f: Fields, kind: str) -> None:
    """Refuse the class and the keys of other models in `f`, an object of `model_type` `kind`, and warn of unknown keys.

    Raises ConfigError.
    """
    classes = f.data.get("architectures")
    if classes is not None and (
        not isinstance(classes, list) or not all(isinstance(c, str) and c in _CLASSES[kind] for c in classes)
    ):
        f.fail("architectures", f"is {short(classes)}: herd runs {' and '.join(_CLASSES[kind])}")
    for key, neutral in _FOREIGN.items():
        if f.data.get(key) not in neutral:
            f.refuse(key, "no Llama has this")
    kinds = f.data.get("layer_types")
    full = isinstance(kinds, list) and all(layer == "full_attention" for layer in kinds)
    if kind == "llama" and kinds is not None and not full:
        f.fail("layer_types", f"is {short(kinds)}: every layer of a Llama 1 to 3 is 'full_attention'")
    chosen = {key for key, value in _DEFAULTS.items() if f.data.get(key) != value}
    known = _READ | _HARMLESS | _FOREIGN.keys() | (_DEFAULTS.keys() - chosen)
    _say_unknown(f, known if kind == "llama" else known | _READ_4)


def check_rope(rope: Fields) -> None:
    """Refuse what the rotary settings of a Llama cannot say, and warn of unknown keys. Raises ConfigError."""
    for key, value in rope.data.items():
        if isinstance(value, dict):
            rope.fail(key, "is an object: in a Llama all layers have the same rotary settings")
    for key, why in (
        ("partial_rotary_factor", "Llamas rotate whole heads"),
        ("attention_factor", "Llamas do not scale it"),
    ):
        if rope.number(key, 1.0) != 1.0:
            rope.fail(key, f"is not 1: {why}")
    _say_unknown(rope, _ROPE)


def _say_unknown(f: Fields, known: set[str]) -> None:
    unknown = sorted(key for key, value in f.data.items() if value is not None and key not in known)
    if unknown:
        listed = ", ".join(f.prefix + key for key in unknown)
        warnings.warn(f"{f.where}: unknown keys are ignored: {listed[:200]}", stacklevel=2)
