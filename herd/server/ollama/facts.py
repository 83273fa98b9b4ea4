"""What a model is by its files, read in a process of its own: the one that answers requests opens no foreign files. No torch."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

from herd.errors import CheckpointError
from herd.server.settings import ModelSpec

__all__ = ["Facts", "facts_of"]

log = logging.getLogger("herd.server")
SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What `herd inspect` finds in headers. None: not known."""

    kind: str | None = None
    parameters: int | None = None
    context: int | None = None
    dim: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    vocabulary: int | None = None
    numbers: str | None = None
    format: str | None = None


_KNOWN: dict[str, Facts] = {}
MOST = 256


async def facts_of(spec: ModelSpec) -> Facts:
    """The facts of a model. Raises CheckpointError when it cannot be read."""
    if spec.source not in _KNOWN:
        if len(_KNOWN) >= MOST:
            _KNOWN.clear()
        _KNOWN[spec.source] = _facts(await _inspected(spec))
    return _KNOWN[spec.source]


async def _inspected(spec: ModelSpec) -> dict[str, Any]:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "herd",
        "inspect",
        "--json",
        "--",
        spec.source,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, words = await asyncio.wait_for(child.communicate(), SECONDS)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    try:
        found = json.loads(out)
    except ValueError:
        # What it says has paths, which are not for clients.
        log.error("%s cannot be inspected: %s", spec.name, words.decode("utf-8", "replace").strip()[:500])
        raise CheckpointError(f"{spec.name} cannot be read: the server's log says why") from None
    return found if isinstance(found, dict) else {}


def _facts(found: dict[str, Any]) -> Facts:
    config, tokenizer = found.get("config") or {}, found.get("tokenizer") or {}
    types = found.get("types") or {}
    largest = max(types, key=lambda name: types[name]["bytes"], default=None)
    return Facts(
        kind={"hf": "safetensors", "meta": "meta", "gguf": "gguf"}.get(found.get("kind", "")),
        parameters=found.get("parameters"),
        context=config.get("max_seq_len"),
        dim=config.get("dim"),
        layers=config.get("n_layers"),
        heads=config.get("n_heads"),
        kv_heads=config.get("n_kv_heads"),
        vocabulary=config.get("vocab_size"),
        numbers=found.get("mix") or largest,
        format=tokenizer.get("chat_format"),
    )
