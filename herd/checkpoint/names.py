"""The one name table: every parameter of every Llama, in every file format.

The canonical column is `herd.model.llama.Llama.state_dict()`: Meta's names and layout, RoPE rows interleaved, experts
stacked [E, out, in]. Each other column says where a parameter lives in that format and which steps turn the foreign tensor
into the canonical one; every step also runs backwards, so reading and writing are the same row.

| column  | files                                                        |
|---------|--------------------------------------------------------------|
| `meta`  | consolidated.NN.pth of Llama 1 to 3.3                        |
| `meta4` | consolidated.NN.pth of Llama 4 (one column per rank)         |
| `hf`    | LlamaForCausalLM                                             |
| `hf4`   | Llama4ForCausalLM; with a prefix, Llama4ForConditionalGeneration |
| `gguf`  | architectures `llama` and `llama4`                           |

Which dimension model parallelism cuts is in `herd.parallel.plan`: the steps run on each rank's piece and
the results are concatenated along it. Sources: llama-models models/checkpoint.py and models/llama4/, the transformers
conversion scripts for llama and llama4, llama.cpp convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from herd.checkpoint.layout import Fused, Interleave, Shaped, Stack, Step, Transpose
from herd.checkpoint.outline import Outline
from herd.errors import CheckpointError
from herd.files import short
from herd.model.config import ModelConfig
from herd.parallel.plan import cut_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "COLUMNS",
    "ROWS",
    "Cell",
    "Column",
    "Home",
    "Row",
    "homes",
    "ignored",
    "join",
    "shapes",
    "shards",
    "sources",
]

Column = Literal["meta", "meta4", "hf", "hf4", "gguf"]
COLUMNS: tuple[Column, ...] = ("meta", "meta4", "hf", "hf4", "gguf")


@dataclass(frozen=True, slots=True)
class Cell:
    """A parameter's place in one format: `name` of the foreign tensor, the part of it, and the steps that follow."""

    name: str
    steps: tuple[Step, ...] = ()
    fused: Fused | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One parameter. `{i}` is the layer; `when` limits the row to dense or expert layers; None: not in that format.

    `shape` names sizes (see `sizes`).
    """

    name: str
    shape: tuple[str, ...]
    meta: Cell | None
    meta4: Cell | None
    hf: Cell | None
    hf4: Cell | None
    gguf: Cell
    when: Literal["dense", "moe"] | None = None

    @property
    def shard(self) -> int | None:
        """The dimension, in canonical layout, that model parallelism cuts."""
        return cut_of(self.name)

    def cell(self, column: Column) -> Cell | None:
        """This row's entry in `column`."""
        return {"meta": self.meta, "meta4": self.meta4, "hf": self.hf, "hf4": self.hf4, "gguf": self.gguf}[column]


_QKV = tuple(Fused(axis=0, index=i, shares=("n_heads", "n_kv_heads", "n_kv_heads")) for i in range(3))
_ROWS_OF_TWO = tuple(Fused(axis=0, index=i, shares=(1, 1)) for i in range(2))
_COLUMNS_OF_TWO = tuple(Fused(axis=-1, index=i, shares=(1, 1)) for i in range(2))
_SWAP = (Transpose(),)
_STACKED = (Stack(), Transpose())  # Meta keeps experts as [E * in, out]

_L, _HF, _BLK = "layers.{i}.", "model.layers.{i}.", "blk.{i}."
_ATT, _FFN, _MOE = _L + "attention.", _L + "feed_forward.", _L + "feed_forward.experts."

ROWS: tuple[Row, ...] = (
    Row(
        name="tok_embeddings.weight",
        shape=("vocab", "dim"),
        meta=Cell("tok_embeddings.weight"),
        meta4=Cell("tok_embeddings.weight"),
        hf=Cell("model.embed_tokens.weight"),
        hf4=Cell("model.embed_tokens.weight"),
        gguf=Cell("token_embd.weight"),
    ),
    Row(
        name=_L + "attention_norm.weight",
        shape=("dim",),
        meta=Cell(_L + "attention_norm.weight"),
        meta4=Cell(_ATT + "wqkv.layer_norm_weight"),
        hf=Cell(_HF + "input_layernorm.weight"),
        hf4=Cell(_HF + "input_layernorm.weight"),
        gguf=Cell(_BLK + "attn_norm.weight"),
    ),
    Row(
        name=_ATT + "wq.weight",
        shape=("q", "dim"),
        meta=Cell(_ATT + "wq.weight"),
        meta4=Cell(_ATT + "wqkv.weight", fused=_QKV[0]),
        hf=Cell(_HF + "self_attn.q_proj.weight", (Interleave("n_heads"),)),
        hf4=Cell(_HF + "self_attn.q_proj.weight"),
        gguf=Cell(_BLK + "attn_q.weight"),
    ),
    Row(
        name=_ATT + "wk.weight",
        shape=("kv", "dim"),
        meta=Cell(_ATT + "wk.weight"),
        meta4=Cell(_ATT + "wqkv.weight", fused=_QKV[1]),
        hf=Cell(_HF + "self_attn.k_proj.weight", (Interleave("n_kv_heads"),)),
        hf4=Cell(_HF + "self_attn.k_proj.weight"),
        gguf=Cell(_BLK + "attn_k.weight"),
    ),
    Row(
        name=_ATT + "wv.weight",
        shape=("kv", "dim"),
        meta=Cell(_ATT + "wv.weight"),
        meta4=Cell(_ATT + "wqkv.weight", fused=_QKV[2]),
        hf=Cell(_HF + "self_attn.v_proj.weight"),
        hf4=Cell(_HF + "self_attn.v_proj.weight"),
        gguf=Cell(_BLK + "attn_v.weight"),
    ),
    Row(
        name=_ATT + "wo.weight",
        shape=("dim", "q"),
        meta=Cell(_ATT + "wo.weight"),
        meta4=Cell(_ATT + "wo.weight"),
        hf=Cell(_HF + "self_attn.o_proj.weight"),
        hf4=Cell(_HF + "self_attn.o_proj.weight"),
        gguf=Cell(_BLK + "attn_output.weight"),
    ),
    Row(
        name=_L + "ffn_norm.weight",
        when="dense",
        shape=("dim",),
        meta=Cell(_L + "ffn_norm.weight"),
        meta4=Cell(_FFN + "mlp.layer_norm_weight"),
        hf=Cell(_HF + "post_attention_layernorm.weight"),
        hf4=Cell(_HF + "post_attention_layernorm.weight"),
        gguf=Cell(_BLK + "ffn_norm.weight"),
    ),
    Row(
        name=_L + "ffn_norm.weight",
        when="moe",
        shape=("dim",),
        meta=None,
        meta4=Cell(_FFN + "norm.weight"),
        hf=None,
        hf4=Cell(_HF + "post_attention_layernorm.weight"),
        gguf=Cell(_BLK + "ffn_norm.weight"),
    ),
    Row(
        name=_FFN + "w1.weight",
        when="dense",
        shape=("hidden", "dim"),
        meta=Cell(_FFN + "w1.weight"),
        meta4=Cell(_FFN + "mlp.fc1_weight", fused=_ROWS_OF_TWO[0]),
        hf=Cell(_HF + "mlp.gate_proj.weight"),
        hf4=Cell(_HF + "feed_forward.gate_proj.weight"),
        gguf=Cell(_BLK + "ffn_gate.weight"),
    ),
    Row(
        name=_FFN + "w2.weight",
        when="dense",
        shape=("dim", "hidden"),
        meta=Cell(_FFN + "w2.weight"),
        meta4=Cell(_FFN + "mlp.fc2_weight"),
        hf=Cell(_HF + "mlp.down_proj.weight"),
        hf4=Cell(_HF + "feed_forward.down_proj.weight"),
        gguf=Cell(_BLK + "ffn_down.weight"),
    ),
    Row(
        name=_FFN + "w3.weight",
        when="dense",
        shape=("hidden", "dim"),
        meta=Cell(_FFN + "w3.weight"),
        meta4=Cell(_FFN + "mlp.fc1_weight", fused=_ROWS_OF_TWO[1]),
        hf=Cell(_HF + "mlp.up_proj.weight"),
        hf4=Cell(_HF + "feed_forward.up_proj.weight"),
        gguf=Cell(_BLK + "ffn_up.weight"),
    ),
    Row(
        name=_FFN + "router.weight",
        when="moe",
        shape=("experts", "dim"),
        meta=None,
        meta4=Cell(_FFN + "router_DE", _SWAP),
        hf=None,
        hf4=Cell(_HF + "feed_forward.router.weight"),
        gguf=Cell(_BLK + "ffn_gate_inp.weight"),
    ),
    Row(
        name=_MOE + "w1",
        when="moe",
        shape=("experts", "expert", "dim"),
        meta=None,
        meta4=Cell(_MOE + "moe_w_in_eD_F", _STACKED),
        hf=None,
        hf4=Cell(_HF + "feed_forward.experts.gate_up_proj", _SWAP, _COLUMNS_OF_TWO[0]),
        gguf=Cell(_BLK + "ffn_gate_exps.weight"),
    ),
    Row(
        name=_MOE + "w2",
        when="moe",
        shape=("experts", "dim", "expert"),
        meta=None,
        meta4=Cell(_MOE + "moe_w_out_eF_D", _STACKED),
        hf=None,
        hf4=Cell(_HF + "feed_forward.experts.down_proj", _SWAP),
        gguf=Cell(_BLK + "ffn_down_exps.weight"),
    ),
    Row(
        name=_MOE + "w3",
        when="moe",
        shape=("experts", "expert", "dim"),
        meta=None,
        meta4=Cell(_MOE + "moe_w_swiglu_eD_F", _STACKED),
        hf=None,
        hf4=Cell(_HF + "feed_forward.experts.gate_up_proj", _SWAP, _COLUMNS_OF_TWO[1]),
        gguf=Cell(_BLK + "ffn_up_exps.weight"),
    ),
    Row(
        name=_FFN + "shared_expert.w1.weight",
        when="moe",
        shape=("expert", "dim"),
        meta=None,
        meta4=Cell(_FFN + "w_in_shared_FD.weight"),
        hf=None,
        hf4=Cell(_HF + "feed_forward.shared_expert.gate_proj.weight"),
        gguf=Cell(_BLK + "ffn_gate_shexp.weight"),
    ),
    Row(
        name=_FFN + "shared_expert.w2.weight",
        when="moe",
        shape=("dim", "expert"),
        meta=None,
        meta4=Cell(_FFN + "w_out_shared_DF.weight"),
        hf=None,
        hf4=Cell(_HF + "feed_forward.shared_expert.down_proj.weight"),
        gguf=Cell(_BLK + "ffn_down_shexp.weight"),
    ),
    Row(
        name=_FFN + "shared_expert.w3.weight",
        when="moe",
        shape=("expert", "dim"),
        meta=None,
        meta4=Cell(_FFN + "w_swiglu_FD.weight"),
        hf=None,
        hf4=Cell(_HF + "feed_forward.shared_expert.up_proj.weight"),
        gguf=Cell(_BLK + "ffn_up_shexp.weight"),
    ),
    Row(
        name="norm.weight",
        shape=("dim",),
        meta=Cell("norm.weight"),
        meta4=Cell("norm.weight"),
        hf=Cell("model.norm.weight"),
        hf4=Cell("model.norm.weight"),
        gguf=Cell("output_norm.weight"),
    ),
    Row(
        name="output.weight",
        shape=("vocab", "dim"),
        meta=Cell("output.weight"),
        meta4=Cell("output.weight"),
        hf=Cell("lm_head.weight"),
        hf4=Cell("lm_head.weight"),
        gguf=Cell("output.weight"),
    ),
)

_IGNORED: dict[Column, re.Pattern[str]] = {
    "meta": re.compile(r"rope\.freqs|.*\._extra_state|.*\.attention\.inner_attention\.rope\.freqs"),
    "meta4": re.compile(
        r"rope\.freqs|.*_extra_state|.*\.(global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)"
    ),
    "hf": re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq"),
    "hf4": re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.(inv_freq|freqs_cis)"),
    "gguf": re.compile(r"rope_freqs\.weight|blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight"),
}


def ignored(column: Column, name: str) -> bool:
    """Whether the foreign tensor `name` holds no parameter: rotary tables (herd computes its own) and training statistics."""
    return _IGNORED[column].fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Home:
    """Where the canonical tensor `canonical` lives: foreign tensor `name`, perhaps a part of it, perhaps rearranged."""

    canonical: str
    name: str
    cell: Cell
    shard: int | None

    def read_shape(self, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
        """Shape of what `read` makes of a foreign tensor of `shape`, without data. Raises CheckpointError as `read` does."""
        try:
            outline = Outline(shape)
        except OverflowError as error:
            raise CheckpointError(f"shape {short(shape)} overflows", tensor=self.name) from error
        return self.read(outline, config).shape

    def read(self, tensor: Shaped, config: ModelConfig) -> Shaped:
        """Foreign tensor (or one rank's piece of it) -> canonical; a view wherever torch can make one.

        Raises CheckpointError when the shape cannot be cut or rearranged as the format says.
        """
        try:
            part = tensor if self.cell.fused is None else self.cell.fused.cut(tensor, config)
            for step in self.cell.steps:
                part = step.read(part, config)
        except (RuntimeError, IndexError) as error:  # torch's and Outline's way to say that a shape does not fit
            raise CheckpointError(f"shape {tuple(tensor.shape)} does not fit this model", tensor=self.name) from error
        return part

    def write(self, tensor: Tensor, config: ModelConfig) -> Tensor:
        """Canonical tensor (or one rank's piece) -> its part of the foreign tensor. Inverse of `read`."""
        for step in reversed(self.cell.steps):
            tensor = step.write(tensor, config)
        return tensor


def homes(config: ModelConfig, column: Column) -> dict[str, Home]:
    """Canonical name -> Home for every parameter of `config`, in model order; tied models have no `output.weight`.

    Raises CheckpointError when the format cannot hold such a model.
    """
    found = {}
    for name, row, layer in _parameters(config):
        cell = row.cell(column)
        if cell is None:
            raise CheckpointError(f"a model with experts cannot be stored in the {column!r} layout", tensor=name)
        found[name] = Home(name, cell.name.replace("{i}", str(layer)), cell, row.shard)
    return found


def sources(config: ModelConfig, column: Column) -> dict[str, tuple[Home, ...]]:
    """Foreign name -> the homes inside it, in the order of its parts: what a writer puts out, `join` makes each."""
    grouped: dict[str, list[Home]] = {}
    for home in homes(config, column).values():
        grouped.setdefault(home.name, []).append(home)
    return {name: tuple(sorted(group, key=_part)) for name, group in grouped.items()}


def join(group: Sequence[Home], tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """Canonical tensors of one `sources` group -> the foreign tensor."""
    parts = [home.write(tensor, config) for home, tensor in zip(group, tensors, strict=True)]
    fused = group[0].cell.fused
    return parts[0] if fused is None else fused.join(parts)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter, by arithmetic alone."""
    size = sizes(config)
    return {name: tuple(size[s] for s in row.shape) for name, row, _ in _parameters(config)}


def shards(config: ModelConfig) -> dict[str, int | None]:
    """Canonical name -> the dimension that model parallelism cuts; None: every rank holds all of it."""
    return {name: row.shard for name, row, _ in _parameters(config)}


def sizes(config: ModelConfig) -> Mapping[str, int]:
    """The words of `Row.shape` in numbers."""
    moe = config.moe
    return {
        "vocab": config.vocab_size,
        "dim": config.dim,
        "q": config.n_heads * config.head_dim,
        "kv": config.n_kv_heads * config.head_dim,
        "hidden": config.hidden_dim,
        "experts": 0 if moe is None else moe.n_experts,
        "expert": 0 if moe is None else moe.hidden_dim,
    }


def _parameters(config: ModelConfig) -> Iterator[tuple[str, Row, int]]:
    """(canonical name, row, layer) in model order."""
    first, *rest = ROWS
    inner = [row for row in rest if "{i}" in row.name]
    after = [row for row in rest if "{i}" not in row.name]
    yield first.name, first, 0
    for i, spec in enumerate(config.layers):
        for row in inner:
            if row.when is None or (row.when == "moe") == spec.moe:
                yield row.name.replace("{i}", str(i)), row, i
    for row in after:
        if not (row.name == "output.weight" and config.tie_embeddings):
            yield row.name, row, 0


def _part(home: Home) -> int:
    return 0 if home.cell.fused is None else home.cell.fused.index
