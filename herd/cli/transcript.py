"""A conversation in a file: JSON with a version, written whole or not at all.

    {"kind": "herd.chat", "version": 1, "model": "nano", "system": "...", "params": {...}, "messages": [...]}

Messages are those of `herd.chat.render.messages_from` (OpenAI's shape, and `stop_reason`), so other commands read the file
too. Everything that cannot be read as such raises TranscriptError, naming the file and the place.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from herd.chat.messages import Message
from herd.chat.params import SamplingParams
from herd.chat.render import messages_from
from herd.errors import ConfigError, HerdError, PromptError

__all__ = ["Transcript", "TranscriptError", "load", "save"]

KIND, VERSION = "herd.chat", 1
LARGEST = 64 * 2**20
"""Bytes: a longer file is not a conversation."""
SAVED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "stop", "seed")


class TranscriptError(HerdError, ValueError):
    """A conversation file that cannot be written or read."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation at rest. `model` is the name it was held with."""

    model: str
    messages: tuple[Message, ...]
    system: str = ""
    params: SamplingParams = SamplingParams()


def save(path: Path, transcript: Transcript, *, replace: bool = False) -> None:
    """Write `transcript` to `path`; an existing file is only replaced with `replace`."""
    if path.exists() and not replace:
        raise TranscriptError(f"{path} exists: /save -f {path} replaces it")
    data = {
        "kind": KIND,
        "version": VERSION,
        "model": transcript.model,
        "system": transcript.system,
        "params": {name: getattr(transcript.params, name) for name in SAVED},
        "messages": [_to_json(message) for message in transcript.messages],
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise TranscriptError(f"cannot write {path}: {error.strerror or error}") from None


def load(path: Path) -> Transcript:
    """Read what `save` wrote."""
    try:
        if path.exists() and not path.is_file():
            raise TranscriptError(f"{path} is not a file")
        if path.stat().st_size > LARGEST:
            raise TranscriptError(f"{path} has {path.stat().st_size:,} bytes: too long for a conversation")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TranscriptError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, HerdError):
            raise
        raise TranscriptError(f"{path} is not JSON text: {error}") from None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise TranscriptError(f'{path} is not a conversation saved by herd (no "kind": "{KIND}")')
    if data.get("version") != VERSION:
        raise TranscriptError(f"{path} has version {data.get('version')!r}, and this herd reads version {VERSION}")
    model, system, messages = data.get("model", ""), data.get("system", ""), data.get("messages")
    if not isinstance(model, str) or not isinstance(system, str):
        raise TranscriptError(f"{path}: model and system must be text")
    if not isinstance(messages, list):
        raise TranscriptError(f"{path}: messages is missing or not a list")
    try:
        read = messages_from(messages)
    except PromptError as error:
        raise TranscriptError(f"{path}: {error}") from None
    return Transcript(model, read, system, _params(path, data.get("params", {})))


def _to_json(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        row["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    for name in ("stop_reason", "name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            row[name] = value
    return row


def _params(path: Path, row: object) -> SamplingParams:
    if not isinstance(row, Mapping) or not set(row) <= set(SAVED):
        raise TranscriptError(f"{path}: params must be an object with only {', '.join(SAVED)}")
    try:
        return SamplingParams(**row)
    except (ConfigError, TypeError) as error:
        raise TranscriptError(f"{path}: {error}") from None
