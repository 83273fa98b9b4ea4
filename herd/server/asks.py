"""Questions to a worker that have one answer: each a function of the model, by name. In the worker, in threads of its own.

A function takes the `herd.LLM` and keyword arguments of plain JSON, and returns plain JSON. It may raise HerdErrors.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from herd.chat.base import BaseFormat
from herd.chat.guard import GuardFormat
from herd.chat.toolspec import tools_from
from herd.errors import ConfigError, TokenizerError
from herd.server.prepare import Preparer, conversation
from herd.server.protocol import Chat

if TYPE_CHECKING:
    from herd.engine.llm import LLM

__all__ = ["ASKS", "ask"]

ASKS: dict[str, Callable[..., Any]] = {}


def ask(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make `function` a question, under its name."""
    ASKS[function.__name__] = function
    return function


@ask
def tokenize(
    llm: LLM,
    text: str | None = None,
    messages: Sequence[Any] | None = None,
    tools: Sequence[Any] = (),
    special: bool = True,
    generate: bool = True,
    pieces: bool = False,
) -> dict[str, Any]:
    """Ids of a text (with BOS when `special`) or of a conversation; with `pieces` their printable names."""
    if messages is not None:
        ids = llm.format.render(conversation(messages), tools_from(tools), generate=generate).tokens
    else:
        base = BaseFormat(llm.tokenizer)
        ids = base.complete(text or "").tokens if special else llm.tokenizer.encode(text or "")
    out: dict[str, Any] = {"tokens": list(ids), "count": len(ids), "context": llm.max_len}
    if pieces:
        out["pieces"] = [llm.tokenizer.piece(i) for i in ids]
    return out


@ask
def count(llm: LLM, chat: dict[str, Any]) -> dict[str, Any]:
    """Tokens of the conversation `chat` (the fields of `protocol.Chat`) as a prompt."""
    return {"count": Preparer(llm).count(Chat(**chat)), "context": llm.max_len}


@ask
def detokenize(llm: LLM, tokens: Sequence[int], special: bool = False) -> str:
    """The text of ids; special ones are left out unless `special`. Raises TokenizerError for ids that the model does not have."""
    size = llm.model.config.vocab_size
    if (wrong := next((i for i in tokens if not 0 <= i < size), None)) is not None:
        raise TokenizerError(f"{wrong:,} is no id of this model: ids are 0 to {size - 1:,}")
    return llm.tokenizer.decode(list(tokens), skip_special=not special)


@ask
def embed(
    llm: LLM,
    prompts: Sequence[Any],
    pooling: Any = "mean",
    dimensions: int | None = None,
    normalize: bool = True,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Vectors of texts or id lists: float32, little-endian, in base64, one for each; and how many tokens they had."""
    base = BaseFormat(llm.tokenizer)
    ids = [list(base.complete(one).tokens) if isinstance(one, str) else list(one) for one in prompts]
    found = llm.embed(ids, pooling=pooling, dimensions=dimensions, normalize=normalize, adapter=adapter)
    data = [b64encode(row.numpy().astype("<f4").tobytes()).decode("ascii") for row in found]
    return {"vectors": data, "tokens": [len(one) for one in ids]}


@ask
def guard(llm: LLM) -> dict[str, Any]:
    """What reading a Guard's verdicts takes: its categories (code to name), the ids of safe and unsafe. Raises ConfigError."""
    format = llm.format
    if not isinstance(format, GuardFormat):
        raise ConfigError(f"this model's prompt format is {format.name}: only a Llama Guard judges")
    safe, unsafe = format.score_ids
    names = {code: text.removesuffix(".") for code, text in format.categories.items()}
    return {"safe": safe, "unsafe": unsafe, "categories": names}


@ask
def load_adapter(llm: LLM, name: str, path: str) -> dict[str, Any]:
    """Add an adapter. `rooms` are the contexts afterwards, see `rooms`."""
    loaded = llm.load_adapter(name, path)
    said = {
        "name": name,
        "kind": loaded.kind,
        "rank": loaded.rank,
        "matrices": loaded.matrices,
        "change": loaded.change,
    }
    return said | {"virtual": loaded.virtual, "context": llm.max_len, "rooms": rooms(llm)}


@ask
def unload_adapter(llm: LLM, name: str) -> dict[str, Any]:
    """Forget one."""
    llm.unload_adapter(name)
    return {"context": llm.max_len, "rooms": rooms(llm)}


def rooms(llm: LLM) -> dict[str, int]:
    """The contexts of adapters whose virtual tokens take a part of it, in tokens of a request."""
    return {one.name: llm.room(one.name) for one in llm.adapters if one.virtual}
