"""Checkpoint folders of tiny models: Hugging Face ones written by transformers, Meta ones by hand from the format's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.model.config import ModelConfig
from herd.model.llama import Llama
from tests.parity.oracles import hf_dense, hf_llama4

__all__ = ["meta_params", "meta_shards", "oracle", "save_bin", "write_hf", "write_meta"]


def oracle(model: Llama):
    """transformers' model with the same weights."""
    return hf_dense(model) if model.config.temper is None else hf_llama4(model)


def write_hf(folder: Path, model: Llama, shard_size: str = "10GB") -> Any:
    """A folder as transformers writes it; returns transformers' model."""
    hf = oracle(model)
    hf.save_pretrained(folder, max_shard_size=shard_size)
    return hf


def save_bin(folder: Path, model: Llama, shards: int = 1) -> Any:
    """The older layout: pytorch_model.bin, whole or in indexed shards, beside the same config.json."""
    hf = write_hf(folder, model)
    (folder / "model.safetensors").unlink()
    state = {name: tensor for name, tensor in hf.state_dict().items() if not (name == "lm_head.weight" and tied(model))}
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return hf
    names, where = list(state), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: state[name].clone() for name in names[i::shards]}
        torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return hf


def tied(model: Llama) -> bool:
    return model.config.tie_embeddings


def meta_params(config: ModelConfig) -> dict[str, Any]:
    """params.json for a tiny config. The width rule is undone with multiple_of: hidden_dim itself, and a multiplier below 1."""
    c = config
    params: dict[str, Any] = {
        "dim": c.dim,
        "n_layers": c.n_layers,
        "n_heads": c.n_heads,
        "n_kv_heads": c.n_kv_heads,
        "vocab_size": c.vocab_size,
        "multiple_of": c.hidden_dim,
        "ffn_dim_multiplier": 0.01,
        "norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
    }
    if c.rope_scaling is not None:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": c.rope_scaling.factor}
    if c.temper is not None:
        params |= _llama4_params(c)
    return params


def _llama4_params(c: ModelConfig) -> dict[str, Any]:
    first = c.layers[0]
    params: dict[str, Any] = {
        "head_dim": c.head_dim,
        "attention_chunk_size": first.chunk,
        "nope_layer_interval": 4,
        "use_qk_norm": first.placement == "rope_norm",
        "attn_temperature_tuning": True,
        "floor_scale": c.temper.floor_scale if c.temper else 8192.0,
        "ffn_exp": 4.0,
        "vision_args": None,
    }
    if c.moe is not None:
        # 150 rounds up to two multiples of 96 in dense layers, and half of it to one in the experts.
        params |= {"multiple_of": c.moe.hidden_dim, "ffn_dim_multiplier": 150 / (8 * c.dim / 3)}
        params["moe_args"] = {
            "num_experts": c.moe.n_experts,
            "top_k": c.moe.top_k,
            "capacity_factor": 1.0,
            "auto_scale_F": True,
            "interleave_moe_layer_step": 1 if c.layers[0].moe else 2,
        }
    return params


def meta_shards(model: Llama, ranks: int, *, columns: bool = False, copies: int = 1) -> list[dict[str, Tensor]]:
    """The state dicts of `ranks` files. `columns`: embeddings cut in columns (Llama 1, 2); `copies`: key/value heads repeated.

    Written from the format's description, independently of the name table.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if copies > 1:
        size = model.config.head_dim
        for name in [n for n in state if n.endswith(("wk.weight", "wv.weight"))]:
            state[name] = state[name].unflatten(0, (-1, size)).repeat_interleave(copies, 0).flatten(0, 1)
    split = _llama4_rank if model.config.temper is not None else _dense_rank
    return [split(model, state, rank, ranks, columns) for rank in range(ranks)]


def _cut(tensor: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    return tensor.chunk(ranks, dim)[rank].clone()


def _dense_rank(model: Llama, state: dict[str, Tensor], rank: int, ranks: int, columns: bool) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "tok_embeddings.weight":
            out[name] = _cut(tensor, 1 if columns else 0, rank, ranks)
        elif name.endswith(("wo.weight", "w2.weight")):
            out[name] = _cut(tensor, 1, rank, ranks)
        elif tensor.ndim == 1:
            out[name] = tensor.clone()
        else:
            out[name] = _cut(tensor, 0, rank, ranks)
    if model.config.tie_embeddings:
        out["output.weight"] = out["tok_embeddings.weight"]
    out["rope.freqs"] = torch.ones(model.config.head_dim // 2)
    return out


def _llama4_rank(model: Llama, state: dict[str, Tensor], rank: int, ranks: int, columns: bool) -> dict[str, Tensor]:
    cut = {}
    for name, tensor in state.items():
        last = name.rpartition("layers.")[2]
        if tensor.ndim == 1 or "router" in name:
            cut[name] = tensor
        elif "experts." in last and "shared" not in last:
            cut[name] = _cut(tensor, 2 if name.endswith("w2") else 1, rank, ranks)
        else:
            cut[name] = _cut(tensor, 1 if name.endswith(("wo.weight", "w2.weight")) else 0, rank, ranks)
    out = {name: cut[name] for name in ("tok_embeddings.weight", "norm.weight", "output.weight")}
    for i, spec in enumerate(model.config.layers):
        layer = f"layers.{i}."
        att, ffn = layer + "attention.", layer + "feed_forward."
        out[att + "wqkv.weight"] = torch.cat([cut[att + w + ".weight"] for w in ("wq", "wk", "wv")])
        out[att + "wqkv.layer_norm_weight"] = cut[layer + "attention_norm.weight"]
        out[att + "wqkv._extra_state"] = torch.empty(0)
        out[att + "wo.weight"] = cut[att + "wo.weight"]
        if not spec.moe:
            out[ffn + "mlp.layer_norm_weight"] = cut[layer + "ffn_norm.weight"]
            out[ffn + "mlp.fc1_weight"] = torch.cat([cut[ffn + "w1.weight"], cut[ffn + "w3.weight"]])
            out[ffn + "mlp.fc2_weight"] = cut[ffn + "w2.weight"]
            continue
        out[ffn + "norm.weight"] = cut[layer + "ffn_norm.weight"]
        out[ffn + "router_DE"] = cut[ffn + "router.weight"].T.contiguous()
        out[ffn + "w_in_shared_FD.weight"] = cut[ffn + "shared_expert.w1.weight"]
        out[ffn + "w_swiglu_FD.weight"] = cut[ffn + "shared_expert.w3.weight"]
        out[ffn + "w_out_shared_DF.weight"] = cut[ffn + "shared_expert.w2.weight"]
        for foreign, ours in (("moe_w_in_eD_F", "w1"), ("moe_w_swiglu_eD_F", "w3"), ("moe_w_out_eF_D", "w2")):
            swapped = cut[ffn + "experts." + ours].transpose(1, 2)
            out[ffn + "experts." + foreign] = swapped.flatten(0, 1).contiguous()
        out[ffn + "running_gate_stats_3E"] = torch.zeros(3, 4)
    return out


def write_meta(
    folder: Path, model: Llama, ranks: int = 1, *, columns: bool = False, copies: int = 1, **more: Any
) -> Path:
    """A Meta folder; `more` overrides keys of params.json (None removes one)."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, state in enumerate(meta_shards(model, ranks, columns=columns, copies=copies)):
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    params = {key: value for key, value in (meta_params(model.config) | more).items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params))
    return folder
