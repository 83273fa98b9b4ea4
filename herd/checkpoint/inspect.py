"""inspect(path): what is in a checkpoint, from headers and small files alone. Imports no torch; nothing in the files is run.

The weights' data is not read (of a tied output that is stored twice some samples are compared).
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from herd.chat.formats import detect
from herd.checkpoint.foreign import Foreign, foreign_at, stored_tensors
from herd.checkpoint.kinship import Kin, generation_of, kin_of
from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.checkpoint.store import GenerationDefaults, TensorInfo, TensorStore
from herd.checkpoint.suspicion import Finding, in_files, in_numbers, in_tokens
from herd.checkpoint.vocabulary import format_source, tokenizer_at
from herd.errors import HerdError, PromptError
from herd.files import read_json, short
from herd.model.accounting import active_parameters, parameters
from herd.model.config import ModelConfig
from herd.quant.mix import MIXES
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Held", "Inspection", "TokenizerFacts", "inspect"]

_FILE_TYPES = {mix.file_type: mix.name for mix in MIXES.values()} | {
    3: "Q4_1", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L",
}  # fmt: skip
"""`general.file_type` of GGUF, as llama.h numbers the mixes: those that herd writes, and others that it reads."""


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor: canonical name (in checkpoints that are not opened, the file's own), shape, type, bytes, file."""

    name: str
    shape: tuple[int, ...]
    stored: str
    nbytes: int
    file: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFacts:
    """`chat_format` is the prompt format that was recognised, `format_from` who says so ("files" or "catalog"); `templates` are
    the places that hold a chat template. `problem` says why the tokenizer cannot be used."""

    family: str | None = None
    size: int | None = None
    bos: int | None = None
    eos: int | None = None
    stop: tuple[int, ...] = ()
    special: int = 0
    chat_format: str | None = None
    format_from: str | None = None
    templates: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """Everything that was found. `problem` is set when herd cannot open it; `kind` is "meta", "hf", "gguf", or that of a
    Foreign checkpoint, whose `foreign` then says what it is."""

    path: str
    kind: str
    problem: str | None = None
    foreign: Foreign | None = None
    config: ModelConfig | None = None
    kin: Kin | None = None
    tensors: tuple[Held, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)
    shards: int = 0
    mix: str | None = None
    tokenizer: TokenizerFacts | None = None
    generation: GenerationDefaults | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def types(self) -> dict[str, tuple[int, int, int]]:
        """Stored type -> (tensors, numbers, bytes), the largest first."""
        found: dict[str, tuple[int, int, int]] = {}
        for held in self.tensors:
            count, numbers, nbytes = found.get(held.stored, (0, 0, 0))
            found[held.stored] = (count + 1, numbers + math.prod(held.shape), nbytes + held.nbytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][2]))

    @property
    def roles(self) -> dict[str, dict[str, int]]:
        """Parameter without its layer number -> type -> how many tensors: the quantization mix."""
        found: dict[str, Counter[str]] = {}
        for held in self.tensors:
            role = ".".join(part for part in held.name.split(".") if not part.isdecimal() and part != "layers")
            found.setdefault(role, Counter())[held.stored] += 1
        return {role: dict(kinds) for role, kinds in found.items()}

    @property
    def what(self) -> str:
        """One line for people."""
        if self.foreign is not None:
            return self.foreign.what
        if self.config is None:
            return "nothing that herd can open"
        if self.kin is None:
            return f"{generation_of(self.config)}, of no released size"
        names = " or ".join(release.name for release in self.kin.releases[:3])
        return names if self.kin.exact else f"nearest to {names}"

    def as_dict(self, *, tensors: bool = False) -> dict[str, Any]:
        """Plain data, as `herd inspect --json` prints it (docs/inspect.md has the keys)."""
        kin, config = self.kin, self.config
        return {
            "schema": "herd.inspect/1",
            "path": self.path,
            "kind": self.kind,
            "what": self.what,
            "problem": self.problem,
            "release": None
            if kin is None
            else {
                "ids": [release.id for release in kin.releases],
                "exact": kin.exact,
                "generation": kin.releases[0].generation,
                "differs": [name for name, _, _ in kin.differs],
            },
            "config": None if config is None else _geometry(config),
            "parameters": None if config is None else parameters(config),
            "active_parameters": None if config is None else active_parameters(config),
            "stored_numbers": sum(math.prod(held.shape) for held in self.tensors),
            "types": {
                name: {"tensors": count, "numbers": numbers, "bytes": nbytes}
                for name, (count, numbers, nbytes) in self.types.items()
            },
            "mix": self.mix,
            "roles": self.roles,
            "files": dict(self.files),
            "shards": self.shards,
            "tokenizer": None if self.tokenizer is None else asdict(self.tokenizer),
            "generation_defaults": None if self.generation is None else _defaults(self.generation),
            "foreign": None if self.foreign is None else dict(self.foreign.facts),
            "suspicious": [asdict(finding) for finding in self.findings],
            **({"tensors": [asdict(held) for held in self.tensors]} if tensors else {}),
        }


def inspect(path_or_name: str | os.PathLike[str]) -> Inspection:
    """What is in the checkpoint at a path, or under a name that is on this machine.

    A checkpoint that herd cannot open is described as far as possible, with `problem` set. Raises CheckpointError when there
    is nothing to describe, UnknownModelError for names.
    """
    path = resolve(path_or_name)
    folder = path if path.is_dir() else path.parent
    with _caught() as said:
        foreign = foreign_at(path)
        if foreign is not None:
            return _described(path, folder, foreign)
        try:
            store = open_store(path, headers_only=True)
        except HerdError as error:
            return _unopened(path, folder, error)
        infos = {name: store.info(name) for name in store.names()}
        tokenizer, facts = _tokenizer(store, path)
    kin = kin_of(store.config, _hints(path, store), facts.chat_format if facts else None)
    findings = [Finding("opening", line) for line in said]
    findings += in_numbers(store, infos, kin)
    if facts is not None and facts.problem is not None:
        findings.append(Finding("tokenizer", facts.problem))
    if facts is None:
        findings.append(Finding("tokenizer", "there is none: the model can run, but not on text"))
    if tokenizer is not None:
        findings += in_tokens(store, tokenizer, _templates(folder, store))
    findings += in_files(path, store)
    if sampled := getattr(store, "sampled", ()):
        text = f"{sampled[0]} repeats the embedding, to which it is tied: samples are equal, opening compares all"
        findings.append(Finding("copies", text))
    if skipped := getattr(store, "skipped", ()):
        text = f"{len(skipped)} tensors of the vision half are there; herd runs the text model only"
        findings.append(Finding("vision", text))
    tensors = tuple(
        Held(name, info.shape, info.stored, info.nbytes, _file_of(store, name)) for name, info in infos.items()
    )
    return Inspection(
        path=str(path),
        kind=store.kind,
        config=store.config,
        kin=kin,
        tensors=tensors,
        files=_files(path, folder),
        shards=_shards(store, tensors),
        mix=_mix(store, infos),
        tokenizer=facts,
        generation=getattr(store, "generation", None),
        findings=tuple(findings),
    )


@contextmanager
def _caught() -> Iterator[list[str]]:
    """Warnings as lines, for the findings."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
    lines.extend(dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught))


def _described(path: Path, folder: Path, foreign: Foreign) -> Inspection:
    findings = [Finding("opening", note) for note in foreign.notes]
    findings += in_files(path, None)
    return Inspection(
        path=str(path),
        kind=foreign.kind,
        foreign=foreign,
        tensors=tuple(Held(*stored) for stored in foreign.tensors),
        files=_files(path, folder),
        shards=len({stored[4] for stored in foreign.tensors}),
        findings=tuple(findings),
    )


def _unopened(path: Path, folder: Path, error: HerdError) -> Inspection:
    """What can be said of a folder whose checkpoint is refused; of a file there is nothing to say but the error."""
    if not path.is_dir():
        raise error
    tensors, _ = stored_tensors(folder)
    if not tensors:
        raise error
    return Inspection(
        path=str(path),
        kind="unreadable",
        problem=str(error),
        tensors=tuple(Held(*stored) for stored in tensors),
        files=_files(path, folder),
        shards=len({stored[4] for stored in tensors}),
        findings=tuple(in_files(path, None)),
    )


def _tokenizer(store: TensorStore, path: Path) -> tuple[Tokenizer | None, TokenizerFacts | None]:
    """(the tokenizer, what to say of it); facts without a tokenizer say why, neither: there is none."""
    metadata = store.metadata() if store.kind == "gguf" else None
    folder = path if path.is_dir() else path.parent
    here = ("tokenizer.model", "tokenizer.json", "original/tokenizer.model")
    if "tokenizer.ggml.model" not in metadata if metadata is not None else not any((folder / n).exists() for n in here):
        return None, None
    try:
        tokenizer = tokenizer_at(path, metadata)
    except HerdError as error:
        return None, TokenizerFacts(problem=str(error))
    problem = None
    try:
        chat_format = detect(tokenizer).name
    except PromptError as error:
        chat_format, problem = None, str(error)
    special = tokenizer.special
    return tokenizer, TokenizerFacts(
        family=tokenizer.family,
        size=tokenizer.vocab_size,
        bos=special.bos,
        eos=special.eos,
        stop=tuple(sorted(special.stop)),
        special=len(special.ids),
        chat_format=chat_format,
        format_from=format_source(tokenizer, path),
        templates=tuple(_templates(folder, store)),
        problem=problem,
    )


def _templates(folder: Path, store: TensorStore) -> dict[str, str]:
    """Place -> chat template, in the order in which they count."""
    if store.kind == "gguf":
        found = store.metadata().get("tokenizer.chat_template")
        return {"tokenizer.chat_template": found} if isinstance(found, str) else {}
    places: dict[str, str] = {}
    jinja = folder / "chat_template.jinja"
    if jinja.is_file() and jinja.stat().st_size < 1 << 20:
        places[jinja.name] = jinja.read_text(errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("chat_template")
            if isinstance(found, list):
                named = {e.get("name"): e.get("template") for e in found if isinstance(e, Mapping)}
                found = named.get("default")
            if isinstance(found, str):
                places[name] = found
    return places


def _hints(path: Path, store: TensorStore) -> list[str]:
    """Names that the model goes by: folders (those of the Hugging Face cache unfolded), files, GGUF's own."""
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    folder = folder.parent if folder.name == "original" else folder
    name = folder.name
    if folder.parent.name == "snapshots":
        name = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    data = store.metadata()
    said = [data.get(key) for key in ("general.name", "general.base_model.0.name", "_name_or_path")]
    return [name, *(text for text in said if isinstance(text, str) and len(text) < 200)]


def _file_of(store: TensorStore, name: str) -> str:
    file_of = getattr(store, "file_of", None)
    return "" if file_of is None else Path(file_of(name)).name


def _files(path: Path, folder: Path) -> dict[str, int]:
    """File name -> bytes; of a single file (or the parts of a split one) only that."""
    if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pth", ".json"):
        stem = path.name.rpartition("-of-")[0].rpartition("-")[0]
        parts = sorted(folder.glob(f"{_literal(stem)}-*-of-*.gguf")) if "-of-" in path.name and stem else [path]
        return {part.name: part.stat().st_size for part in parts or [path]}
    found = [*folder.iterdir(), *((folder / "original").iterdir() if (folder / "original").is_dir() else ())]
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(found) if file.is_file()}


def _literal(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _shards(store: TensorStore, tensors: tuple[Held, ...]) -> int:
    """Files that hold weights; Meta's ranks hold a piece of every tensor."""
    ranks = getattr(store, "_ranks", None)
    return len(ranks) if ranks else len({held.file for held in tensors})


def _mix(store: TensorStore, infos: Mapping[str, TensorInfo]) -> str | None:
    """What the file calls its quantization."""
    if store.kind != "gguf" or all(info.stored in ("F32", "F16", "BF16") for info in infos.values()):
        return None
    number = store.metadata().get("general.file_type")
    return _FILE_TYPES.get(number, short(number)) if type(number) is int else None


def _defaults(defaults: GenerationDefaults) -> dict[str, Any]:
    found = {name: getattr(defaults, name) for name in defaults.__slots__}
    return found | {"stop_ids": sorted(defaults.stop_ids), "extra": dict(defaults.extra)}


def _geometry(config: ModelConfig) -> dict[str, Any]:
    """All numbers of a config as plain data; layers are summed up by kind."""
    kinds = Counter((spec.placement, spec.chunk, "experts" if spec.moe else "dense") for spec in config.layers)
    return {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_dim": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _plain(config.rope_scaling),
        "max_seq_len": config.max_seq_len,
        "tie_embeddings": config.tie_embeddings,
        "moe": _plain(config.moe),
        "temper": _plain(config.temper),
        "layers": [
            {"count": count, "placement": placement, "chunk": chunk, "feed_forward": width}
            for (placement, chunk, width), count in kinds.items()
        ],
    }


def _plain(value: Any) -> dict[str, Any] | None:
    return None if value is None else {name: getattr(value, name) for name in value.__slots__}
