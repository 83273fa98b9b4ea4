"""A conversation in a file: JSON with a version, written whole or not at all.

    {"kind": "herd.chat", "version": 1, "model": "nano", "system": "...", "params": {...}, "messages": [...]}

A message has `role` and `content`, and where they apply `tool_calls` [{name, arguments, id}], `stop_reason`, `name` and
`tool_call_id`. Everything that cannot be read as such raises TranscriptError, naming the file and the place.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from herd.chat.messages import Message, Role, StopReason, ToolCall
from herd.chat.params import SamplingParams
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
    read = tuple(_from_json(path, i, message) for i, message in enumerate(messages))
    return Transcript(model, read, system, _params(path, data.get("params", {})))


def _to_json(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        row["tool_calls"] = [{"name": c.name, "arguments": dict(c.arguments), "id": c.id} for c in message.tool_calls]
    for name in ("stop_reason", "name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            row[name] = value
    return row


def _from_json(path: Path, index: int, row: object) -> Message:
    where = f"{path}: message {index + 1}"
    if not isinstance(row, Mapping):
        raise TranscriptError(f"{where} is not an object")
    role: Any = row.get("role")
    content, calls = row.get("content"), row.get("tool_calls", [])
    if role not in get_args(Role) or not isinstance(content, str):
        raise TranscriptError(f"{where} needs a role ({', '.join(get_args(Role))}) and content that is text")
    if row.get("stop_reason") not in (None, *get_args(StopReason)):
        raise TranscriptError(f"{where} has an unknown stop_reason")
    for name in ("name", "tool_call_id"):
        if not isinstance(row.get(name), str | None):
            raise TranscriptError(f"{where}: {name} is not text")
    if not isinstance(calls, list):
        raise TranscriptError(f"{where}: tool_calls is not a list")
    try:
        return Message(
            role,
            content,
            tuple(_call(where, call) for call in calls),
            row.get("stop_reason"),
            row.get("name"),
            row.get("tool_call_id"),
        )
    except PromptError as error:
        raise TranscriptError(f"{where}: {error}") from None


def _call(where: str, row: object) -> ToolCall:
    if isinstance(row, Mapping):
        name, arguments, id = row.get("name"), row.get("arguments", {}), row.get("id")
        if isinstance(name, str) and isinstance(arguments, Mapping) and isinstance(id, str | None):
            return ToolCall(name, arguments, id)
    raise TranscriptError(f"{where}: a tool call needs a name, and arguments that are an object")


def _params(path: Path, row: object) -> SamplingParams:
    known = {field.name for field in fields(SamplingParams)} & set(SAVED)
    if not isinstance(row, Mapping) or not set(row) <= known:
        raise TranscriptError(f"{path}: params must be an object with only {', '.join(sorted(known))}")
    try:
        return SamplingParams(**row)
    except (ConfigError, TypeError) as error:
        raise TranscriptError(f"{path}: {error}") from None
