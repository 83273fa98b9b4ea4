"""A server of models that play parts, for the page: what they say depends on what they are asked."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from herd.server.app import create_app
from herd.server.process import WorkerError
from herd.server.protocol import Began, Call, Chat, Ended, Finished, Piece, ToolPiece, Usage
from herd.server.serve import Server, bound, url_of
from herd.server.settings import ModelSpec, ServerSettings
from tests.server.conftest import Live, _no_signals
from tests.server.fakes import ABOUT, Script, Scripted

DEFAULTS = {"temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": None}
STATS: dict[str, Any] = {
    "running": 3, "waiting": 2, "blocks_total": 512, "blocks_used": 141, "blocks_cached": 96, "steps": 1200, "requests": 40,
    "errors": 1, "preemptions": 0, "prompt_tokens": 9000, "cached_tokens": 5400, "generated_tokens": 8000,
    "busy_seconds": 30.0, "tokens_per_second": 212.4,
}  # fmt: skip
SLOW = 0.05
"""Seconds between the pieces of a slow reply."""

TABLE = """## Two lakes

Both lie in the **Andes**; the larger one is *navigable*. See <https://example.org/lakes>.

| Lake | Area | Depth |
|:-----|-----:|------:|
| Titicaca | 8,372 km² | 281 m |
| Poopó | 1,000 km² | 3 m |

1. Sail early.
2. Take:
   - warm clothes,
   - [x] a map.

```python
def area(width: float, length: float) -> float:
    # a rough guess
    return 0.8 * width * length

print(f"{area(58, 190):,.0f} km²")
```

The mean depth is $d = V / A$, and \\(V\\) is known.
"""


class Actor(Scripted):
    """A model of the stage. `gate` holds back loading until it is set."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, play)
        self.loading = spec.name == "late"

    async def ready(self) -> Any:
        if self.spec.name == "broken":
            self.error = WorkerError(
                "tensor 'output.weight' is missing: the file is damaged, pull it again", kind="CheckpointError"
            )
            raise self.error
        if self.loading:
            await asyncio.sleep(1.5)
            self.loading = False
        self.about = replace(ABOUT, parameters=1_235_814_400, kind="Q4_0", context=8192, seqs=16, defaults=DEFAULTS)
        self.stats = self.stats or dict(STATS)
        return self.about

    def memory(self) -> int | None:
        return 1_180 << 20

    async def ask(self, what: str, **args: Any) -> Any:
        """Words are tokens here."""
        assert what == "tokenize", what
        text = args.get("text")
        words = len(str(text if args.get("messages") is None else [m["content"] for m in args["messages"]]).split())
        return {"tokens": list(range(words)), "count": words, "context": 8192, "pieces": ["x"] * words}


def play(call: Call) -> Script:
    """What comes of a call."""
    assert isinstance(call.prompt, Chat)
    last = call.prompt.messages[-1]
    said = str(last["content"])
    if last["role"] == "tool":
        return reply(f"The tool says: {said}")
    if "weather" in said and call.prompt.tools:
        name = call.prompt.tools[0]["function"]["name"]
        return [
            Began("", 30),
            Piece("", tool=ToolPiece(0, "call_1", name)),
            Piece("", tool=ToolPiece(0, arguments='{"city": ')),
            Piece("", tool=ToolPiece(0, arguments='"La Paz"}')),
            Ended("", 0, "tool_calls", None, 12),
            Finished("", Usage(30, 12, 0, 0.02, 0.3)),
        ]
    if "slow" in said:
        return reply(" ".join(f"word{i}" for i in range(400)), wait=SLOW)
    if "lakes" in said:
        return reply(TABLE, cached=24)
    if "hostile" in said:
        return reply(said.partition("hostile ")[2])
    if "break" in said:
        return [Began("", 3), Piece("", 0, "half a "), WorkerError("the model's process ended", kind="Crashed")]
    if "full" in said:
        return [WorkerError("the prompt has 9,000 tokens, the context 8,192", kind="ContextFullError")]
    if "system?" in said:
        return reply(json.dumps([call.prompt.messages[0]["content"], call.sampling], sort_keys=True))
    if "seeds" in said:
        return reply(f"seed {time.monotonic_ns()}")
    return reply(f"You said: {said}")


def reply(text: str, *, wait: float = 0.0, cached: int = 0) -> Script:
    """A reply in pieces of about a word."""
    pieces = [text[i : i + 6] for i in range(0, len(text), 6)]
    out: list[Any] = [Began("", 42)]
    for piece in pieces:
        out += [Piece("", 0, piece), *([wait] if wait else [])]
    return [
        *out,
        Ended("", 0, "stop", None, len(pieces)),
        Finished("", Usage(42, len(pieces), cached, 0.12, len(pieces) / 48)),
    ]


MODELS = (
    ModelSpec(source="a", name="llama-3.2-1b", aliases=("small",), adapters=(("support", "path"),)),
    ModelSpec(source="b", name="late"),
    ModelSpec(source="c", name="broken"),
)


@contextmanager
def stage(**more: Any) -> Iterator[Live]:
    """A live server of these models."""
    settings = ServerSettings(
        **({"models": MODELS, "port": 0, "lazy": True, "drain_seconds": 0.1, "ping_seconds": 0.5} | more)
    )
    listening = bound(settings)
    server = Server(settings, create_app(settings, launch=Actor))
    server.capture_signals = _no_signals  # type: ignore[method-assign]  # this is not the main thread
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Live(url_of(listening), server._state, loop)
    finally:
        loop.call_soon_threadsafe(server.drain)
        thread.join(30)
        listening.close()
        assert not thread.is_alive(), "the server does not end"
        loop.close()
