"""A Hugging Face folder: weights in one file or in indexed shards, configs, tokenizer files, chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from herd.checkpoint.hf import HFStore
from herd.checkpoint.names import Column
from herd.checkpoint.store import origin
from herd.checkpoint.write.hf_config import TokenIds, carried_keys, config_json, generation_json, is_dense
from herd.checkpoint.write.inventory import kept, planned, written_dtype
from herd.checkpoint.write.planned import Planned, Tick
from herd.checkpoint.write.safetensors import FORMAT, write_safetensors
from herd.checkpoint.write.source import Source
from herd.checkpoint.write.tokenizer_files import hf_tokenizer
from herd.checkpoint.write.torchfile import write_torch_file
from herd.errors import CheckpointError

__all__ = ["SHARD_BYTES", "write_hf"]

SHARD_BYTES = 5_000_000_000
"""Bytes of a shard when nobody says how many there should be: what Meta's own repositories have."""


def write_hf(
    source: Source,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    shards: int | None = None,
    bin: bool = False,
    ids: TokenIds | None = None,
    tick: Tick = lambda nbytes: None,
) -> list[str]:
    """Write the checkpoint `source` into `folder`, which is made when it is missing; see `new_folder` for whole or nothing.

    Without `dtype` every tensor keeps its type (quantized ones become bfloat16, see `inventory.kept`). `shards` is the number
    of weight files, by default as many as keep each below SHARD_BYTES; `bin` writes pytorch_model.bin instead of safetensors.
    `ids` are the token ids that the configs name, by default those of tokenizer and sampling defaults.

    Returns what could not be carried over, a line each. Raises CheckpointError, ConfigError or TokenizerError for what the
    format cannot hold, and OSError as the system does.
    """
    place, store = Path(folder), source.store
    column: Column = "hf" if is_dense(store.config) else "hf4"
    plans = planned(store, column, kept(store, dtype))
    files = _shards(place, plans, shards, bin)
    config, generation = _configs(source, written_dtype(plans), ids or _ids(source))
    tokenizer, notes = hf_tokenizer(source)
    place.mkdir(parents=True, exist_ok=True)
    for name, part in files.items():
        if bin:
            write_torch_file(place / name, part, tick)
        else:
            write_safetensors(place / name, part, FORMAT, tick)
    if len(files) > 1:
        _write_json(place / f"{_WEIGHTS[bin]}.index.json", _index(files))
    _write_json(place / "config.json", config)
    _write_json(place / "generation_config.json", generation)
    for name, content in tokenizer.items():
        (place / name).write_bytes(content)
    skipped = getattr(store, "skipped", ())
    if skipped:
        notes.append(f"{len(skipped)} tensors of the vision half are not carried over: herd writes the text model")
    return notes


_WEIGHTS = {False: "model.safetensors", True: "pytorch_model.bin"}


def _shards(place: Path, plans: Sequence[Planned], count: int | None, bin: bool) -> dict[str, list[Planned]]:
    """File name -> its tensors: neighbours together, and about the same number of bytes in each."""
    total, name = sum(plan.nbytes for plan in plans), _WEIGHTS[bin]
    count = max(1, -(-total // SHARD_BYTES)) if count is None else count
    if not 1 <= count <= len(plans):
        raise CheckpointError(f"{count} shards: this model has {len(plans)} tensors, at least one for each", path=place)
    if count == 1:
        return {name: list(plans)}
    stem, _, suffix = name.partition(".")
    parts = list(_cut(plans, count, total))
    return {f"{stem}-{i:05d}-of-{count:05d}.{suffix}": part for i, part in enumerate(parts, 1)}


def _cut(plans: Sequence[Planned], count: int, total: int) -> Iterator[list[Planned]]:
    start = passed = 0
    for number in range(1, count + 1):
        stop = start + 1
        passed += plans[start].nbytes
        last = len(plans) - (count - number)  # each later shard needs one
        while stop < last and (number == count or passed + plans[stop].nbytes / 2 <= total * number / count):
            passed += plans[stop].nbytes
            stop += 1
        yield list(plans[start:stop])
        start = stop


def _index(files: Mapping[str, Sequence[Planned]]) -> dict[str, Any]:
    total = sum(plan.nbytes for part in files.values() for plan in part)
    where = {plan.name: name for name, part in files.items() for plan in part}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


def _configs(source: Source, dtype: torch.dtype, ids: TokenIds) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json; from a Hugging Face source, with whatever else they said."""
    store, word = origin(source.store), str(dtype).removeprefix("torch.")
    if not isinstance(store, HFStore):
        return config_json(source.store.config, ids, word), generation_json(source.generation, ids)
    carried = carried_keys(store.metadata())
    config = config_json(source.store.config, ids, word, carried)
    # It may name other ids than the defaults do.
    config |= {key: carried[key] for key in ids.fields() if key in carried}
    named = store.folder / "generation_config.json"
    if source.generation == store.generation and named.is_file():
        return config, json.loads(named.read_text(encoding="utf-8"))
    return config, generation_json(source.generation, ids)


def _ids(source: Source) -> TokenIds:
    if source.tokenizer is None:
        return TokenIds(stop=source.generation.stop_ids)
    special = source.tokenizer.special
    return TokenIds(special.bos, source.generation.stop_ids or special.stop, special.pad)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
