"""A response while it grows: the engine's events in, the semantic events of `/v1/responses` and the finished body out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from herd.server.errors import ApiError
from herd.server.openai.replies import chat_logprob, timings, truncation
from herd.server.protocol import Began, Ended, Event, Finished, Piece, ToolPiece, Usage
from herd.server.state import new_id

__all__ = ["Growing"]

Json = dict[str, Any]


class Growing:
    """`body` is the response as it is now. Every method gives the events that say what has changed."""

    def __init__(self, body: Json, *, logprobs: bool) -> None:
        self.body = body
        self._logprobs = logprobs
        self._number = 0
        self._open: Json | None = None
        self._parts: list[str] = []
        self._told: list[Json] = []
        self._waiting: list[Json] = []
        """Log-probabilities of tokens whose text has not come."""
        self._ended: Ended | None = None

    def begin(self, began: Began) -> list[Json]:
        """The response exists."""
        self.body |= truncation(began)
        return [self._event(f"response.{kind}", response=self.snapshot()) for kind in ("created", "in_progress")]

    def take(self, one: Event) -> list[Json]:
        """The engine's next event."""
        if isinstance(one, Piece):
            return list(self._piece(one))
        if isinstance(one, Ended):
            self._ended = one
        elif isinstance(one, Finished):
            return list(self._finish(one.usage))
        return []

    def fail(self, error: ApiError) -> list[Json]:
        """It ends with an error."""
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        events = list(self._close("incomplete"))
        self.body |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return [*events, self._event("response.failed", response=self.snapshot())]

    def cancel(self) -> list[Json]:
        """It ends because somebody wants that."""
        events = list(self._close("incomplete"))
        self.body["status"] = "cancelled"
        return [*events, self._event("response.incomplete", response=self.snapshot())]

    def snapshot(self) -> Json:
        """The body as it is now."""
        return {**self.body, "output": [dict(item) for item in self.body["output"]]}

    def _piece(self, piece: Piece) -> Iterator[Json]:
        if self._logprobs:
            self._waiting += map(chat_logprob, piece.tokens)
        if piece.text:
            if self._open is None or self._open["type"] != "message":
                yield from self._close("completed")
                yield from self._message()
            told, self._waiting = self._waiting, []
            self._parts.append(piece.text)
            self._told += told
            yield self._event("response.output_text.delta", **self._place(0), delta=piece.text, logprobs=told)
        if piece.tool is not None:
            self._waiting = []  # a call has none
            yield from self._call(piece.tool)

    def _message(self) -> Iterator[Json]:
        """A message begins."""
        item: Json = {
            "id": new_id("msg_"),
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        yield self._add(item)
        yield self._event("response.content_part.added", **self._place(0), part=self._text("", []))

    def _call(self, tool: ToolPiece) -> Iterator[Json]:
        if tool.name is not None:
            yield from self._close("completed")
            item: Json = {"id": new_id("fc_"), "type": "function_call", "status": "in_progress"}
            yield self._add(item | {"arguments": "", "call_id": tool.id, "name": tool.name})
        if tool.arguments:
            self._parts.append(tool.arguments)
            yield self._event("response.function_call_arguments.delta", **self._place(), delta=tool.arguments)

    def _add(self, item: Json) -> Json:
        self.body["output"].append(item)
        self._open, self._parts, self._told = item, [], []
        return self._event("response.output_item.added", output_index=len(self.body["output"]) - 1, item=dict(item))

    def _close(self, status: str) -> Iterator[Json]:
        """The item that grows is complete, or will not be."""
        item = self._open
        if item is None:
            return
        whole = "".join(self._parts)
        if item["type"] == "message":
            self._told += self._waiting
            part = self._text(whole, self._told)
            item["content"] = [part]
            yield self._event("response.output_text.done", **self._place(0), text=whole, logprobs=self._told)
            yield self._event("response.content_part.done", **self._place(0), part=part)
        else:
            item["arguments"] = whole
            yield self._event(
                "response.function_call_arguments.done", **self._place(), name=item["name"], arguments=whole
            )
        item["status"] = status
        index = len(self.body["output"]) - 1
        self._open, self._waiting = None, []
        yield self._event("response.output_item.done", output_index=index, item=dict(item))

    def _finish(self, usage: Usage) -> Iterator[Json]:
        cut = self._ended is not None and self._ended.reason == "length"
        if not self.body["output"]:  # a reply of no text is a reply
            yield from self._message()
        yield from self._close("incomplete" if cut else "completed")
        self.body["usage"] = _usage(usage)
        self.body["timings"] = timings(usage)
        if cut:
            detail = {"detail": self._ended.detail} if self._ended is not None and self._ended.detail else {}
            self.body |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens", **detail}}
        else:
            self.body |= {"status": "completed", "completed_at": int(time.time())}
        yield self._event("response.incomplete" if cut else "response.completed", response=self.snapshot())

    def _place(self, content: int | None = None) -> Json:
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self.body["output"]) - 1}
        return place if content is None else {**place, "content_index": content}

    def _text(self, text: str, told: Sequence[Json]) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(told)}

    def _event(self, kind: str, **content: Any) -> Json:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **content}


def _usage(told: Usage) -> Json:
    return {
        "input_tokens": told.prompt_tokens,
        "input_tokens_details": {"cached_tokens": told.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": told.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": told.prompt_tokens + told.completion_tokens,
    }
