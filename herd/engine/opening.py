"""What an `LLM` begins with: the model in memory, what guesses for it, and the dtype of its keys and values."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from herd.checkpoint.fill import fill
from herd.checkpoint.load import Checkpoint, read_checkpoint
from herd.checkpoint.open import open_store
from herd.checkpoint.part import PartStore
from herd.checkpoint.placement import device_named, dtype_named
from herd.checkpoint.resolve import resolve
from herd.checkpoint.store import GenerationDefaults, TensorStore
from herd.checkpoint.weights import is_quantized
from herd.engine.budget import Budget, budget_for, free_on, memory_of
from herd.engine.config import SMALL
from herd.engine.draft_model import ModelDrafter, check_vocabularies
from herd.engine.ngram import NgramDrafter
from herd.engine.ranks import Ranks
from herd.engine.speculate import Drafter
from herd.errors import ConfigError
from herd.hub.created import Created, find
from herd.kernels import native, triton
from herd.model.accounting import parameters
from herd.model.llama import Llama
from herd.parallel.part import Part
from herd.quant.linear import QuantLinear
from herd.quant.packing import PACKS
from herd.quant.scheme import block_type
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["budget_of", "drafter_for", "kv_for", "made_of", "opened", "ranks_for"]


def opened(
    model: str | os.PathLike[str] | Checkpoint | tuple[Llama, Tokenizer],
    weights: str | None,
    dtype: str | torch.dtype | None,
    device: str | torch.device,
    tick: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> tuple[Llama, Tokenizer, GenerationDefaults]:
    """The model, its tokenizer and its sampling defaults, for a created model those that it was given. An unsaid dtype is float32
    for a small model on a CPU, unless its weights are quantized and native kernels multiply with them as they are.

    `tick(done, total)` hears of the bytes read. With `ranks` this process gets its part, and they get theirs.

    Raises CheckpointError when it cannot be read, ConfigError when `weights` or `dtype` are said of a model that is loaded.
    """
    if isinstance(model, str | os.PathLike):
        where = device_named(device)
        path = resolve(model)
        store = open_store(path)  # headers only: how large the model is decides how it is loaded
        if where.type == "cuda" and weights in (None, "auto") and dtype is None and _stays_packed(store):
            weights = "stored"
        kept = is_quantized(store) and native.isa() is not None
        small = where.type == "cpu" and weights in (None, "auto") and not kept and parameters(store.config) <= SMALL
        wanted = dtype_named(dtype, torch.float32 if small else None)
        model = read_checkpoint(
            path,
            store,
            wanted,
            where,
            weights=weights or "auto",
            tick=tick,
            made=find(os.fspath(model)),
            filled=fill if ranks is None else ranks.filled,
        )
    elif weights is not None or dtype is not None:
        raise ConfigError(
            "weights and dtype say how a model is loaded, and this one is: leave them out, or give its name"
        )
    if isinstance(model, Checkpoint):
        return model.model, model.tokenizer, model.defaults
    llama, tokenizer = model
    return llama, tokenizer, GenerationDefaults()


def made_of(model: str | os.PathLike[str] | Checkpoint | tuple[Llama, Tokenizer], ranks: int) -> Created | None:
    """What `herd create` said of `model`, when that is such a name or was opened by one.

    Raises ConfigError for an adapter where several `ranks` share the model, CheckpointError for a damaged manifest.
    """
    if isinstance(model, Checkpoint):
        made = model.made
    else:
        made = find(os.fspath(model)) if isinstance(model, str | os.PathLike) else None
    if made is not None and made.adapter is not None and ranks != 1:
        raise ConfigError(
            f"{made.name} has an adapter, which is not possible with tensor_parallel={ranks}: merge it first (herd merge)"
        )
    return made


def _stays_packed(store: TensorStore) -> bool:
    """Whether a quantized checkpoint runs on a GPU as it is: kernels read every type it has."""
    kinds = {info.stored for name in store.names() if len((info := store.info(name)).shape) > 1}
    quantized = {name for name in kinds if (kind := block_type(name)) is not None and kind.dtype is None}
    return bool(quantized) and quantized <= PACKS.keys() and triton.usable()


def drafter_for(
    draft: str | os.PathLike[str] | Drafter | None, tokenizer: Tokenizer, device: torch.device, deterministic: bool
) -> Drafter | None:
    """What guesses for a model of `tokenizer`. Raises ConfigError when a draft model has another vocabulary."""
    if draft == "lookup":
        return NgramDrafter()
    if draft is None or not isinstance(draft, str | os.PathLike):
        return draft
    model, other, _ = opened(draft, None, None, device)
    check_vocabularies(tokenizer, other)
    return ModelDrafter(model, same_tokens=deterministic)


def ranks_for(
    count: int, model: str | os.PathLike[str] | Checkpoint | tuple[Llama, Tokenizer], device: str | torch.device
) -> Ranks | None:
    """The processes of a model over `count` of them; None for one. Raises ConfigError before any is started when it cannot be."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"tensor_parallel is {count!r}: expected an integer of at least 1")
    if count == 1:
        return None
    if not isinstance(model, str | os.PathLike):
        raise ConfigError("tensor_parallel reads a part of the files in each process: give the model's name or path")
    store = open_store(resolve(model))
    PartStore(store, Part(store.config, 0, count))
    return Ranks(count, device_named(device))


def budget_of(model: Llama, ranks: Ranks | None, kv: str, memory: int | str | None, **limits: Any) -> Budget:
    """`budget_for` a model in memory: of what is free beside it, or of `memory`, which `ranks` divide. Raises ConfigError."""
    where = model.norm.weight.device
    found = budget_for(
        model.config,
        kv=kv_for(model) if kv == "auto" else kv,
        free=free_on(where) if ranks is None else ranks.free_each(free_on(where)),
        kind="cpu" if where.type == "cpu" else "gpu",
        memory=memory if ranks is None or memory is None else memory_of(memory) // ranks.count,
        **limits,
    )
    return found if ranks is None else replace(found, ranks=ranks.count)


def kv_for(model: Llama) -> str:
    """Keys and values like the activations; beside quantized weights in half of that, which nobody can tell."""
    dtype = model.norm.weight.dtype
    if model.norm.weight.device.type == "cpu" and any(isinstance(m, QuantLinear) for m in model.modules()):
        return "float16"
    return str(dtype).removeprefix("torch.")
