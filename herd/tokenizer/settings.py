"""The small files beside a vocabulary: tokenizer_config.json, generation_config.json and the chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from herd.errors import CheckpointError
from herd.tokenizer.vocabulary import Settings

__all__ = ["MAX_JSON", "parse_json", "read_file", "read_settings", "template_in"]

MAX_JSON = 256 * 2**20
"""Larger files are refused: the released ones have 2 to 28 MB."""


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{size:,} bytes; such a file has at most {limit:,}", path=path)
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None


def decode_text(data: bytes, path: Path) -> str:
    """`data` as UTF-8. Raises CheckpointError with the byte offset."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError("is not UTF-8", path=path, offset=error.start) from None


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The object in the JSON text `data`. Raises CheckpointError with line and byte offset."""
    text = decode_text(data, path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode())
        raise CheckpointError(f"line {error.lineno}: broken JSON ({error.msg})", path=path, offset=offset) from None
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"broken JSON ({type(error).__name__}: {error})", path=path) from None
    if not isinstance(content, dict):
        raise CheckpointError("is not a JSON object", path=path)
    return content


def read_settings(folder: str | os.PathLike[str]) -> Settings:
    """What tokenizer_config.json, chat_template.jinja, chat_template.json and generation_config.json of a folder say."""
    folder = Path(folder)
    config = _optional(folder / "tokenizer_config.json")
    generation = _optional(folder / "generation_config.json")
    added: dict[str, int] = {}
    visible: set[int] = set()
    decoder = config.get("added_tokens_decoder")
    for id, entry in (decoder if isinstance(decoder, Mapping) else {}).items():
        if not str(id).isdecimal() or not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise CheckpointError(
                f"added_tokens_decoder has a broken entry {id!r}", path=folder / "tokenizer_config.json"
            )
        added[entry["content"]] = int(id)
        if not entry.get("special", False):
            visible.add(int(id))
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(id) is int and id >= 0 for id in ends):
        raise CheckpointError(f"eos_token_id is {ends!r}, not token ids", path=folder / "generation_config.json")
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, Mapping) else eos
    chat_format = config.get("chat_format")
    return Settings(
        template=_template(folder, config),
        chat_format=chat_format if isinstance(chat_format, str) else None,
        stop_ids=frozenset(ends),
        stop_names=frozenset([eos] if isinstance(eos, str) else []),
        added=added,
        visible=frozenset(visible),
    )


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template, where transformers looks for it: its own files first, then tokenizer_config.json."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return decode_text(read_file(jinja, MAX_JSON), jinja)
    found = (template_in(source) for source in (_optional(folder / "chat_template.json"), config))
    return next((template for template in found if template is not None), None)


def template_in(source: Mapping[str, Any]) -> str | None:
    """The chat template in the content of a tokenizer_config.json or chat_template.json."""
    found = source.get("chat_template")
    if isinstance(found, list):  # several named templates; "default" is the one for chat
        named = [entry for entry in found if isinstance(entry, Mapping) and entry.get("name") == "default"]
        found = named[-1].get("template") if named else None
    return found if isinstance(found, str) else None


def _optional(path: Path) -> dict[str, Any]:
    return parse_json(read_file(path, MAX_JSON), path) if path.is_file() else {}
