"""A Meta folder: consolidated.NN.pth, one file per model-parallel rank, params.json, tokenizer.model and checklist.chk.

Every tensor is read once and cut for all ranks, whose files grow side by side. Llama 1, 2 and Code Llama cut the embedding in
columns, later generations in rows. Source: llama-models models/checkpoint.py; meta-llama/llama and codellama, model.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.checkpoint.names import Column, Home, join, shapes
from herd.checkpoint.store import GenerationDefaults
from herd.checkpoint.write.hf_config import is_dense
from herd.checkpoint.write.inventory import Foreign, foreign, kept
from herd.checkpoint.write.meta_params import Params, params_json
from herd.checkpoint.write.planned import Planned, Tick
from herd.checkpoint.write.source import Source
from herd.checkpoint.write.tokenizer_files import meta_tokenizer
from herd.checkpoint.write.torchfile import TorchFileWriter
from herd.errors import CheckpointError
from herd.model.config import ModelConfig

__all__ = ["rank_counts", "write_meta"]

MAX_RANKS = 256
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"
_KEYS_VALUES = (".wk.weight", ".wv.weight")
_CHUNK = 8 << 20
_THETA_3 = 500_000.0


def write_meta(
    source: Source,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    shards: int = 1,
    tick: Tick = lambda nbytes: None,
) -> list[str]:
    """Write the checkpoint `source` into `folder`, cut for `shards` model-parallel ranks; see `new_folder` for whole or nothing.

    Without `dtype` every tensor keeps its type (quantized ones become bfloat16, see `inventory.kept`). Tied models name the
    embedding a second time as the output, as Meta's code expects. Returns what could not be carried over, a line each. Raises
    CheckpointError, ConfigError or TokenizerError for what the format cannot hold, and OSError as the system does.
    """
    place, store = Path(folder), source.store
    columns = _by_columns(source)
    copies = _copies(store.config, shards, columns, place)
    params = params_json(replace(store.config, n_kv_heads=store.config.n_kv_heads * copies))
    column: Column = "meta" if is_dense(store.config) else "meta4"
    tokenizer, notes = meta_tokenizer(source)
    _Ranks(foreign(store, column, kept(store, dtype)), store.config, shards, columns, copies).write(place, tick)
    (place / "params.json").write_text(json.dumps(params.data, indent=2) + "\n", encoding="utf-8")
    for name, content in tokenizer.items():
        (place / name).write_bytes(content)
    _write_checklist(place)
    return notes + _notes(source, params, template="chat_template.jinja" in tokenizer)


def rank_counts(config: ModelConfig, *, columns: bool = False) -> list[int]:
    """The numbers of ranks that a model can be cut for: all heads and widths divide, and key/value heads, too, or each is held
    by two ranks (dense models; Meta's 405B for 16 ranks). `columns`: the embedding is cut in columns."""
    widths = [config.n_heads, config.vocab_size] + [config.dim] * columns
    widths += [config.hidden_dim] * any(not spec.moe for spec in config.layers)
    widths += [config.moe.hidden_dim] if config.moe else []
    groups = config.n_kv_heads
    return [
        n
        for n in range(1, MAX_RANKS + 1)
        if not any(width % n for width in widths) and (groups % n == 0 or (n == 2 * groups and is_dense(config)))
    ]


class _Ranks:
    """All tensors of a model, cut for `count` ranks."""

    def __init__(self, tensors: Sequence[Foreign], config: ModelConfig, count: int, columns: bool, copies: int) -> None:
        self._tensors, self._config, self._count = tensors, config, count
        self._columns, self._copies = columns, copies

    def write(self, place: Path, tick: Tick) -> None:
        """The files of all ranks, side by side."""
        place.mkdir(parents=True, exist_ok=True)
        plans = [self._plan(tensor) for tensor in self._tensors]
        same = {_OUTPUT: _EMBEDDING} if self._config.tie_embeddings else None
        with ExitStack() as stack:
            names = [f"consolidated.{rank:02d}.pth" for rank in range(self._count)]
            files = [stack.enter_context(TorchFileWriter(place / name, plans, same)) for name in names]
            for tensor in self._tensors:
                self._write(tensor, files, tick)

    def _write(self, tensor: Foreign, files: Sequence[TorchFileWriter], tick: Tick) -> None:
        """One tensor, read once; nothing of it is held when the next is read."""
        parts = tensor.parts()
        for rank, file in enumerate(files):
            file.add(self._piece(tensor.homes, parts, rank), tick)

    def _plan(self, tensor: Foreign) -> Planned:
        """What every rank's file says of a tensor; the pieces of all ranks have one shape."""
        whole = shapes(self._config)
        outlines = [torch.empty(whole[home.canonical], device="meta") for home in tensor.homes]

        def make() -> Tensor:
            raise AssertionError("pieces are added rank by rank")

        return Planned(tensor.name, tuple(self._piece(tensor.homes, outlines, 0).shape), tensor.type.name, make)

    def _piece(self, homes: Sequence[Home], parts: Sequence[Tensor], rank: int) -> Tensor:
        cut = [self._cut(home, part, rank) for home, part in zip(homes, parts, strict=True)]
        return join(homes, cut, self._config)

    def _cut(self, home: Home, tensor: Tensor, rank: int) -> Tensor:
        """One rank's piece of a canonical tensor."""
        dim = 1 if self._columns and home.canonical == _EMBEDDING else home.shard
        if dim is None:
            return tensor
        count = self._count
        if self._copies > 1 and home.canonical.endswith(_KEYS_VALUES):
            rank, count = rank // self._copies, count // self._copies
        size = tensor.shape[dim] // count
        return tensor.narrow(dim, rank * size, size)


def _by_columns(source: Source) -> bool:
    """Whether the embedding is cut in columns, as Meta's code up to Llama 2 and Code Llama expects.

    The vocabulary tells the generation; without one, a small vocabulary and another theta than Llama 3's.
    """
    config = source.store.config
    if config.tie_embeddings or not is_dense(config):
        return False  # only later generations are; and each rank has the same piece of embedding and output
    if source.tokenizer is not None:
        return source.tokenizer.family in ("llama2", "codellama")
    return config.vocab_size < 100_000 and config.rope_scaling is None and config.rope_theta != _THETA_3


def _copies(config: ModelConfig, count: int, columns: bool, place: Path) -> int:
    """How many ranks hold each key/value head. Raises CheckpointError for a count of ranks that does not fit."""
    possible = rank_counts(config, columns=columns)
    if count not in possible:
        listed = ", ".join(map(str, possible))
        why = (
            f"this model cannot be cut for {count} ranks, its heads and widths divide by {listed}: choose one of these"
        )
        raise CheckpointError(why, path=place)
    return 2 if config.n_kv_heads % count else 1


def _notes(source: Source, params: Params, *, template: bool) -> list[str]:
    """What the format cannot hold; `template`: the chat template went along with the tokenizer after all."""
    notes = []
    if params.only_herd:
        listed = ", ".join(params.only_herd)
        notes.append(
            f"Meta's own code does not read {listed} from params.json, so it would run another model; herd does"
        )
    if source.template is not None and not template:
        notes.append("Meta's format has no place for the chat template: herd renders prompts in code")
    if replace(source.generation, stop_ids=frozenset(), extra={}) != GenerationDefaults():
        notes.append("Meta's format has no place for the sampling defaults of the source")
    skipped = getattr(source.store, "skipped", ())
    if skipped:
        notes.append(f"{len(skipped)} tensors of the vision half are not carried over: herd writes the text model")
    return notes


def _write_checklist(place: Path) -> None:
    """MD5 sums as the releases have them, in the form that md5sum checks."""
    lines = [f"{_md5(path)}  {path.name}\n" for path in sorted(place.iterdir()) if path.is_file()]
    (place / "checklist.chk").write_text("".join(lines), encoding="utf-8")


def _md5(path: Path) -> str:
    digest: Any = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
