"""A trained model to a Hugging Face folder: config.json, model.safetensors, generation_config.json, chat_template.jinja.

Names and the rotary layout come from the one name table (`herd.checkpoint.names`). The safetensors file is written by hand:
8 bytes little-endian header length, a JSON header, then the raw tensors (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.chat.templates import template_of
from herd.checkpoint.names import homes
from herd.errors import ConfigError
from herd.model.config import ModelConfig
from herd.model.llama import Llama

__all__ = ["export_folder", "hf_config", "hf_tensors", "write_safetensors"]

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def hf_config(config: ModelConfig, dtype: torch.dtype, *, bos: int, stop: Sequence[int], pad: int) -> dict[str, Any]:
    """config.json of a dense Llama."""
    if config.moe is not None or any(spec.moe or spec.chunk or spec.placement != "rope" for spec in config.layers):
        raise ConfigError("only dense Llamas with plain rotary layers can be exported as LlamaForCausalLM")
    if config.rope_scaling is not None:
        raise ConfigError("scaled rotary positions are not exported here")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": list(stop),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_seq_len,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": len(config.layers),
        "num_key_value_heads": config.n_kv_heads,
        "pad_token_id": pad,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def hf_tensors(model: Llama, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter under its Hugging Face name and layout, in `dtype`; tied weights once."""
    weights = dict(model.named_parameters())
    return {
        home.name: home.write(weights[name].detach(), model.config).to(dtype).contiguous()
        for name, home in homes(model.config, "hf").items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` in name order. The header is padded with spaces so that the data starts at a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in sorted(tensors):
            file.write(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())


def export_folder(
    model: Llama,
    folder: Path,
    dtype: torch.dtype,
    *,
    bos: int,
    stop: Sequence[int],
    pad: int,
    sampling: Mapping[str, Any],
) -> None:
    """Write everything but the tokenizer files (`herd.train.vocabulary.write_tokenizer`) and the model card."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = {"bos_token_id": bos, "eos_token_id": list(stop), "pad_token_id": pad, **sampling}
    config = hf_config(model.config, dtype, bos=bos, stop=stop, pad=pad)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template_of("llama3") or "", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", hf_tensors(model, dtype))
