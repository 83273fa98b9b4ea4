"""ModelConfig -> GGUF metadata of architecture `llama` or `llama4`, in the keys and types of llama.cpp's converter.

The reader (`herd.checkpoint.gguf_config`) must give the same config back, and is asked before anything is written. Three
things are beyond llama.cpp's keys:

- Numbers that do not survive float32, and frequency scalings that do not follow from their table: llama.cpp computes with the
  same float32 numbers and the same table, so only herd needs more. They are added under `herd.config`.
- Llama 4's attention chunks, query temperature, normalised queries and the order of its layers are constants in llama.cpp
  (src/models/llama4.cpp). A model with other values would run there as another model without a word, so it is refused,
  unless the caller wants a file for herd alone; then `herd.config` holds what differs and a warning says so.
- Llama 4 without experts (Llama Guard 4): llama.cpp refuses the file itself. A warning says so.

Sources: llama.cpp conversion/base.py, llama.py, llama4.py; src/models/llama4.cpp.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from herd.checkpoint.gguf import MAX_KEY
from herd.checkpoint.gguf_config import ROPE_TABLE, read_config
from herd.checkpoint.gguf_metadata import Cursor, Metadata
from herd.checkpoint.gguf_own import OWN_KEY, own_text
from herd.checkpoint.gguf_rope import divisors
from herd.checkpoint.names import homes, shapes
from herd.checkpoint.write.gguf import encoded_metadata
from herd.errors import CheckpointError, ConfigError
from herd.model.config import LayerSpec, ModelConfig

__all__ = ["architecture", "config_fields", "rope_table"]

_ONLY_HERD = {"norm_eps", "rope_theta", "rope_scaling", "temper", "layers"}
"""What `herd.config` may hold: everything else is exact in llama.cpp's keys."""


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name for this kind of model: "llama" or "llama4"."""
    return "llama" if config.moe is None and set(config.layers) == {LayerSpec()} else "llama4"


def rope_table(config: ModelConfig) -> np.ndarray | None:
    """The tensor ROPE_TABLE [head_dim / 2] float32: frequency scaling as divisors. None without scaling."""
    if config.rope_scaling is None:
        return None
    return divisors(config.head_dim, config.rope_theta, config.rope_scaling).numpy()


def config_fields(config: ModelConfig, *, path: Path, herd_only: bool = False) -> dict[str, Any]:
    """The `{architecture}.*` keys of `config`, and `herd.config` where those do not say all.

    Raises ConfigError for a model that llama.cpp would run as another one, unless `herd_only`: then it warns.
    """
    arch = architecture(config)
    keys = {f"{arch}.{key}": value for key, value in _keys(config, arch).items()}
    seen = _read_back(config, arch, keys, path)
    own = [field.name for field in fields(config) if getattr(seen, field.name) != getattr(config, field.name)]
    assert set(own) <= _ONLY_HERD, own
    if own:
        _say(config, seen, own, path, herd_only)
        keys[OWN_KEY] = own_text(config, own)
        assert _read_back(config, arch, keys, path) == config, own
    if arch == "llama4" and config.moe is None:
        warnings.warn(f"{path}: llama.cpp does not run a Llama 4 without experts: this file is for herd", stacklevel=3)
    return keys


def _keys(config: ModelConfig, arch: str) -> dict[str, Any]:
    c = config
    keys: dict[str, Any] = {
        "block_count": c.n_layers,
        "context_length": c.max_seq_len,
        "embedding_length": c.dim,
        "feed_forward_length": c.hidden_dim,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads,
        "rope.freq_base": float(c.rope_theta),
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
    }
    if c.moe is not None:
        keys |= {"expert_count": c.moe.n_experts, "expert_used_count": c.moe.top_k}
    keys |= {
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "vocab_size": c.vocab_size,
        "rope.dimension_count": c.head_dim,
    }
    if arch == "llama4":
        first = next((i for i, spec in enumerate(c.layers) if spec.moe), -1)
        keys |= {"interleave_moe_layer_step": first + 1}
        keys |= {"expert_feed_forward_length": c.hidden_dim if c.moe is None else c.moe.hidden_dim}
    if c.rope_scaling is not None and c.rope_scaling.original_max_seq_len != 8192:
        keys["rope.scaling.original_context_length"] = c.rope_scaling.original_max_seq_len
    return keys


def _read_back(config: ModelConfig, arch: str, keys: dict[str, Any], path: Path) -> ModelConfig:
    """What the reader makes of `keys`."""
    block = encoded_metadata({"general.architecture": arch} | keys, path)
    metadata = Metadata(Cursor(memoryview(block), path), len(keys) + 1, MAX_KEY)
    sizes = shapes(config)
    tensors = {home.name: sizes[name] for name, home in homes(config, "gguf").items()}
    table = rope_table(config)
    if table is not None:
        tensors[ROPE_TABLE] = table.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reader's remarks are for readers
        try:
            return read_config(metadata, tensors, table)
        except CheckpointError as error:
            if error.tensor != ROPE_TABLE or OWN_KEY in keys:
                raise
        del tensors[ROPE_TABLE]  # a scaling that does not follow from its table
        return read_config(metadata, tensors, None)


def _say(config: ModelConfig, seen: ModelConfig, own: list[str], path: Path, herd_only: bool) -> None:
    """Refuse, or with `herd_only` warn of, what llama.cpp would do differently."""
    tempered = any(spec.placement == "tempered" for spec in config.layers)
    others = [name for name in own if name == "layers" or (name == "temper" and tempered)]
    if not others:
        return
    what = "; ".join(_difference(config, seen, name) for name in others)
    if not herd_only:
        raise ConfigError(
            f"{path}: GGUF cannot say this model, and llama.cpp would run another one without a word: {what}. "
            "Keep it in Meta's or Hugging Face's format, or ask for a GGUF file that only herd reads rightly (--herd-only)"
        )
    warnings.warn(f"{path}: only herd reads this file rightly: {what} (the key {OWN_KEY} says so)", stacklevel=4)


def _difference(config: ModelConfig, seen: ModelConfig, name: str) -> str:
    if name == "temper":
        return f"query temperature {config.temper}, which is {seen.temper} there"
    layer = next(i for i, (a, b) in enumerate(zip(config.layers, seen.layers, strict=True)) if a != b)
    ours, theirs = config.layers[layer], seen.layers[layer]
    words = [
        f"{part} {getattr(ours, part)}, which is {getattr(theirs, part)} there"
        for part in ("placement", "chunk", "moe")
        if getattr(ours, part) != getattr(theirs, part)
    ]
    return f"layer {layer} has {', '.join(words)}"
