"""Ollama's store, read where it is: `manifests/HOST/NAMESPACE/MODEL/TAG` (JSON) names blobs, `blobs/sha256-<hex>`.

Names and digests come from files and people, so both are matched letter by letter before they become paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from herd.errors import CheckpointError
from herd.files import read_json, safe_join, short

__all__ = ["OllamaModel", "file_type", "find", "models", "read", "stores"]

DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})", re.ASCII)
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}(?::\d{1,5})?", re.ASCII)
_KIND = "application/vnd.ollama.image."
HOST, NAMESPACE = "registry.ollama.ai", "library"
LARGEST = 1 << 20
"""Bytes of a manifest: Ollama's own are under a few thousand."""


@dataclass(frozen=True, slots=True)
class OllamaModel:
    """A tag. `path` is its GGUF file; `size` counts all its layers in bytes; `layers` are their kinds."""

    name: str
    path: Path
    size: int
    layers: tuple[str, ...]
    manifest: Path


def stores() -> list[Path]:
    """Where Ollama keeps models here: OLLAMA_MODELS, or the user's folder and the one of its Linux service."""
    if told := os.environ.get("OLLAMA_MODELS"):
        return [Path(told).expanduser()]
    return [Path("~/.ollama/models").expanduser(), Path("/usr/share/ollama/.ollama/models")]


def find(name: str) -> Path | None:
    """The GGUF file that Ollama calls `name` (`llama3.2:1b`, `user/model`, `hf.co/ORG/NAME:Q4_K_M`); None when it has no such.

    Raises CheckpointError for a manifest that is damaged, and for a model that is more than one GGUF file.
    """
    parts = _parts(name)
    for store in stores() if parts is not None else []:
        try:
            manifest = safe_join(store / "manifests", "/".join(parts or ()))
            there = manifest.is_file()
        except (CheckpointError, OSError):
            continue
        if there:
            model = read(store, manifest)
            others = [layer for layer in model.layers if layer in ("adapter", "projector")]
            if others:
                raise CheckpointError(f"{name} has a layer ({others[0]}) that herd does not apply", path=manifest)
            return model.path
    return None


def models() -> Iterator[OllamaModel | CheckpointError]:
    """Every model in the stores, by name; an error in the place of each that is damaged."""
    for store in stores():
        root = store / "manifests"
        if not os.access(root, os.R_OK | os.X_OK):
            continue
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if len(path.relative_to(root).parts) == 4 and not name.startswith("."):
                    try:
                        yield read(store, path)
                    except CheckpointError as error:
                        yield error


def read(store: Path, manifest: Path) -> OllamaModel:
    """The model of a manifest. Raises CheckpointError unless it names one GGUF blob that is there."""
    layers = read_json(manifest, LARGEST).get("layers")
    if not isinstance(layers, list):
        raise CheckpointError("is no Ollama manifest: it has no layers", path=manifest)
    found: list[tuple[str, str, int]] = []
    for layer in layers:
        fields = layer if isinstance(layer, dict) else {}
        kind, digest, size = fields.get("mediaType"), fields.get("digest"), fields.get("size", 0)
        if not isinstance(kind, str) or not isinstance(digest, str) or type(size) is not int:
            raise CheckpointError(f"a layer is {short(layer)}: it has no type, digest and size", path=manifest)
        found.append((kind.removeprefix(_KIND), digest, size))
    weights = [digest for kind, digest, _ in found if kind == "model"]
    if len(weights) != 1:
        kinds = sorted({kind for kind, _, _ in found})
        raise CheckpointError(f"names {len(weights)} GGUF files, not one; its layers are {short(kinds)}", path=manifest)
    blob = _blob(store, weights[0], manifest)
    if not blob.is_file():
        raise CheckpointError(f"its blob {blob.name[:19]}... is missing: ollama pull gets it again", path=manifest)
    return OllamaModel(
        _name(manifest), blob, sum(size for *_, size in found), tuple(kind for kind, *_ in found), manifest
    )


def file_type(model: OllamaModel) -> str | None:
    """The quantization as Ollama's own configuration blob says it, such as Q4_K_M."""
    try:
        config = read_json(model.manifest, LARGEST).get("config")
        digest = config.get("digest") if isinstance(config, dict) else None
        if not isinstance(digest, str):
            return None
        said = read_json(_blob(model.path.parents[1], digest, model.manifest), LARGEST).get("file_type")
    except CheckpointError:
        return None
    return said if isinstance(said, str) and re.fullmatch(r"[\w.-]{1,20}", said, re.ASCII) else None


def _blob(store: Path, digest: str, manifest: Path) -> Path:
    found = DIGEST.fullmatch(digest)
    if found is None:
        raise CheckpointError(f"{short(digest)} is no digest", path=manifest)
    return safe_join(store / "blobs", f"sha256-{found[1].lower()}")


def _parts(name: str) -> tuple[str, ...] | None:
    """host, namespace, model, tag of `name`, with Ollama's defaults; None for what Ollama would not call anything."""
    *front, last = name.split("/")
    model, _, tag = last.partition(":")
    if len(front) > 2:
        return None
    host = front[0] if len(front) == 2 else HOST
    namespace = front[-1] if front else NAMESPACE
    parts = (host, namespace, model, tag or "latest")
    right = _HOST.fullmatch(host) and all(_PART.fullmatch(part) for part in parts[1:])
    return parts if right and ".." not in name else None


def _name(manifest: Path) -> str:
    """As `ollama list` says it: defaults left out."""
    host, namespace, model, tag = manifest.parts[-4:]
    front = [] if (host, namespace) == (HOST, NAMESPACE) else [namespace] if host == HOST else [host, namespace]
    return "/".join([*front, f"{model}:{tag}"])
