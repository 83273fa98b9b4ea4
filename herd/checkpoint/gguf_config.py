"""GGUF metadata -> ModelConfig, and the sampling defaults that came with the model.

What llama.cpp knows without being told, and herd therefore too (src/models/llama4.cpp, conversion/llama.py):

- Key/value heads default to the query heads, the head size to width / heads, RoPE theta to 10,000.
- `llama` files hold the frequency scaling of Llama 3.1 as the table `rope_freqs.weight` (`gguf_rope`), not as keys; the keys
  `rope.scaling.*` speak of linear and YaRN scaling, which no released Llama uses. `llama` with experts is Mixtral.
- `llama4`: layer i has experts when (i + 1) is a multiple of `interleave_moe_layer_step`; `feed_forward_length` is the width of
  dense layers, `expert_feed_forward_length` that of experts and of the shared expert. Every fourth layer is global and has
  no positions; the others attend in chunks of 8,192. The query temperature is 1 + 0.1 log(floor((pos + 1) / 8192) + 1). Queries
  and keys are normalised unless there are 128 experts: that tells Maverick from Scout.
- `attention.sliding_window` 0 marks another model (MobileLLM) in a `llama4` file. A file without experts is Llama Guard 4,
  which llama.cpp does not run; its chunk is not limited.

Ollama writes `llama4` files with `intermediate_size`, `intermediate_size_moe` and `use_qk_norm`, and reads
`attention.chunk_size` (convert/convert_llama4.go, model/models/llama4). These keys, and GGUF's general
`attention.temperature_length` and `attention.temperature_scale` (0: no temperature), say what is constant in llama.cpp; they
are honoured when present. What herd's own writer has to say beyond all of them is in `herd.config` (`gguf_own`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from herd.checkpoint.gguf_metadata import Metadata
from herd.checkpoint.gguf_own import OWN_KEY, own_facts
from herd.checkpoint.gguf_rope import matches, recover
from herd.checkpoint.limits import plausible
from herd.checkpoint.store import GenerationDefaults
from herd.errors import CheckpointError, ConfigError
from herd.files import short
from herd.model.config import MAX_LAYERS, LayerSpec, ModelConfig, MoEConfig, RopeScaling, Temper, irope, plain

__all__ = ["ROPE_TABLE", "Shapes", "read_config", "read_sampling"]

ROPE_TABLE = "rope_freqs.weight"

_NO_MODEL = {
    "adapter": "a LoRA adapter, not a model: open the base model's file",
    "mmproj": "the vision half of a model: open the text model's file",
    "imatrix": "an importance matrix, not a model: open the model's file",
    "vocab": "only a vocabulary: open the model's file",
}
_VISION = {
    "clip": "the vision half of a model: open the text model's file",
    "mllama": "Llama 3.2 Vision, which is not runnable yet: herd reads text models",
}

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape, outermost dimension first."""


def read_config(metadata: Metadata, tensors: Shapes, rope_table: np.ndarray | None = None) -> ModelConfig:
    """The model that a file with this metadata and tensors of these shapes holds; `rope_table` is what ROPE_TABLE holds.

    Raises CheckpointError naming the key or tensor that is missing, damaged, or says something that herd's Llama cannot do.
    """
    arch = _architecture(metadata)
    keys = _Keys(metadata, f"{arch}.", _own_facts(metadata))
    try:
        config = (_llama if arch == "llama" else _llama4)(keys, tensors, rope_table)
        return plausible(_with_own(config, keys), f"{arch}.* keys")
    except ConfigError as error:
        metadata.fail("general.architecture", f"is {arch!r}, but its keys describe no model: {error}")


def read_sampling(metadata: Metadata) -> GenerationDefaults:
    """The `general.sampling.*` keys; stop ids are the tokenizer's business. What is not honoured is named in one warning.

    Raises CheckpointError.
    """
    keys = _Keys(metadata, "general.sampling.")
    names = [key.removeprefix(keys.prefix) for key in metadata if key.startswith(keys.prefix)]
    honoured = {"temp", "top_p", "top_k", "min_p"}
    if metadata.get(keys.prefix + "penalty_last_n") == -1:  # over the whole context, as herd has it
        honoured |= {"penalty_repeat", "penalty_last_n"}
    extra = {name: metadata[keys.prefix + name] for name in names if name not in honoured}
    if extra:
        warnings.warn(f"{metadata.path}: not honoured: {', '.join(map(short, extra))} of {keys.prefix}*", stacklevel=2)
    return GenerationDefaults(
        temperature=keys.number("temp") if keys.has("temp") else None,
        top_p=keys.number("top_p") if keys.has("top_p") else None,
        top_k=keys.whole("top_k", least=0) if keys.has("top_k") else None,
        min_p=keys.number("min_p") if keys.has("min_p") else None,
        repetition_penalty=keys.number("penalty_repeat") if "penalty_repeat" in honoured & set(names) else None,
        extra=extra,
    )


def _architecture(metadata: Metadata) -> str:
    """Either of the two that herd reads."""
    for key, known in (("general.type", _NO_MODEL), ("general.architecture", _VISION)):
        value = metadata.get(key)
        if isinstance(value, str) and value in known:
            metadata.fail(key, f"is {value!r}: {known[value]}")
    arch = metadata.get("general.architecture")
    if arch not in ("llama", "llama4"):
        what = "is missing" if arch is None else f"is {short(arch)}"
        metadata.fail("general.architecture", f"{what}: herd reads 'llama' and 'llama4'")
    return arch


def _own_facts(metadata: Metadata) -> dict[str, Any]:
    """What `herd.config` says; nothing in files that herd did not write."""
    if OWN_KEY not in metadata:
        return {}
    try:
        return own_facts(metadata[OWN_KEY], metadata.path)
    except ConfigError as error:
        metadata.fail(OWN_KEY, str(error))


def _with_own(config: ModelConfig, keys: _Keys) -> ModelConfig:
    layers = keys.own.get("layers", config.layers)
    if len(layers) != config.n_layers:
        keys.metadata.fail(OWN_KEY, f"has {len(layers)} layers, but block_count is {config.n_layers}")
    return replace(config, **keys.own)


class _Keys:
    """The keys of one architecture, each checked for its type. Every failure is a CheckpointError at the key.

    `own` is what `herd.config` says over them.
    """

    def __init__(self, metadata: Metadata, prefix: str, own: Mapping[str, Any] | None = None) -> None:
        self.metadata, self.prefix, self.own = metadata, prefix, own or {}

    def fail(self, key: str, why: str) -> NoReturn:
        self.metadata.fail(self.prefix + key, why)

    def has(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number; where the format allows one per layer, all must be equal."""
        value = self.metadata.get(self.prefix + key, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        elif isinstance(value, list):
            self.fail(key, "differs between layers: no Llama has layers of different shapes")
        if value is None:
            self.fail(key, "is missing")
        if type(value) is not int or not least <= value < 1 << 48:
            self.fail(key, f"is {short(value)}: expected a whole number of at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, not negative."""
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            self.fail(key, "is missing")
        if type(value) not in (int, float) or not 0 <= value < 1e30:
            self.fail(key, f"is {short(value)}: expected a number")
        return _decimal(float(value))

    def flag(self, key: str, default: bool) -> bool:
        """A bool."""
        value = self.metadata.get(self.prefix + key, default)
        if type(value) is not bool:
            self.fail(key, f"is {short(value)}: expected a bool")
        return value


def _decimal(value: float) -> float:
    """The shortest decimal with the same float32: the file's 9.99999974e-06 was 1e-5 before it was written."""
    if value != np.float32(value):
        return value
    return next(d for n in range(1, 18) if np.float32(d := float(f"{value:.{n}g}")) == np.float32(value))


def _llama(keys: _Keys, tensors: Shapes, table: np.ndarray | None) -> ModelConfig:
    if keys.whole("expert_count", 0, least=0):
        keys.fail("expert_count", "is set in a file of architecture 'llama': a Mixtral model is not a Llama")
    return _decoder(keys, tensors, table, layers=plain(_layer_count(keys)))


def _llama4(keys: _Keys, tensors: Shapes, table: np.ndarray | None) -> ModelConfig:
    experts = keys.whole("expert_count", 0, least=0)
    moe = None
    if experts:
        width = keys.whole(
            "intermediate_size_moe" if keys.has("intermediate_size_moe") else "expert_feed_forward_length"
        )
        moe = MoEConfig(n_experts=experts, top_k=keys.whole("expert_used_count"), hidden_dim=width)
    temper = Temper(
        floor_scale=keys.number("attention.temperature_length", 8192.0),
        attn_scale=keys.number("attention.temperature_scale", 0.1),
    )
    layers = _llama4_layers(keys, experts, tempered=temper.attn_scale > 0)
    return _decoder(keys, tensors, table, layers=layers, moe=moe, temper=temper)


def _llama4_layers(keys: _Keys, experts: int, *, tempered: bool) -> tuple[LayerSpec, ...]:
    count = _layer_count(keys)
    if keys.whole("attention.sliding_window", 8192, least=0) == 0:
        keys.fail("attention.sliding_window", "is 0, which marks a MobileLLM: it is not a Llama")
    pattern = keys.whole("attention.sliding_window_pattern", 4)
    if pattern != 4:
        keys.fail("attention.sliding_window_pattern", f"is {pattern}: in Llama 4 every fourth layer is global")
    step = keys.whole("interleave_moe_layer_step") if experts else 0
    chunk = keys.whole("attention.chunk_size", 8192) if experts or keys.has("attention.chunk_size") else None
    return irope(
        count,
        chunk=chunk,
        moe_layers=range(step - 1, count, step) if experts else (),
        qk_norm=keys.flag("use_qk_norm", experts != 128),
        temper=tempered,
    )


def _layer_count(keys: _Keys) -> int:
    count = keys.whole("block_count")
    if count > MAX_LAYERS:
        keys.fail("block_count", f"is {count}: no Llama has more than {MAX_LAYERS} layers")
    return count


def _decoder(
    keys: _Keys,
    tensors: Shapes,
    table: np.ndarray | None,
    *,
    layers: tuple[LayerSpec, ...],
    moe: MoEConfig | None = None,
    temper: Temper | None = None,
) -> ModelConfig:
    dim, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    theta = keys.number("rope.freq_base", 10_000.0)
    head_dim = _head_dim(keys, dim, heads)
    return ModelConfig(
        dim=dim,
        n_heads=heads,
        n_kv_heads=keys.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        hidden_dim=keys.whole("intermediate_size" if keys.has("intermediate_size") else "feed_forward_length"),
        vocab_size=_vocab_size(keys, tensors),
        layers=layers,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_scaling(keys, table, head_dim, theta),
        max_seq_len=keys.whole("context_length"),
        tie_embeddings="output.weight" not in tensors,
        moe=moe,
        temper=temper,
    )


def _head_dim(keys: _Keys, dim: int, heads: int) -> int:
    if dim % heads and not keys.has("attention.key_length"):
        keys.fail(
            "attention.head_count", f"is {heads}, which does not divide the width {dim}, and key_length is not given"
        )
    head_dim = keys.whole("attention.key_length", max(dim // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.whole(key, head_dim) != head_dim:
            keys.fail(key, f"is {keys.whole(key)}, but the head size is {head_dim}: in a Llama they are equal")
    return head_dim


def _vocab_size(keys: _Keys, tensors: Shapes) -> int:
    """Rows of the embedding, which the keys and the tokenizer must agree with."""
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        why = "is missing" if embedding is None else f"has shape {embedding}: expected two dimensions"
        raise CheckpointError(why, path=keys.metadata.path, tensor="token_embd.weight")
    rows = embedding[0]
    if keys.whole("vocab_size", rows) != rows:
        keys.fail("vocab_size", f"is {keys.whole('vocab_size')}, but token_embd.weight has {rows} rows")
    tokens = "tokenizer.ggml.tokens"
    if tokens in keys.metadata and keys.metadata.size(tokens) not in (rows, 0):
        count = keys.metadata.size(tokens)
        keys.metadata.fail(
            tokens, f"has {count} entries, but token_embd.weight has {rows} rows: the tokenizer does not fit"
        )
    return rows


def _scaling(keys: _Keys, table: np.ndarray | None, head_dim: int, theta: float) -> RopeScaling | None:
    kind = keys.metadata.get(keys.prefix + "rope.scaling.type", "none")
    if kind != "none" and not (kind == "linear" and keys.number("rope.scaling.factor", 1.0) == 1.0):
        keys.fail("rope.scaling.type", f"is {short(kind)}: herd has the scaling of Llama 3.1 only ('none' and a table)")
    if keys.number("rope.scale_linear", 1.0) != 1.0:  # how the first GGUF files said it
        keys.fail("rope.scale_linear", "is not 1: herd has the scaling of Llama 3.1 only")
    if table is None:
        _say_unscaled(keys, theta)
        return None
    try:
        if table.shape != (head_dim // 2,):
            raise ConfigError(f"shape {table.shape}: expected ({head_dim // 2},) of type F32")
        if "rope_scaling" in keys.own:
            return _checked(table, keys.own.get("rope_theta", theta), keys.own["rope_scaling"])
        return recover(table, theta, keys.whole("rope.scaling.original_context_length", 8192))
    except ConfigError as error:
        raise CheckpointError(str(error), path=keys.metadata.path, tensor=ROPE_TABLE) from error


def _checked(table: np.ndarray, theta: float, scaling: RopeScaling | None) -> RopeScaling | None:
    """`scaling`, which must be that of the table: llama.cpp goes by the table."""
    if scaling is None or not matches(table, theta, scaling):
        raise ConfigError(f"these divisors are not those of the scaling in {OWN_KEY}")
    return scaling


def _say_unscaled(keys: _Keys, theta: float) -> None:
    """Warn of a Llama 3.1 or later whose file lacks the scaling: llama.cpp's converter did not write it until July 2024."""
    if keys.prefix == "llama." and theta == 500_000 and keys.whole("context_length") > 8192:
        warnings.warn(
            f"{keys.metadata.path}: no {ROPE_TABLE}, which every Llama 3.1 and later needs beyond 8,192 tokens; "
            "long prompts will read worse than the model can: get a newer file or convert it again",
            stacklevel=2,
        )
