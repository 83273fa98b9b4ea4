"""An opened checkpoint as a GGUF file, or as the numbered parts of one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from herd.checkpoint.gguf_config import ROPE_TABLE
from herd.checkpoint.gguf_metadata import Metadata
from herd.checkpoint.gguf_own import OWN_KEY
from herd.checkpoint.gguf_store import PLAIN, GGUFStore
from herd.checkpoint.names import homes
from herd.checkpoint.store import HoldsPacked, Releases, TensorInfo, TensorStore, origin, packed_of
from herd.checkpoint.write.gguf import Encoded, Typed, write_gguf_file
from herd.checkpoint.write.gguf_config import architecture, config_fields, rope_table
from herd.checkpoint.write.gguf_general import file_type, general_fields, sampling_fields
from herd.checkpoint.write.inventory import Form, planned
from herd.checkpoint.write.planned import Planned, Tick
from herd.checkpoint.write.source import Source
from herd.errors import ConfigError
from herd.quant.mix import mix
from herd.quant.numbers import torch_dtype
from herd.quant.scheme import QuantTensor, block_type
from herd.tokenizer.write import gguf_fields

__all__ = ["Importance", "gguf_form", "shard_names", "write_gguf"]

MAX_SHARDS = 4096
ROUTER = ".ffn_gate_inp.weight"
QUANTIZATION_VERSION = 2
"""ggml's version of the block formats, unchanged since May 2023."""

_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_OURS = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment", OWN_KEY)
"""Keys of another GGUF file that are made anew instead of carried over, beside those of the architecture and of splitting."""


@dataclass(frozen=True, slots=True)
class Importance:
    """Canonical name -> [columns] float32, how much each column matters; the text it was measured on, in `windows` pieces."""

    columns: Mapping[str, Tensor]
    text: str
    windows: int


def write_gguf(
    source: Source,
    file: Path,
    *,
    dtype: torch.dtype | None = None,
    quant: str | None = None,
    shards: int = 1,
    herd_only: bool = False,
    importance: Importance | None = None,
    tick: Tick = lambda nbytes: None,
) -> list[Path]:
    """Write `source` to `file`; with `shards` above 1 to `shard_names(file, shards)` instead. Returns what was written.

    `dtype` (float32, float16, bfloat16) or `quant` (a mix of `herd.quant.mix`: q8_0, q4_k_m, ...) says how matrices are stored;
    vectors and routers are F32. Without either every matrix keeps its type, and blocks of a GGUF source are copied as they
    are. A GGUF source's own keys (name, tokenizer, template, sampling) are carried over as they are. `herd_only` allows models
    that llama.cpp would run as other ones (see `config_fields`). `importance` goes to the encoders, and the file says so.

    Raises CheckpointError when a tensor cannot be stored so, ConfigError for options and models that GGUF cannot express.
    """
    store = source.store
    form = gguf_form(source, dtype=dtype, quant=quant)
    canonical = {home.name: name for name, home in homes(store.config, "gguf").items()}
    plans = [_checked(store, plan, canonical[plan.name]) for plan in planned(store, "gguf", form)]
    if importance is not None:
        plans = [_weighed(store, plan, canonical[plan.name], importance) for plan in plans]
    table = rope_table(store.config)
    if table is not None:
        plans.insert(0, Planned(ROPE_TABLE, table.shape, "F32", lambda: torch.from_numpy(table)))
    kinds = [plan.stored for plan in plans if len(plan.shape) > 1 and not plan.name.endswith(ROUTER)]
    word = mix(quant).name if quant is not None else None if dtype is None else _PLAIN[dtype]
    metadata = _metadata(source, file, kinds, word, herd_only)
    if importance is not None:
        metadata |= {
            "quantize.imatrix.file": Typed("str", importance.text),
            "quantize.imatrix.entries_count": Typed("i32", len(importance.columns)),
            "quantize.imatrix.chunks_count": Typed("i32", importance.windows),
        }
    if shards == 1:
        write_gguf_file(file, metadata, plans, tick)
        return [file]
    return _write_shards(file, metadata, plans, shards, tick)


def gguf_form(source: Source, *, dtype: torch.dtype | None = None, quant: str | None = None) -> Form:
    """(canonical name, info) -> the type that `write_gguf` stores it in. Raises ConfigError for options that name none."""
    if dtype is not None and quant is not None:
        raise ConfigError("give either a dtype or a quantization: a quantization says how every tensor is stored")
    if dtype is not None and dtype not in _PLAIN:
        raise ConfigError(f"{str(dtype).removeprefix('torch.')} is no GGUF type for weights: F32, F16 or BF16")
    rule = _rule(source, quant)

    def form(name: str, info: TensorInfo) -> str:
        if len(info.shape) == 1 or name.endswith(".router.weight"):
            return "F32"
        if dtype is not None:
            return _PLAIN[dtype]
        return rule(name, info)

    return form


def shard_names(file: Path, count: int) -> list[Path]:
    """The parts of `file`, which itself is not written: NAME-00001-of-00003.gguf and so on."""
    return [file.with_name(f"{file.stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _rule(source: Source, quant: str | None) -> Callable[[str, TensorInfo], str]:
    """The type of matrices. Says once where the mix cannot be followed, and where blocks are made from blocks."""
    if quant is None:
        return lambda name, info: _own_type(source.store, name, info)
    chosen, store, said = mix(quant), source.store, set[str]()

    def rule(name: str, info: TensorInfo) -> str:
        choice = chosen.kind(name, info.shape, store.config)
        kind = block_type(info.stored)
        packed = packed_of(store, name)
        decoded = kind is not None and kind.decode is not None and choice.kind != info.stored
        again = (decoded or (packed is not None and not packed.holds(choice.kind))) and choice.kind != "F32"
        notes = [
            choice.note,
            f"{info.stored} blocks are decoded and rounded again, which loses more" if again else None,
        ]
        for note in notes:
            if note is not None and note not in said:
                said.add(note)
                warnings.warn(f"{store.path}, {name} and perhaps more: {note}", stacklevel=6)
        return choice.kind

    return rule


def _own_type(store: TensorStore, name: str, info: TensorInfo) -> str:
    """The type a matrix has already, or that holds just its values."""
    packed = packed_of(store, name)
    if packed is not None:
        assert isinstance(store, HoldsPacked)
        held = block_type(packed.holder() or "")
        return _PLAIN[torch_dtype(store.dequantized)] if held is None else held.name
    kind = block_type(info.stored)
    if kind is not None and (kind.decode is not None or kind.dtype in PLAIN):
        return kind.name
    if info.dtype in _PLAIN:
        return _PLAIN[info.dtype]
    warnings.warn(f"{name} is stored as {info.stored}, which GGUF readers do not take: it becomes F32", stacklevel=4)
    return "F32"


def _checked(store: TensorStore, plan: Planned, canonical: str) -> Planned:
    """`plan` with a maker that refuses numbers its type cannot hold, and that makes no float32 copy of 16-bit matrices."""
    info = store.info(canonical)
    kind = block_type(info.stored)
    packed = packed_of(store, canonical)
    quantized = (kind is not None and kind.decode is not None) or (packed is not None and packed.holds(plan.stored))
    if quantized or info.dtype not in _PLAIN or _PLAIN[info.dtype] == plan.stored:
        return plan

    def make() -> Tensor | QuantTensor:
        from herd.quant.encode import encode  # plain files need no encoder

        made = encode(store.read(canonical), plan.stored, name=plan.name)
        if isinstance(store, Releases):
            store.release(canonical)
        return made

    return replace(plan, make=make)


def _weighed(store: TensorStore, plan: Planned, canonical: str, importance: Importance) -> Planned:
    """`plan` with a maker that encodes with the importance of its columns, where that is known and the type heeds it."""
    columns = importance.columns.get(canonical)
    if columns is None or store.info(canonical).stored == plan.stored:
        return plan

    def make() -> Tensor | QuantTensor:
        from herd.quant.encode import encode

        made = encode(store.read(canonical), plan.stored, name=plan.name, importance=columns)
        if isinstance(store, Releases):
            store.release(canonical)
        return made

    return replace(plan, make=make)


def _metadata(source: Source, file: Path, kinds: Sequence[str], word: str | None, herd_only: bool) -> dict[str, Any]:
    store = source.store
    arch = architecture(store.config)
    numbers = config_fields(store.config, path=file, herd_only=herd_only)
    if isinstance(origin(store), GGUFStore):
        given = store.metadata()
        assert isinstance(given, Metadata)
        general, tokenizer = _carried(given, arch)
        unchanged = word is None and "general.file_type" in given
        number = given["general.file_type"] if unchanged else file_type(kinds, word)
        general["general.file_type"] = Typed("u32", number)
    else:
        general = general_fields(store, kinds, word) | sampling_fields(source.generation)
        tokenizer = _tokenizer(source, file)
    return {
        "general.architecture": arch,
        **general,
        **numbers,
        "general.quantization_version": QUANTIZATION_VERSION,
        **tokenizer,
    }


def _tokenizer(source: Source, file: Path) -> Mapping[str, Any]:
    if source.tokenizer is None:
        warnings.warn(f"{file}: the source has no tokenizer, and llama.cpp opens no file without one", stacklevel=4)
        return {}
    fields = gguf_fields(source.tokenizer, source.template, rows=source.store.config.vocab_size)
    return {key: Typed("str", value) if value == [] else value for key, value in fields.items()}  # no merges


def _carried(given: Metadata, arch: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What another GGUF file says of name, sampling and the like, and of the tokenizer, as it is."""
    was = f"{given['general.architecture']}."
    kept = {
        key: Encoded(given.encoded(key))
        for key in given
        if key not in _OURS and not key.startswith((was, f"{arch}.", "split.", "quantize."))
    }
    tokenizer = {key: value for key, value in kept.items() if key.startswith("tokenizer.")}
    return {key: value for key, value in kept.items() if key not in tokenizer}, tokenizer


def _write_shards(
    file: Path, metadata: Mapping[str, Any], plans: Sequence[Planned], shards: int, tick: Tick
) -> list[Path]:
    """Runs of tensors of about equal bytes; all of the metadata in the first part, as llama.cpp's gguf-split does."""
    if not 1 < shards <= min(MAX_SHARDS, len(plans)):
        raise ConfigError(f"{shards} parts: this model can be cut into 1 to {min(MAX_SHARDS, len(plans))}")
    paths = shard_names(file, shards)
    for number, (path, part) in enumerate(zip(paths, _cut(plans, shards), strict=True)):
        keys = {
            "split.no": Typed("u16", number),
            "split.tensors.count": Typed("i32", len(plans)),
            "split.count": Typed("u16", shards),
        }
        write_gguf_file(path, {**metadata, **keys} if number == 0 else keys, part, tick)
    return paths


def _cut(plans: Sequence[Planned], count: int) -> list[Sequence[Planned]]:
    total, done, parts = sum(plan.nbytes for plan in plans), 0, []
    start = 0
    for index, plan in enumerate(plans):
        done += plan.nbytes
        left, parts_left = len(plans) - index - 1, count - len(parts) - 1
        if parts_left and (done * count >= total * (len(parts) + 1) or left == parts_left):
            parts.append(plans[start : index + 1])
            start = index + 1
    return [*parts, plans[start:]]
