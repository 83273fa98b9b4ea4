"""Meta's own model code (the llama-models package) on one CPU process.

It is written against fairscale's parallel layers. With one rank those are plain linear layers, so this module stands in for
the few names that Meta's code imports, and no process group is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, nn

from herd.model.config import ModelConfig
from herd.model.llama import Llama
from tests.parity.oracles import foreign_state

__all__ = ["meta_llama3", "meta_llama4", "meta_logits"]


class _Linear(nn.Linear):
    """Column or row parallel with one rank."""

    def __init__(self, width_in: int, width_out: int, bias: bool = True, **parallel: object) -> None:
        super().__init__(width_in, width_out, bias)


class _Embedding(nn.Embedding):
    def __init__(self, rows: int, width: int, **parallel: object) -> None:
        super().__init__(rows, width)


@contextmanager
def _one_rank() -> Iterator[None]:
    """fairscale as one rank sees it, and `.cuda()` that stays where it is (Meta's Llama 4 code calls it when building)."""
    parts = {
        "initialize": {"get_model_parallel_world_size": lambda: 1},
        "layers": {
            "ColumnParallelLinear": _Linear,
            "RowParallelLinear": _Linear,
            "VocabParallelEmbedding": _Embedding,
        },
        "mappings": {"reduce_from_model_parallel_region": lambda x: x},
    }
    base = "fairscale.nn.model_parallel"
    modules = {name: ModuleType(name) for name in ("fairscale", "fairscale.nn", base)}
    for part, members in parts.items():
        module = modules[f"{base}.{part}"] = ModuleType(f"{base}.{part}")
        vars(module).update(members)
        setattr(modules[base], part, module)
    modules["fairscale"].nn = modules["fairscale.nn"]  # type: ignore[attr-defined]
    modules["fairscale.nn"].model_parallel = modules[base]  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, modules), mock.patch.object(torch.Tensor, "cuda", lambda self: self):
        yield


def _shared_args(c: ModelConfig, length: int) -> dict[str, object]:
    return {
        "dim": c.dim,
        "n_layers": c.n_layers,
        "n_heads": c.n_heads,
        "n_kv_heads": c.n_kv_heads,
        "vocab_size": c.vocab_size,
        "norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "use_scaled_rope": c.rope_scaling is not None,
        "max_batch_size": 2,
        "max_seq_len": length,
    }


def _width(args: dict[str, object], hidden: int, dim: int, ffn_exp: float = 4.0) -> None:
    """Meta computes the feed-forward width; choose the multiplier so that it comes out as `hidden`."""
    args["multiple_of"] = 1
    args["ffn_dim_multiplier"] = (hidden + 0.5) / int(2 * int(ffn_exp * dim) / 3)


def meta_llama3(model: Llama, length: int) -> nn.Module:
    """llama_models.llama3.model.Transformer with `model`'s weights, for sequences up to `length`."""
    args = _shared_args(model.config, length)
    _width(args, model.config.hidden_dim, model.config.dim)
    with _one_rank():
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.model import Transformer

        meta = Transformer(ModelArgs(**args))
    state = foreign_state(model, "meta")
    if model.config.tie_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    meta.load_state_dict(state)
    return meta.eval()


def meta_llama4(model: Llama, length: int) -> nn.Module:
    """llama_models.llama4.model.Transformer with `model`'s weights, for sequences up to `length`."""
    c = model.config
    args = _shared_args(c, length)
    _width(args, c.hidden_dim, c.dim)
    moe = None
    if c.moe is not None:
        step = 1 + next(i for i, spec in enumerate(c.layers) if spec.moe)
        moe = {"num_experts": c.moe.n_experts, "top_k": c.moe.top_k, "interleave_moe_layer_step": step}
        # one width rule serves both: experts are half as wide as dense layers (auto_scale_F)
        assert c.hidden_dim == 2 * c.moe.hidden_dim
    args |= {
        "ffn_exp": 4.0,
        "head_dim": c.head_dim,
        "attention_chunk_size": next((s.chunk for s in c.layers if s.chunk is not None), None),
        "nope_layer_interval": 1 + next(i for i, s in enumerate(c.layers) if s.placement in ("tempered", "none")),
        "use_qk_norm": any(s.placement == "rope_norm" for s in c.layers),
        "attn_temperature_tuning": c.temper is not None,
        "floor_scale": 8192.0 if c.temper is None else c.temper.floor_scale,
        "moe_args": moe,
    }
    with _one_rank():
        from llama_models.llama4.args import ModelArgs
        from llama_models.llama4.model import Transformer

        meta = Transformer(ModelArgs(**args))
        meta.load_state_dict(foreign_state(model, "meta4"))
    return meta.eval()


def meta_logits(meta: nn.Module, tokens: Tensor, splits: tuple[int, ...] = ()) -> Tensor:
    """Logits [B, S, V], in one call or in pieces of the given lengths through Meta's own cache."""
    out, start = [], 0
    for n in splits or (tokens.shape[1],):
        piece = tokens[:, start : start + n]
        if type(meta).__module__.startswith("llama_models.llama4"):
            from llama_models.llama4.datatypes import TransformerInput

            out.append(meta(TransformerInput(tokens=piece, tokens_position=start)).logits)
        else:
            out.append(meta(piece, start))
        start += n
    return torch.cat(out, 1)
