"""What is asked of a server: one body per request, the same for every server that is measured."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from herd.errors import ConfigError

__all__ = ["IDS", "Item", "Work", "read_dataset"]

IDS = (300, 1000)
"""Random prompts are of these token ids: pieces of text, never control tokens, in every vocabulary of Llama."""


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt (text or messages), and how many tokens are wanted when the dataset says so."""

    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] = ()
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Bodies of requests. Without `items`, prompts are `prompt_tokens` random ids, no two alike.

    `ends` lets replies end where the model ends them; otherwise each has exactly `output_tokens` (`ignore_eos`, which herd,
    vLLM and llama.cpp know).
    """

    model: str
    prompt_tokens: int = 128
    output_tokens: int = 64
    items: Sequence[Item] = ()
    ends: bool = False
    temperature: float = 0.0

    def bodies(self, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """(path, body) without end; the same for the same seed."""
        source = random.Random(seed)
        for number in count():
            body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
            body |= {"temperature": self.temperature, "max_tokens": self.output_tokens}
            if not self.ends:
                body["ignore_eos"] = True
            if not self.items:
                body["prompt"] = [source.randrange(*IDS) for _ in range(self.prompt_tokens)]
                yield "/v1/completions", body
                continue
            item = self.items[(seed + number) % len(self.items)]
            body["max_tokens"] = item.tokens or self.output_tokens
            if item.messages:
                body["messages"] = list(item.messages)
                yield "/v1/chat/completions", body
            else:
                body["prompt"] = item.prompt
                yield "/v1/completions", body


def read_dataset(file: Path) -> list[Item]:
    """The prompts of a JSONL file (`prompt` or `messages`, `max_tokens` or not), or of ShareGPT's JSON.

    Of a ShareGPT conversation, the first turn is asked. Raises ConfigError naming the line.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    whole = text.lstrip().startswith("[")
    lines = [(1, text)] if whole else [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    values = []
    for number, line in lines:
        try:
            values.append((number, json.loads(line)))
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: {error}") from None
    if whole:
        values = list(enumerate(values[0][1], 1))
    if not values:
        raise ConfigError(f"{file} holds no prompts")
    return [_item(value, f"{file}, entry {number}") for number, value in values]


def _item(value: Any, where: str) -> Item:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: expected an object with prompt or messages")
    tokens = value.get("max_tokens", value.get("output_tokens"))
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise ConfigError(f"{where}: max_tokens is {tokens!r}, expected a whole number from 1 up")
    if isinstance(value.get("prompt"), str) and value["prompt"]:
        return Item(prompt=value["prompt"], tokens=tokens)
    turns = value.get("messages")
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return Item(messages=tuple(turns), tokens=tokens)
    said = value.get("conversations")
    if isinstance(said, list) and said and isinstance(said[0], dict) and isinstance(said[0].get("value"), str):
        return Item(messages=({"role": "user", "content": said[0]["value"]},), tokens=tokens)
    raise ConfigError(f"{where}: expected a prompt (a string), messages, or ShareGPT's conversations")
