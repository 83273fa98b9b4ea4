"""What is being planned: a checkpoint's own headers, or a release of the catalog, with what is not known said as assumptions."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from herd.checkpoint.open import open_store
from herd.checkpoint.resolve import resolve
from herd.checkpoint.store import packed_of
from herd.errors import ConfigError, UnknownModelError
from herd.model.accounting import active_parameters, parameters
from herd.model.config import ModelConfig, plain
from herd.model.presets import wanted
from herd.model.release import Release
from herd.planning.weights import WeightBytes, stored_bytes
from herd.quant.scheme import block_type

__all__ = ["Subject", "subject"]

ANNOUNCED = {"nearly two trillion": 2_000_000_000_000}
"""Totals that were only ever announced in words -> the number assumed for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model to plan for.

    `config` is the text decoder, None where nothing of it was published; `parameters` counts everything, `active` what one
    token passes through, `beside` what is not in the decoder (vision, cross-attention). `stored` are the bytes of the
    weights as they lie on disk (what other tools quantized: as it is in memory), None without files; `stored_as` the type that
    most of them have. `decodes` is False for encoders, which write no tokens. `cross_tokens`, `cross_layers`: keys and values
    of one image that stay beside the text's. `suggested` is the weight format that the name itself asks for. `kept` has the
    type and the bytes of every tensor of `stored`; `whole` says why those cannot be shared by several processes.
    """

    name: str
    config: ModelConfig | None
    parameters: int
    active: int
    beside: int = 0
    stored: WeightBytes | None = None
    stored_as: str | None = None
    decodes: bool = True
    cross_layers: int = 0
    cross_tokens: int = 0
    suggested: str | None = None
    assumptions: tuple[str, ...] = ()
    kept: Mapping[str, tuple[str, int]] = field(default_factory=dict, compare=False, repr=False)
    whole: str | None = None


def subject(path_or_name: str | os.PathLike[str]) -> Subject:
    """The model that `path_or_name` means: an existing path or the embedded model by its headers, else the catalog's.

    Raises UnknownModelError with the nearest names, CheckpointError, ConfigError.
    """
    name = os.fspath(path_or_name)
    if name in ("nano", "herd-nano") or _is_path(name):
        return _from_headers(resolve(name), name)
    try:
        asked = wanted(name)
    except UnknownModelError:
        # A repository in the local cache, or the error with the nearest names.
        return _from_headers(resolve(name), name)
    made = _from_release(asked.release)
    if asked.quant is None:
        return made
    return replace(made, suggested=asked.quant.replace("-", "_"))


def _is_path(name: str) -> bool:
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _from_headers(path: Path, name: str) -> Subject:
    store = open_store(path, headers_only=True)
    infos = {tensor: store.info(tensor) for tensor in store.names()}
    kinds: Counter[str] = Counter()
    for info in infos.values():
        kinds[info.stored] += info.nbytes
    skipped = len(getattr(store, "skipped", ()))
    note = (f"{skipped} tensors of the vision half are not counted",) if skipped else ()
    sizes = {tensor: info.nbytes for tensor, info in infos.items()}
    repacked: Counter[tuple[str, str]] = Counter()
    for tensor in infos:
        packed = packed_of(store, tensor)
        if packed is not None:
            sizes[tensor] = packed.likely_bytes
            repacked[packed.word, "16 bits" if block_type(packed.likely or "") is None else str(packed.likely)] += 1
    note += tuple(f"{count} {word} matrices are counted as {kind}" for (word, kind), count in repacked.items())
    note += tuple(getattr(store, "notes", ()))
    return Subject(
        name=name,
        config=store.config,
        parameters=parameters(store.config),
        active=active_parameters(store.config),
        stored=stored_bytes(sizes, store.config),
        stored_as=kinds.most_common(1)[0][0],
        assumptions=note,
        kept={tensor: (info.stored, sizes[tensor]) for tensor, info in infos.items()},
        whole=f"matrices in {next(iter(repacked))[0]}" if repacked else None,
    )


def _from_release(release: Release) -> Subject:
    facts = release.facts
    if release.kind == "deberta-v2-classifier":
        return _encoder(release, facts)
    if release.kind == "mllama":
        return _mllama(release, facts)
    if release.config is None:
        return _announced(release, facts)
    total = release.total_params or parameters(release.config)
    beside = total - parameters(release.config)
    notes = ["geometry and parameters from the catalog: a checkpoint's own headers may differ"]
    if beside > 0:
        notes.append(f"{beside:,} parameters beside the text decoder (vision) are kept in bfloat16 and idle for text")
    return Subject(
        name=release.id,
        config=release.config,
        parameters=total,
        active=active_parameters(release.config),
        beside=max(beside, 0),
        assumptions=tuple(notes),
    )


def _mllama(release: Release, facts: Mapping[str, Any]) -> Subject:
    """Llama 3.2 Vision: the self-attention decoder is a Llama 3.1, everything else is counted beside it."""
    vision = facts["vision"]
    config = ModelConfig(
        dim=facts["dim"],
        n_heads=facts["n_heads"],
        n_kv_heads=facts["n_kv_heads"],
        head_dim=facts["head_dim"],
        hidden_dim=facts["ffn_hidden_dim"],
        vocab_size=facts["vocab_size"],
        layers=plain(vision["self_attention_layers"]),
        max_seq_len=release.max_context or 8192,
    )
    total = release.total_params or parameters(config)
    return Subject(
        name=release.id,
        config=config,
        parameters=total,
        active=total,
        beside=total - parameters(config),
        cross_layers=vision["cross_attention_layers"],
        cross_tokens=vision["max_tiles"] * 1601,
        assumptions=(
            "planned with one image of four tiles per sequence: 6,404 vision tokens whose keys and values stay in memory",
            "vision encoder and cross-attention layers are kept in bfloat16; herd cannot run this model yet",
        ),
    )


def _encoder(release: Release, facts: Mapping[str, Any]) -> Subject:
    total = release.total_params
    if total is None:
        raise ConfigError(f"{release.name}: its parameters were not published, so nothing can be planned")
    return Subject(
        name=release.id,
        config=None,
        parameters=total,
        active=total - facts["vocab_size"] * facts["dim"],
        decodes=False,
        assumptions=(
            "an encoder: it reads a text once and writes no tokens; no keys and values are kept",
            "operations are counted from the parameters without the embedding table; herd cannot run this model yet",
        ),
    )


def _announced(release: Release, facts: Mapping[str, Any]) -> Subject:
    """A model of which only totals were ever said."""
    said = facts.get("announced_total_params")
    total = release.total_params or ANNOUNCED.get(str(said))
    if total is None or release.active_params is None:
        raise ConfigError(f"{release.name} cannot be planned: {release.why_not}")
    notes = [f"total parameters: {total:,} assumed for the announced {said!r}"] if release.total_params is None else []
    return Subject(
        name=release.id,
        config=None,
        parameters=total,
        active=release.active_params,
        assumptions=(
            *notes,
            f"active parameters: {release.active_params:,} as announced, embeddings included",
            "layers, heads and vocabulary were never published: keys and values, attention and logits are left out",
        ),
    )
