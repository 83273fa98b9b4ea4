"""generation_config.json -> GenerationDefaults."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herd.checkpoint.store import GenerationDefaults
from herd.errors import CheckpointError
from herd.files import read_json, short

__all__ = ["read_generation"]

_ABOVE_ZERO = 1e-9

_READ = {"do_sample", "eos_token_id", "max_new_tokens", "min_p", "repetition_penalty", "temperature", "top_k", "top_p"}
_HARMLESS = {
    # bookkeeping, and token ids that the tokenizer knows better
    "_from_model_config", "bos_token_id", "pad_token_id", "transformers_version", "trust_remote_code",
    # how transformers runs: the tokens are the same
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "cache_config",
    "cache_implementation", "compile_config", "continuous_batching_config", "disable_compile", "is_assistant", "low_memory",
    "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "output_attentions", "output_hidden_states", "output_logits", "output_scores", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "renormalize_logits", "return_dict_in_generate", "target_lookbehind", "use_cache", "use_mtp",
    # encoders
    "decoder_start_token_id", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
}  # fmt: skip
_NEUTRAL = {
    "diversity_penalty": 0, "epsilon_cutoff": 0, "eta_cutoff": 0, "guidance_scale": 1, "length_penalty": 1, "min_length": 0,
    "min_new_tokens": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "typical_p": 1,
}  # fmt: skip
"""Keys that change sampling -> the value with which they do not. Null, false and empty never do."""


def read_generation(folder: Path, config: Mapping[str, Any]) -> GenerationDefaults:
    """Defaults of the checkpoint in `folder`; stop ids fall back to config.json's `eos_token_id`.

    What changes sampling and is not honoured is named in one warning. Raises CheckpointError.
    """
    path = folder / "generation_config.json"
    data = read_json(path) if path.is_file() else {}
    eos = data.get("eos_token_id", config.get("eos_token_id"))
    stop = _ids(eos, path if "eos_token_id" in data else folder / "config.json")
    extra = {key: value for key, value in data.items() if key not in _READ | _HARMLESS and _matters(key, value, config)}
    if extra:
        warnings.warn(f"{path}: not honoured: {short(extra)[1:-1]}", stacklevel=2)
    greedy = data.get("do_sample") is False
    return GenerationDefaults(
        stop_ids=stop,
        temperature=0.0 if greedy else _number(data, "temperature", path, low=0.0),
        top_p=None if greedy else _number(data, "top_p", path, low=_ABOVE_ZERO, high=1.0),
        top_k=None if greedy else _whole(data, "top_k", path, low=0),
        min_p=None if greedy else _number(data, "min_p", path, low=0.0, high=1.0),
        repetition_penalty=_number(data, "repetition_penalty", path, low=_ABOVE_ZERO),
        max_tokens=_whole(data, "max_new_tokens", path, low=1),
        extra=extra,
    )


def _matters(key: str, value: Any, config: Mapping[str, Any]) -> bool:
    if key == "max_length":  # of prompt and reply together: Llama 2 gives its context, where every reply ends anyway
        context = config.get("max_position_embeddings")
        return not (type(value) is type(context) is int and value >= context)
    return not (value is None or value is False or value in ([], {}, "") or value == _NEUTRAL.get(key, ""))


def _ids(value: Any, path: Path) -> frozenset[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(v) is int and 0 <= v < 1 << 31 for v in ids):
        raise CheckpointError(f"eos_token_id is {short(value)}: expected a token id or a list of them", path=path)
    return frozenset(ids)


def _number(data: Mapping[str, Any], key: str, path: Path, *, low: float, high: float = 1e6) -> float | None:
    value = data.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not low <= value <= high:
        raise CheckpointError(f"{key} is {short(value)}: expected a number from {low:g} to {high:g}", path=path)
    return float(value)


def _whole(data: Mapping[str, Any], key: str, path: Path, *, low: int) -> int | None:
    value = data.get(key)
    if value is not None and (type(value) is not int or not low <= value < 1 << 31):
        raise CheckpointError(f"{key} is {short(value)}: expected an integer of at least {low}", path=path)
    return value
