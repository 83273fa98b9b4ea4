"""Anthropic's messages while they grow: content blocks, and the events of a stream in their order. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from herd.errors import HerdError
from herd.server.errors import error_body, told
from herd.server.protocol import Began, Ended, Event, Finished, Piece, ToolPiece, Usage
from herd.server.sse import event

__all__ = ["PING", "Answer"]

PING = event({"type": "ping"}, "ping")


class Answer:
    """A message while it grows: `take` events, then `whole`; or `stream` them."""

    def __init__(self, id: str, model: str, began: Began) -> None:
        self._head = {"id": id, "type": "message", "role": "assistant", "model": model}
        self._began = began
        self._blocks: list[dict[str, Any]] = []
        self._calls: dict[int, int] = {}
        """Numbers of calls -> their blocks."""
        self._arguments: dict[int, list[str]] = {}
        self._ended: Ended | None = None
        self._usage: Usage | None = None

    def take(self, one: Event) -> list[dict[str, Any]]:
        """The next event; what a stream tells of it."""
        told: list[dict[str, Any]] = []
        if isinstance(one, Piece):
            if one.text:
                told += self._text(one.text)
            if one.tool is not None:
                told += self._tool(one.tool)
        elif isinstance(one, Ended):
            self._ended = one
            told += self._closed()
        elif isinstance(one, Finished):
            self._usage = one.usage
        return told

    def whole(self) -> dict[str, Any]:
        """The body of the answer."""
        assert self._usage is not None
        for block, parts in self._arguments.items():
            self._blocks[block]["input"] = _object("".join(parts))
        return {
            **self._head,
            "content": self._blocks,
            **self._stop(),
            "usage": _usage(self._usage),
        }

    async def stream(self, events: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
        """The answer as server-sent events. An error on the way is an event, too."""
        try:
            async with contextlib.aclosing(events):
                usage = _usage(Usage(self._began.prompt_tokens, 0, 0, 0.0, 0.0))
                message = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
                yield _event({"type": "message_start", "message": message})
                async for one in events:
                    for made in self.take(one):
                        yield _event(made)
            assert self._usage is not None
            yield _event({"type": "message_delta", "delta": self._stop(), "usage": _usage(self._usage)})
            yield _event({"type": "message_stop"})
        except HerdError as error:
            yield _event(error_body(told(error, "a stream of messages"), "anthropic"))

    def _text(self, text: str) -> list[dict[str, Any]]:
        told = []
        if not self._blocks or self._blocks[-1]["type"] != "text":
            told = self._opened({"type": "text", "text": ""})
        self._blocks[-1]["text"] += text
        return [*told, self._delta({"type": "text_delta", "text": text})]

    def _tool(self, tool: ToolPiece) -> list[dict[str, Any]]:
        told = []
        if tool.name is not None:
            id = f"toolu_{(tool.id or '').rpartition('_')[2]}"
            told += self._opened({"type": "tool_use", "id": id, "name": tool.name, "input": {}})
            self._calls[tool.number] = len(self._blocks) - 1
            self._arguments[len(self._blocks) - 1] = []
        block = self._calls[tool.number]
        if tool.arguments:
            self._arguments[block].append(tool.arguments)
            told.append(self._delta({"type": "input_json_delta", "partial_json": tool.arguments}, block))
        return told

    def _opened(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        told = self._closed()
        self._blocks.append(block)
        return [
            *told,
            {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": dict(block)},
        ]

    def _closed(self) -> list[dict[str, Any]]:
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}] if self._blocks else []

    def _delta(self, delta: dict[str, Any], block: int | None = None) -> dict[str, Any]:
        index = len(self._blocks) - 1 if block is None else block
        return {"type": "content_block_delta", "index": index, "delta": delta}

    def _stop(self) -> dict[str, Any]:
        assert self._ended is not None
        reason, detail = self._ended.reason, self._ended.detail
        if reason == "tool_calls":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if reason == "length":
            full = detail == "context_full"
            return {
                "stop_reason": "model_context_window_exceeded" if full else "max_tokens",
                "stop_sequence": None,
            }
        if detail is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": detail}
        return {"stop_reason": "end_turn", "stop_sequence": None}


def _usage(told: Usage) -> dict[str, Any]:
    """Anthropic counts what was found in the cache apart."""
    return {
        "input_tokens": told.prompt_tokens - told.cached_tokens,
        "output_tokens": told.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": told.cached_tokens,
    }


def _object(text: str) -> dict[str, Any]:
    """The arguments of a call. What a limit has cut short is no object; the reply then says max_tokens."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _event(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])
