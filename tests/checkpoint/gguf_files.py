"""GGUF files made the way llama.cpp makes them: from a transformers model, by the gguf package, with its own arithmetic.

Nothing here goes through herd's name table or block decoder, so both are tested against an independent hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from herd.checkpoint.gguf_store import GGUFStore
from herd.checkpoint.names import homes, shapes
from herd.model.config import ModelConfig, MoEConfig, Temper, irope
from herd.model.llama import Llama
from tests.build import DENSE, LLAMA4, TINY, build
from tests.parity.oracles import hf_dense, hf_llama4

__all__ = [
    "EXPERTS",
    "GGML",
    "MODELS",
    "WIDE",
    "loaded",
    "oracle",
    "rope_table",
    "transformers_model",
    "write_gguf",
    "write_noise",
]

GGML = GGMLQuantizationType

_SCOUT = replace(LLAMA4["llama-4-scout"], layers=irope(4, moe_layers=range(4)), temper=Temper())
LLAMA_CPP: dict[str, ModelConfig] = {
    "llama-4-scout as llama.cpp has it": _SCOUT,
    "llama-4-maverick as llama.cpp has it": replace(
        _SCOUT,
        layers=irope(4, moe_layers=(1, 3), qk_norm=False),
        rope_scaling=None,
        moe=MoEConfig(n_experts=128, hidden_dim=32),
    ),
}
"""Tiny Llama 4 models with the constants of llama.cpp, which its files do not hold; those of `TINY` need keys for theirs."""
MODELS = TINY | LLAMA_CPP
WIDE = replace(DENSE["llama-3"], dim=256, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512, vocab_size=260)
"""Rows of whole super-blocks, for K-quants."""
EXPERTS = replace(
    MODELS["llama-4-scout"], dim=256, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512,
    moe=MoEConfig(n_experts=4, hidden_dim=256),
)  # fmt: skip


def transformers_model(config: ModelConfig, seed: int = 0) -> Any:
    """A random transformers model of this geometry."""
    ours = build(config, seed)
    return hf_llama4(ours) if config.temper is not None else hf_dense(ours)


def loaded(store: GGUFStore) -> Llama:
    """The model of `store`, strictly filled from it."""
    model = Llama(store.config).eval()
    state = {name: store.read(name).float() for name in store.names()}
    if store.config.tie_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state)
    return model


def oracle(path: Path) -> dict[str, torch.Tensor]:
    """GGUF name -> float32 values, as the gguf package reads them."""
    return {
        t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32))
        for t in gguf.GGUFReader(path).tensors
    }


def write_gguf(
    path: Path,
    model: Any,
    kind: GGMLQuantizationType | Callable[[str], GGMLQuantizationType] = GGML.F32,
    *,
    metadata: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    parts: int = 0,
) -> Path:
    """`model` (transformers' Llama or Llama 4) as a GGUF file, matrices in type `kind`, vectors in F32.

    What llama.cpp keeps constant in Llama 4 is written only where it differs, in the keys that Ollama and other
    architectures have for it. `metadata` adds keys (or replaces them), `without` leaves keys and tensors out, `parts` tensors
    per file splits it.
    """
    config = model.config
    arch = "llama4" if config.model_type == "llama4_text" else "llama"
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=parts)
    for key, value in (_metadata(config, arch) | dict(metadata or {})).items():
        if key not in without:
            _add(writer, key, value)
    for name, tensor in _tensors(model, arch).items():
        if name not in without:
            wanted = kind(name) if callable(kind) else kind
            _add_tensor(writer, name, tensor, GGML.F32 if tensor.ndim == 1 else wanted)
    return _finish(writer, path)


def write_noise(path: Path, config: ModelConfig, kind: GGMLQuantizationType) -> Path:
    """A Llama 2 or 3 of this geometry with random blocks for matrices: large files without a model to make them from."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.dim,
        "llama.block_count": config.n_layers,
        "llama.feed_forward_length": config.hidden_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope_theta,
    }.items():
        _add(writer, key, value)
    for name, home in homes(config, "gguf").items():
        shape = shapes(config)[name]
        if len(shape) == 1:
            writer.add_tensor(home.name, np.ones(shape, np.float32))
        else:
            writer.add_tensor(home.name, _random_blocks(home.name, shape, kind), raw_dtype=kind)
    return _finish(writer, path)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config: Any, arch: str) -> dict[str, Any]:
    rope = config.rope_parameters
    keys: dict[str, Any] = {
        "general.name": "tiny",
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": float(rope["rope_theta"]),
    }
    if arch == "llama4":
        moe = config.moe_layers
        keys[f"{arch}.feed_forward_length"] = config.intermediate_size_mlp
        keys[f"{arch}.expert_feed_forward_length"] = config.intermediate_size
        keys[f"{arch}.expert_count"] = config.num_local_experts if moe else 0
        keys[f"{arch}.expert_used_count"] = config.num_experts_per_tok
        keys[f"{arch}.interleave_moe_layer_step"] = moe[0] + 1 if moe else 0
        if config.attention_chunk_size != 8192 and "chunked_attention" in config.layer_types:
            keys[f"{arch}.attention.chunk_size"] = config.attention_chunk_size
        if config.floor_scale != 8192:
            keys[f"{arch}.attention.temperature_length"] = config.floor_scale
        if config.use_qk_norm != (keys[f"{arch}.expert_count"] != 128):
            keys[f"{arch}.use_qk_norm"] = config.use_qk_norm
    return keys


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}


def _tensors(model: Any, arch: str) -> dict[str, np.ndarray]:
    config, found = model.config, {}
    if (table := rope_table(config)) is not None:
        found["rope_freqs.weight"] = table
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = weight.detach().float().numpy()
        block, _, rest = name.removeprefix("model.layers.").partition(".")
        prefix = f"blk.{block}." if name.startswith("model.layers.") else ""
        rest = rest if prefix else name
        if rest == "feed_forward.experts.gate_up_proj":
            gate, up = np.split(data.swapaxes(-1, -2), 2, axis=-2)
            found[prefix + "ffn_gate_exps.weight"], found[prefix + "ffn_up_exps.weight"] = gate, up
        elif rest == "feed_forward.experts.down_proj":
            found[prefix + "ffn_down_exps.weight"] = data.swapaxes(-1, -2)
        else:
            if arch == "llama" and rest in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                data = _interleaved(data, config.head_dim)
            found[prefix + _NAMES[rest.removesuffix(".weight")] + ".weight"] = data
    return {name: np.ascontiguousarray(data) for name, data in found.items()}


def _interleaved(data: np.ndarray, head_dim: int) -> np.ndarray:
    """Row j and j + head_dim / 2 of each head become neighbours."""
    rows = np.arange(len(data))
    head, place = rows // head_dim, rows % head_dim
    return data[head * head_dim + place // 2 + place % 2 * (head_dim // 2)]


def rope_table(config: Any) -> np.ndarray | None:
    """llama.cpp's divisors for a transformers config with llama3 scaling, in its float32 torch arithmetic."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    freqs = 1.0 / (rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim))
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    table = []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        if wavelength < context / high:
            table.append(1.0)
        elif wavelength > context / low:
            table.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            table.append(float(1 / ((1 - smooth) / factor + smooth)))
    return np.array(table, dtype=np.float32)


def _add_tensor(writer: gguf.GGUFWriter, name: str, data: np.ndarray, kind: GGMLQuantizationType) -> None:
    if kind == GGML.F32:
        writer.add_tensor(name, data)
    elif kind == GGML.F16:
        writer.add_tensor(name, data.astype(np.float16))
    elif kind in (GGML.BF16, GGML.Q4_0, GGML.Q4_1, GGML.Q5_0, GGML.Q5_1, GGML.Q8_0):
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    else:  # the package cannot encode K-quants: random blocks whose values are of the right size
        writer.add_tensor(name, _random_blocks(name, data.shape, kind), raw_dtype=kind)


_HALVES = {GGML.Q2_K: (80, 82), GGML.Q3_K: (108,), GGML.Q4_K: (0, 2), GGML.Q5_K: (0, 2), GGML.Q6_K: (208,)}
_SPREAD = {GGML.Q2_K: 32, GGML.Q3_K: 60, GGML.Q4_K: 400, GGML.Q5_K: 800, GGML.Q6_K: 1600}


def _random_blocks(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> np.ndarray:
    values, nbytes = GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(list(name.encode()))
    blocks = random.integers(0, 256, (math.prod(shape) // values, nbytes), dtype=np.uint8)
    size = np.float16(shape[-1] ** -0.5 / _SPREAD.get(kind, 1))
    for at in _HALVES.get(kind, ()):
        scales = (size * random.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
        blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)
