"""Stores of other tools, made by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

IMAGE = "application/vnd.ollama.image."


def put(store: Path, data: bytes) -> dict[str, Any]:
    """A blob in an Ollama store, and the fields of a layer that names it."""
    digest = hashlib.sha256(data).hexdigest()
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    (store / "blobs" / f"sha256-{digest}").write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def ollama(store: Path, name: str, model: bytes = b"GGUF", extra: list[dict[str, Any]] | None = None) -> Path:
    """A tag such as registry.ollama.ai/library/llama3.2/1b; returns the blob of its model."""
    layer = {"mediaType": IMAGE + "model", **put(store, model)}
    config = put(store, json.dumps({"model_format": "gguf", "file_type": "Q8_0"}).encode())
    layers = [layer, {"mediaType": IMAGE + "license", **put(store, b"none")}, *(extra or [])]
    manifest = {"schemaVersion": 2, "config": {"mediaType": "application/json", **config}, "layers": layers}
    path = store / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest))
    return store / "blobs" / layer["digest"].replace(":", "-")


def folder(path: Path, *names: str) -> Path:
    """A folder with these files, each of which holds its name."""
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_text(name)
    return path
