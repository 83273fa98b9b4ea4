"""PEFT's folders of prefix and prompt tuning: adapter_config.json beside one tensor, `prompt_embeddings`.

A prefix is [P, 2 L * Hkv * Dh]: for each layer its keys, then its values, heads side by side. Keys are those after the rotation,
in Hugging Face's order of rotary pairs. A prompt is [P, D]. Source: peft PrefixTuningConfig, PromptTuningConfig, `get_prompt`.

Letters: P virtual tokens, L layers, Hkv key/value heads, Dh head_dim, D dim.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.adapters.prefix import Prefix, Prompt, Virtual
from herd.checkpoint.fields import Fields
from herd.checkpoint.peft import CONFIG, WEIGHTS, open_weights
from herd.checkpoint.write.planned import Planned, Tick
from herd.checkpoint.write.safetensors import FORMAT, write_safetensors
from herd.errors import CheckpointError
from herd.files import read_json, short
from herd.model.config import ModelConfig

__all__ = ["KINDS", "read_virtual", "write_virtual"]

KINDS = ("PREFIX_TUNING", "PROMPT_TUNING")
_TENSOR = "prompt_embeddings"
_SHAPE = {
    "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules", "peft_type",
    "base_model_name_or_path",
}  # fmt: skip
_HARMLESS = {
    # how training began and went on (what a projection made of the prefix is what was saved), and bookkeeping
    "prefix_projection", "encoder_hidden_size", "init_weights", "prompt_tuning_init", "prompt_tuning_init_text",
    "tokenizer_name_or_path", "tokenizer_kwargs", "inference_mode", "task_type", "auto_mapping", "revision", "peft_version",
    "modules_to_save",
}  # fmt: skip


def read_virtual(path: str | os.PathLike[str], base: ModelConfig) -> Virtual:
    """The prefix or prompt in the folder `path`, for a base of config `base`, in float32.

    Raises CheckpointError or ConfigError: damage, another base, settings that would change the result.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    data = read_json(folder / CONFIG)
    fields = Fields(data, str(folder / CONFIG))
    kind = data.get("peft_type")
    if kind not in KINDS:
        fields.fail("peft_type", f"is {short(kind)}: expected one of {', '.join(KINDS)}")
    for key, value in data.items():
        if key not in _SHAPE | _HARMLESS and value not in (None, False, [], {}, ""):
            fields.fail(key, f"is {short(value)}: herd does not do this, and ignoring it would change the model")
    if data.get("modules_to_save"):
        fields.fail("modules_to_save", "replaces whole weights, which herd does not do beside virtual tokens")
    if fields.whole("num_transformer_submodules", 1) != 1:
        fields.fail("num_transformer_submodules", "is for models with an encoder: a Llama has 1")
    prefix = kind == "PREFIX_TUNING"
    layers = fields.whole("num_layers", base.n_layers)
    if layers != base.n_layers:
        fields.fail("num_layers", f"is {layers}: this base has {base.n_layers}")
    count, width = fields.whole("num_virtual_tokens"), base.n_kv_heads * base.head_dim
    wide = fields.whole("token_dim", width if prefix else base.dim)
    if wide != (width if prefix else base.dim):
        told = f"{base.n_kv_heads} key/value heads of {base.head_dim}" if prefix else f"dim {base.dim}"
        fields.fail("token_dim", f"is {wide}: this base has {told}")
    file = open_weights(folder)
    found = sorted(file.names())
    if found != [_TENSOR]:
        raise CheckpointError(f"holds {short(found)}: expected {_TENSOR} alone", path=file.path)
    tensor = file.tensor(_TENSOR).float()
    columns = 2 * base.n_layers * width if prefix else base.dim
    if tuple(tensor.shape) != (count, columns) or not count:
        why = f"has shape {tuple(tensor.shape)}: {count} virtual tokens of this base take {(count, columns)}"
        raise CheckpointError(why, path=file.path, tensor=_TENSOR)
    if not bool(tensor.isfinite().all()):
        raise CheckpointError("holds numbers that are not finite", path=file.path, tensor=_TENSOR)
    name = data.get("base_model_name_or_path")
    named = name if isinstance(name, str) and name else None
    if not prefix:
        made: Virtual = Prompt(tensor, named)
    else:
        heads = fields.whole("num_attention_heads", base.n_kv_heads)
        if heads != base.n_kv_heads:
            fields.fail("num_attention_heads", f"is {heads}: this base has {base.n_kv_heads} key/value heads")
        both = tensor.view(count, base.n_layers, 2, base.n_kv_heads, base.head_dim).permute(1, 2, 0, 3, 4)
        made = Prefix(_pairs(both[:, 0], read=True), both[:, 1], named)
    made.check(base)
    return made


def write_virtual(adapter: Virtual, folder: str | os.PathLike[str], base: ModelConfig, tick: Tick) -> None:
    """Fill `folder` with the files that PEFT loads, float32. Raises CheckpointError when it does not fit, and OSError."""
    adapter.check(base)
    own: Mapping[str, Any]
    if isinstance(adapter, Prompt):
        tensor, kind = adapter.embeddings.float(), "PROMPT_TUNING"
        own = {"token_dim": base.dim, "num_attention_heads": base.n_heads, "prompt_tuning_init": "RANDOM"}
    else:
        both = torch.stack([_pairs(adapter.keys.float(), read=False), adapter.values.float()], 1)
        tensor, kind = both.permute(2, 0, 1, 3, 4).flatten(1), "PREFIX_TUNING"
        width = base.n_kv_heads * base.head_dim
        own = {"token_dim": width, "num_attention_heads": base.n_kv_heads, "encoder_hidden_size": width}
        own |= {"prefix_projection": False}
    place = Path(folder)
    planned = Planned(_TENSOR, tuple(tensor.shape), "F32", partial(Tensor.contiguous, tensor))
    write_safetensors(place / WEIGHTS, [planned], FORMAT, tick)
    config = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "num_virtual_tokens": len(tensor),
        "num_layers": base.n_layers,
        "num_transformer_submodules": 1,
        **own,
        "inference_mode": True,
    }
    (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _pairs(keys: Tensor, *, read: bool) -> Tensor:
    """Rotary pairs of keys [..., Dh]: two halves (Hugging Face) to neighbours (Meta), and back."""
    return keys.unflatten(-1, (2, -1) if read else (-1, 2)).transpose(-1, -2).flatten(-2)
