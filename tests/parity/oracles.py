"""Other people's Llamas holding our weights: the independent implementations that logits are compared with.

Weights travel through `herd.checkpoint.names`, so a wrong row there shows as a wrong logit here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from herd.checkpoint.names import Column, join, sources
from herd.model.config import ModelConfig
from herd.model.llama import Llama

__all__ = ["foreign_state", "hf_dense", "hf_llama4"]


def foreign_state(model: Llama, column: Column) -> dict[str, Tensor]:
    """`model`'s weights under the names and in the layout of `column`; tied models have no output matrix."""
    ours = model.state_dict()
    groups = sources(model.config, column)
    return {
        name: join(group, [ours[h.canonical] for h in group], model.config).clone() for name, group in groups.items()
    }


def _rope_parameters(config: ModelConfig) -> dict[str, object]:
    if config.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": config.rope_theta,
        "factor": config.rope_scaling.factor,
        "low_freq_factor": config.rope_scaling.low_freq_factor,
        "high_freq_factor": config.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
    }


def hf_dense(model: Llama) -> LlamaForCausalLM:
    """transformers' Llama with `model`'s weights and dtype."""
    c = model.config
    hf_config = LlamaConfig(
        hidden_size=c.dim,
        intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len,
        rope_parameters=_rope_parameters(c),
        tie_word_embeddings=c.tie_embeddings,
        attn_implementation="eager",
    )
    return _filled(LlamaForCausalLM(hf_config), model, "hf")


def hf_llama4(model: Llama, attention: str = "eager") -> Llama4ForCausalLM:
    """transformers' Llama 4 text model with `model`'s weights and dtype."""
    c = model.config
    positioned = [spec.placement in ("rope", "rope_norm") for spec in c.layers]
    chunks = {spec.chunk for spec in c.layers if spec.chunk is not None}
    hf_config = Llama4TextConfig(
        hidden_size=c.dim,
        intermediate_size=c.hidden_dim if c.moe is None else c.moe.hidden_dim,
        intermediate_size_mlp=c.hidden_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len,
        rope_parameters=_rope_parameters(c),
        tie_word_embeddings=c.tie_embeddings,
        moe_layers=[i for i, spec in enumerate(c.layers) if spec.moe],
        num_local_experts=1 if c.moe is None else c.moe.n_experts,
        num_experts_per_tok=1 if c.moe is None else c.moe.top_k,
        no_rope_layers=[int(p) for p in positioned],
        use_qk_norm=any(spec.placement == "rope_norm" for spec in c.layers),
        # transformers 5.23 builds a chunk mask even when no layer uses one and refuses None: one chunk for everything.
        attention_chunk_size=next(iter(chunks), c.max_seq_len),
        layer_types=["full_attention" if spec.chunk is None else "chunked_attention" for spec in c.layers],
        attn_temperature_tuning=c.temper is not None,
        floor_scale=8192 if c.temper is None else int(c.temper.floor_scale),
        attn_scale=0.1 if c.temper is None else c.temper.attn_scale,
        attn_implementation=attention,
    )
    return _filled(Llama4ForCausalLM(hf_config), model, "hf4")


def _filled(hf, model: Llama, column: Column):
    hf = hf.to(next(model.parameters()).dtype).eval()
    missing, unexpected = hf.load_state_dict(foreign_state(model, column), strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if model.config.tie_embeddings else [])
    return hf


def hf_logits(hf, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits [B, S, V]; with `positions` [S] of any spacing a causal mask is handed in, so that gaps are not read as borders."""
    length = tokens.shape[1]
    with torch.no_grad():
        if positions is None:
            return hf(tokens, use_cache=False).logits
        blocked = torch.full((length, length), torch.finfo(hf.dtype).min, dtype=hf.dtype).triu(1)
        return hf(tokens, position_ids=positions[None], attention_mask=blocked[None, None], use_cache=False).logits
