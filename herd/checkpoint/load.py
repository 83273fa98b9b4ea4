"""From a name or path to something that runs: `herd.load`, and the checkpoint as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from herd.checkpoint.fill import fill
from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.checkpoint.store import GenerationDefaults, TensorStore
from herd.checkpoint.vocabulary import FormatSource, format_source, tokenizer_of
from herd.hub.created import Created, find
from herd.model.llama import Llama
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Checkpoint", "load", "load_model", "open_checkpoint", "read_checkpoint"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that came with a model: where it is, its tensors, the model, its tokenizer, its sampling defaults, and what
    `herd create` says on top (`made`), when it was opened by such a name.

    `defaults.params()` gives SamplingParams for `herd.generate`, whose own defaults are Meta's.
    """

    path: Path
    store: TensorStore
    model: Llama
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    made: Created | None = None

    @property
    def chat_format_from(self) -> FormatSource | None:
        """Who says which prompt format the tokenizer has: "files", "catalog" (by the folder's name), or nobody: None."""
        return format_source(self.tokenizer, self.path)


def load(
    path_or_name: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    weights: str = "auto",
    tick: Callable[[int, int], None] | None = None,
) -> tuple[Llama, Tokenizer]:
    """(model, tokenizer) of a checkpoint folder, file or catalog name, in any format herd reads.

    `dtype` is a torch dtype or its name ("float32", "bfloat16", "float16"); "auto" and None keep the one the weights are
    stored in. `device` is a name such as "cuda:0"; "auto" takes the fastest kind that is here. `weights` says in which form
    matrices are held (`herd.checkpoint.weights`): a quantized file stays quantized on a CPU with herd's native kernels, with
    float32 activations, unless a dtype is asked for or `weights` is "plain", which dequantize it (to bfloat16 by default);
    "int8", "int4" and llama.cpp's names quantize while loading. `tick(done, total)` hears of the bytes read.
    Parameters do not require gradients; on the CPU they may be views of the file. A checkpoint without a tokenizer loads,
    too, and using its tokenizer raises CheckpointError. `open_checkpoint` also gives its sampling defaults, which
    `herd.generate` does not know: its own are Meta's.

    Raises UnknownModelError, CheckpointError, ConfigError or TokenizerError.
    """
    checkpoint = open_checkpoint(path_or_name, dtype, device, weights=weights, tick=tick)
    return checkpoint.model, checkpoint.tokenizer


def load_model(
    path_or_name: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    weights: str = "auto",
    tick: Callable[[int, int], None] | None = None,
) -> Llama:
    """As `load`, the model alone: no tokenizer is opened."""
    return fill(open_store(resolve(path_or_name)), dtype, device, weights=weights, tick=tick)


def open_checkpoint(
    path_or_name: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    weights: str = "auto",
    tick: Callable[[int, int], None] | None = None,
) -> Checkpoint:
    """As `load`, with everything else the checkpoint holds."""
    path = resolve(path_or_name)
    made = find(os.fspath(path_or_name))
    return read_checkpoint(path, open_store(path), dtype, device, weights=weights, tick=tick, made=made)


def read_checkpoint(
    path: Path,
    store: TensorStore,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    weights: str = "auto",
    tick: Callable[[int, int], None] | None = None,
    made: Created | None = None,
    filled: Callable[..., Llama] = fill,
) -> Checkpoint:
    """The rest of `open_checkpoint`, for callers that look at the opened `store` first to choose dtype or device. `filled` makes
    the model, as `fill` does."""
    tokenizer = tokenizer_of(store)
    defaults = getattr(store, "generation", GenerationDefaults())
    model = filled(store, dtype, device, weights=weights, tick=tick)
    if made is not None:
        defaults = replace(defaults, chosen=made.params)
    return Checkpoint(path, store, model, tokenizer, defaults, made)
