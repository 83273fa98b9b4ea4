"""What looks wrong, risky or merely odd in a checkpoint, from headers and file names alone. Imports no torch.

Each check is a generator of Findings; `code` is stable for programs.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herd.checkpoint.kinship import Kin
from herd.checkpoint.store import TensorInfo, TensorStore
from herd.errors import HerdError
from herd.files import read_json, short
from herd.model.config import RopeScaling
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Finding", "in_files", "in_numbers", "in_tokens"]

_MARK = re.compile(r"<\|[a-z0-9_]+\|>")
_TURN_ENDS = ("<|eot_id|>", "<|eot|>", "<|eom_id|>")
_PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True)
class Finding:
    """`code` is a short name for programs, `text` one sentence for people."""

    code: str
    text: str


def in_files(path: Path, store: TensorStore | None) -> Iterator[Finding]:
    """What lies beside the weights: code, pickles, adapters, second copies, permissions, lists that do not match.

    Of a single GGUF file only itself and a vision half beside it are looked at.
    """
    folder = path if path.is_dir() else path.parent
    names = sorted(entry.name for entry in folder.iterdir())
    if path.is_file() and (store is None or store.kind == "gguf"):
        yield from _permissions(folder, [path.name])
        if projectors := [name for name in names if "mmproj" in name.lower() and name != path.name]:
            yield Finding("mmproj", f"a vision half lies beside it: {short(projectors)}")
        return
    tensors = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith(_PICKLES) and not name.startswith("training_args")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if code := [name for name in names if name.endswith(".py")]:
        yield Finding("code", f"program code beside the weights, which herd never runs: {short(code)}")
    if tensors and pickles:
        yield Finding("pickle", f"pickles beside safetensors, not needed and not opened: {short(pickles)}")
    kinds = [("safetensors", tensors), ("torch files", pickles), ("GGUF", ggufs)]
    several = [f"{len(found)} {kind}" for kind, found in kinds if found]
    if len(several) > 1:
        yield Finding("copies", f"several formats in one folder ({', '.join(several)}): are they the same weights?")
    if (folder / "original").is_dir() and any((folder / "original").glob("consolidated.*")):
        yield Finding("copies", "original/ holds Meta's files as well: twice the disk space")
    if "adapter_config.json" in names and "config.json" in names:
        yield Finding("adapter", "an adapter (adapter_config.json) beside a model: it is not applied")
    if projectors := [name for name in ggufs if "mmproj" in name.lower()]:
        yield Finding("mmproj", f"the vision half lies beside it: {short(projectors)}")
    yield from _permissions(folder, names)
    yield from _checklist(folder)
    yield from _total_size(folder, store)


def _permissions(folder: Path, names: Sequence[str]) -> Iterator[Finding]:
    if os.name != "posix":
        return
    open_to_all = [
        name for name in names if (folder / name).is_file() and (folder / name).stat().st_mode & stat.S_IWOTH
    ]
    if folder.stat().st_mode & stat.S_IWOTH and not folder.stat().st_mode & stat.S_ISVTX:
        yield Finding("world-writable", "anybody on this machine can replace files in this folder")
    if open_to_all:
        yield Finding("world-writable", f"anybody on this machine can change {short(open_to_all)}")


def _checklist(folder: Path) -> Iterator[Finding]:
    """Meta's list of MD5 sums. Nothing is hashed here; empty and missing files show without it."""
    for place in (folder / "checklist.chk", folder / "original" / "checklist.chk"):
        if not place.is_file() or place.stat().st_size > 1 << 20:
            continue
        wrong = []
        for line in place.read_text(errors="replace").splitlines():
            match = re.fullmatch(r"([0-9a-fA-F]{32})\s+\*?([^/\\]+)", line.strip())
            if match is None:
                continue
            file = place.parent / match[2]
            if not file.is_file():
                wrong.append(f"{match[2]} is missing")
            elif file.stat().st_size == 0 and match[1].lower() != "d41d8cd98f00b204e9800998ecf8427e":
                wrong.append(f"{match[2]} is empty")
        if wrong:
            yield Finding("checklist", f"{place.name} lists more than is here: {short(wrong)}")
        else:
            yield Finding("checklist", f"{place.name} is there; its sums were not checked: md5sum -c {place.name}")


def _total_size(folder: Path, store: TensorStore | None) -> Iterator[Finding]:
    """The index of a sharded checkpoint says how many bytes all tensors have."""
    index = folder / "model.safetensors.index.json"
    if store is None or store.kind != "hf" or not index.is_file():
        return
    said = read_json(index).get("metadata")
    total = said.get("total_size") if isinstance(said, Mapping) else None
    held = sum(store.info(name).nbytes for name in store.names())
    if isinstance(total, int | float) and int(total) != held and not getattr(store, "skipped", ()):
        twice = " (a tied output may be stored, too)" if store.config.tie_embeddings else ""
        yield Finding("total-size", f"the index says {int(total):,} bytes of tensors, the model has {held:,}{twice}")


def in_numbers(store: TensorStore, infos: Mapping[str, TensorInfo], kin: Kin | None) -> Iterator[Finding]:
    """Config against tensors and against the release that the model comes from."""
    config, data = store.config, store.metadata()
    if data.get("auto_map") or data.get("trust_remote_code"):
        yield Finding("remote-code", "config.json asks for code from its repository (auto_map), which herd never runs")
    if kin is not None and not kin.exact:
        nearest = kin.releases[0].id
        for field, here, there in kin.differs:
            yield Finding("differs", f"{field} is {_said(here)}; in {nearest} it is {_said(there)}")
    if (
        config.rope_scaling is None
        and config.temper is None
        and config.rope_theta == 500_000
        and config.max_seq_len > 8192
    ):
        yield Finding(
            "unscaled",
            f"a context of {config.max_seq_len:,} without the frequency scaling of Llama 3.1: beyond 8,192 tokens it reads badly",
        )
    yield from _dtypes(store, infos)


def _dtypes(store: TensorStore, infos: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    kinds = Counter(info.stored for info in infos.values())
    if "F16" in kinds and store.kind != "gguf" and store.config.rope_theta >= 500_000:
        yield Finding("float16", "stored as float16, released in bfloat16: numbers above 65,504 became infinite")
    form = getattr(store, "form", None)
    if form is not None:
        yield Finding(
            "quantized", f"quantized as {form}; what herd holds exactly is in docs/formats/quantized-checkpoints.md"
        )
        for note in getattr(store, "notes", ()):
            yield Finding("quantized", note)
    if store.kind == "gguf" or form is not None:
        return
    said = store.metadata().get("torch_dtype", store.metadata().get("dtype"))
    main = max(kinds, key=lambda kind: sum(i.nbytes for i in infos.values() if i.stored == kind))
    spoken = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(said if isinstance(said, str) else "")
    if spoken is not None and spoken != main:
        yield Finding("dtype", f"config.json says {said}, the tensors are {main}")
    if len(kinds) > 1:
        rare = [name for name, info in infos.items() if info.stored != main]
        yield Finding("dtype", f"{len(rare)} tensors are not {main}: {short(rare)}")


def in_tokens(store: TensorStore, tokenizer: Tokenizer, templates: Mapping[str, str]) -> Iterator[Finding]:
    """Vocabulary, special ids and templates against each other and against the model."""
    rows, size, special = store.config.vocab_size, tokenizer.vocab_size, tokenizer.special
    if size != rows:
        word = f"{rows - size:,} rows have no token" if rows > size else f"{size - rows:,} tokens have no row"
        yield Finding("vocabulary", f"{size:,} tokens, {rows:,} embedding rows: {word}")
    data = store.metadata()
    if store.kind == "hf":
        yield from _hf_ids(Path(store.path), data, tokenizer)
    elif store.kind == "gguf":
        for key, ours in (("bos", special.bos), ("eos", None)):
            said = data.get(f"tokenizer.ggml.{key}_token_id")
            if type(said) is int and (said >= size or (ours is not None and said != ours)):
                yield Finding("special-ids", f"tokenizer.ggml.{key}_token_id is {said}, but the vocabulary has {ours}")
    yield from _template_findings(templates, tokenizer)
    if templates:
        turn = [special.get(name) for name in _TURN_ENDS if any(name in text for text in templates.values())]
        stop = special.stop | getattr(getattr(store, "generation", None), "stop_ids", frozenset())
        if turn and not any(id in stop for id in turn if id is not None):
            yield Finding("stop-ids", "the template ends turns with an id that is no stop id: replies would not end")


def _hf_ids(path: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[Finding]:
    folder = path if path.is_dir() else path.parent
    special = tokenizer.special
    bos = config.get("bos_token_id")
    if type(bos) is int and bos != special.bos:
        yield Finding("special-ids", f"config.json says BOS is {bos}, the vocabulary says {special.bos}")
    generation = folder / "generation_config.json"
    ours = _ids(config.get("eos_token_id"))
    if generation.is_file():
        try:
            theirs = _ids(read_json(generation).get("eos_token_id"))
        except HerdError as error:
            yield Finding("generation", str(error))
            theirs = frozenset()
        if ours and theirs and ours != theirs:
            yield Finding(
                "special-ids",
                f"config.json stops at {sorted(ours)}, generation_config.json at {sorted(theirs)}; the latter is used",
            )
    if beyond := sorted(id for id in ours if id >= tokenizer.vocab_size):
        yield Finding("special-ids", f"config.json stops at {beyond}, which the vocabulary does not have")


def _template_findings(templates: Mapping[str, str], tokenizer: Tokenizer) -> Iterator[Finding]:
    if len(set(templates.values())) > 1:
        yield Finding("templates", f"{' and '.join(templates)} hold different chat templates; the first is used")
    for source, text in templates.items():
        unknown = sorted({mark for mark in _MARK.findall(text) if tokenizer.special.get(mark) is None})
        if unknown and tokenizer.family in ("llama3", "llama4"):
            yield Finding("template-tokens", f"{source} names tokens that the vocabulary lacks: {short(unknown)}")


def _ids(value: Any) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(v for v in values if type(v) is int)


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return "another pattern of layers"
    if isinstance(value, RopeScaling):
        bounds = f"{value.low_freq_factor:g}, {value.high_freq_factor:g}"
        return f"stretched by {value.factor:g} ({bounds}) from {value.original_max_seq_len:,}"
    return f"{value:,}" if type(value) is int else str(value)
