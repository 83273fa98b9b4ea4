"""A model behind any OpenAI-compatible server, for a conversation in the terminal. No torch."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from herd.chat.format import Delta, ToolSpec
from herd.chat.messages import Message
from herd.chat.model import Reply, Usage
from herd.chat.params import SamplingParams
from herd.cli.conversation import SETTINGS
from herd.cli.endpoint import Endpoint
from herd.errors import HerdError, PromptError, UnknownModelError

__all__ = ["RemoteChat", "model_of"]


def model_of(server: Endpoint, wanted: str | None) -> Mapping[str, Any]:
    """The model of the server's list that is wanted, or its only one. Raises UnknownModelError listing them."""
    found = server.ask("GET", "/v1/models")
    rows = found.get("data") if isinstance(found, dict) else None
    models = [row for row in rows or () if isinstance(row, dict) and isinstance(row.get("id"), str)]
    if wanted is not None:  # a server may know more names than it lists
        return next(
            ({**row, "id": wanted} for row in models if row["id"] in (wanted, f"{wanted}:latest")), {"id": wanted}
        )
    own = [row for row in models if not row.get("parent")]
    different = {str(row.get("root") or row["id"]) for row in own}
    if len(different) == 1:
        return own[0]
    names = ", ".join(row["id"] for row in models[:20]) or "none"
    raise UnknownModelError(f"{server.url} has several models, say which with --model: {names}")


class RemoteChat:
    """A `Talker` over `server`. Settings are sent when they were said: those that are still `unsaid`'s own are the server's.

    `max_len` is 0 where the server does not say how long its context is.
    """

    def __init__(self, server: Endpoint, model: Mapping[str, Any], unsaid: SamplingParams) -> None:
        self._server, self._unsaid = server, unsaid
        self.name = str(model["id"])
        length = model.get("max_model_len") or model.get("context_length") or model.get("context_window")
        self._max_len = length if isinstance(length, int) else 0
        self.last: Reply | None = None
        self.made = 0

    @property
    def max_len(self) -> int:
        """Tokens of its context; 0: it does not say."""
        if not self._max_len:  # herd says it once the model is loaded
            with contextlib.suppress(HerdError):
                length = model_of(self._server, self.name).get("max_model_len")
                self._max_len = length if isinstance(length, int) else 0
        return self._max_len

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation, where the server counts them; else those of the last exchange."""
        body = {"model": self.name, "messages": [_sent(m) for m in messages], "add_generation_prompt": False}
        with contextlib.suppress(HerdError, KeyError, TypeError):
            return int(self._server.ask("POST", "/tokenize", body)["count"])
        return 0 if self.last is None else self.last.usage.prompt_tokens + self.last.usage.completion_tokens

    def stream(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        params: SamplingParams = SamplingParams(),
        *,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Delta]:
        """The assistant's reply as it is made."""
        if tools:
            raise PromptError("tools are not sent to other servers from here")
        body = {
            "model": self.name,
            "messages": [_sent(message) for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._said(params),
        }
        self.made, self.last = 0, None
        text: list[str] = []
        told: Mapping[str, Any] = {}
        reason, detail = "length", None
        asked = first = time.perf_counter()
        answered = False
        events = self._server.events("/v1/chat/completions", body)
        try:
            for event in events:
                answered = True
                told = event.get("usage") or told
                for choice in event.get("choices") or ():
                    reason, detail = choice.get("finish_reason") or reason, choice.get("stop_reason") or detail
                    piece = (choice.get("delta") or {}).get("content")
                    if piece:
                        if not self.made:
                            first = time.perf_counter()
                        self.made += 1
                        text.append(piece)
                        yield Delta(text=piece)
        finally:
            events.close()  # type: ignore[attr-defined]  # a generator
            if answered:
                now = time.perf_counter()
                usage = Usage(
                    int(told.get("prompt_tokens") or 0),
                    int(told.get("completion_tokens") or self.made),
                    int((told.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
                    first - asked,
                    now - first,
                )
                ended = "stop" if reason == "stop" else "context_full" if detail == "context_full" else "length"
                self.last = Reply(Message("assistant", "".join(text)), [], ended, usage)

    def _said(self, params: SamplingParams) -> dict[str, Any]:
        """The settings that somebody chose, in OpenAI's words and vLLM's."""
        out: dict[str, Any] = {}
        for name in SETTINGS:
            value = getattr(params, name)
            if value is not getattr(self._unsaid, name) and value not in (None, ()):
                out[name] = list(value) if isinstance(value, tuple) else value
        return out


def _sent(message: Message) -> dict[str, Any]:
    out: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "type": "function",
                "id": call.id or f"call_{i}",
                "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)},
            }
            for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    return out
