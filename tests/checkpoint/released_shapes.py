"""Checkpoints of released sizes whose weights are holes in sparse files: headers and tokenizers are real, data is zeros."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from herd.model.config import ModelConfig
from herd.tokenizer.bytelevel import to_alphabet
from tests.vocabularies import llama3

__all__ = ["INSTRUCT_TEMPLATE", "hf_config", "hf_folder", "llama3_gguf", "sparse_safetensors"]

INSTRUCT_TEMPLATE = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "{{ m.content }}<|eot_id|>{% endfor %}ipython"
)


def sparse_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> int:
    """A file whose header describes `shapes`; returns the bytes of data."""
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * 2
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
    return at


def hf_config(c: ModelConfig, **more: Any) -> dict[str, Any]:
    """config.json of a dense model, in transformers' words."""
    scaling = c.rope_scaling and {
        "rope_type": "llama3",
        "factor": c.rope_scaling.factor,
        "low_freq_factor": c.rope_scaling.low_freq_factor,
        "high_freq_factor": c.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": c.rope_scaling.original_max_seq_len,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": c.dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.hidden_dim,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": c.max_seq_len,
        "tie_word_embeddings": c.tie_embeddings,
        "hidden_act": "silu",
        "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_008, 128_009],
        "torch_dtype": "bfloat16",
    } | more


def hf_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of LlamaForCausalLM."""
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, c.dim),
        "model.norm.weight": (c.dim,),
    }
    for i in range(c.n_layers):
        at = f"model.layers.{i}."
        found |= {at + f"{norm}.weight": (c.dim,) for norm in ("input_layernorm", "post_attention_layernorm")}
        found |= {at + f"self_attn.{m}_proj.weight": (rows, c.dim) for m, rows in (("q", q), ("k", kv), ("v", kv))}
        found |= {at + "self_attn.o_proj.weight": (c.dim, q), at + "mlp.down_proj.weight": (c.dim, c.hidden_dim)}
        found |= {at + f"mlp.{m}_proj.weight": (c.hidden_dim, c.dim) for m in ("gate", "up")}
    if not c.tie_embeddings:
        found["lm_head.weight"] = (c.vocab_size, c.dim)
    return found


def hf_folder(folder: Path, c: ModelConfig, shards: int = 2, dtype: str = "BF16", **more: Any) -> Path:
    """A Hugging Face folder with Llama 3's tokenizer.model and the chat template of 3.1's kind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(c, **more)))
    names, where, total = hf_shapes(c), {}, 0
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(names.items())[i::shards])
        total += sparse_safetensors(folder / file, part, dtype)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(str(files("llama_models") / "llama3" / "tokenizer.model"), folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": INSTRUCT_TEMPLATE, "eos_token": "<|eot_id|>"})
    )
    generation = {"eos_token_id": [128_001, 128_008, 128_009], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def llama3_gguf(path: Path, c: ModelConfig, kind: Callable[[str], str], *, table: bool = True, **keys: Any) -> Path:
    """A GGUF file of architecture llama with Llama 3's whole vocabulary and merges; `kind` names each tensor's type."""
    writer = gguf.GGUFWriter(path, "llama")
    tokenizer = llama3()
    names = {id: name for name, id in tokenizer.special.ids.items()}
    ranks = to_alphabet(tokenizer.ranks)  # type: ignore[attr-defined]
    tokens = [*ranks, *(names.get(id, f"<|reserved_{id}|>") for id in range(len(ranks), c.vocab_size))]
    writer.add_string("general.name", keys.pop("name", "Meta Llama 3.1 8B Instruct"))
    writer.add_uint32("general.file_type", 15)
    for key, value in {
        "context_length": c.max_seq_len,
        "embedding_length": c.dim,
        "block_count": c.n_layers,
        "feed_forward_length": c.hidden_dim,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads,
        "vocab_size": c.vocab_size,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", c.norm_eps)
    writer.add_float32("llama.rope.freq_base", c.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(ranks) + [3] * (c.vocab_size - len(ranks)))
    writer.add_token_merges([f"{rank[:1]} {rank[1:]}" for rank in ranks if len(rank) > 1])
    writer.add_bos_token_id(keys.pop("bos", 128_000))
    writer.add_eos_token_id(128_009)
    writer.add_chat_template(INSTRUCT_TEMPLATE)
    sizes = 0
    for name, shape in gguf_shapes(c).items():
        type_ = gguf.GGMLQuantizationType[kind(name)]
        block, nbytes = gguf.GGML_QUANT_SIZES[type_]
        size = int(np.prod(shape)) // block * nbytes
        raw_shape = (*shape[:-1], shape[-1] // block * nbytes) if block > 1 else shape
        dtype = np.dtype(np.uint8) if block > 1 else np.dtype(np.float32)
        writer.add_tensor_info(name, raw_shape, dtype, size, raw_dtype=type_ if block > 1 else None)
        sizes += -(-size // 32) * 32
    values = None
    if table and c.rope_scaling is not None:
        from herd.checkpoint.gguf_rope import divisors

        values = divisors(c.head_dim, c.rope_theta, c.rope_scaling).numpy()
        writer.add_tensor_info("rope_freqs.weight", values.shape, values.dtype, values.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(0, 2)
        start = -(-file.tell() // 32) * 32
        file.truncate(start + sizes)
        if values is not None:
            file.seek(start + sizes)
            file.write(values.tobytes())
    return path


def gguf_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of a llama file."""
    words = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    found = {}
    for name, shape in hf_shapes(c).items():
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        found[name] = shape
    return found
