"""Questions to a worker that have one answer: each a function of the model, by name. In the worker, in threads of its own.

A function takes the `herd.LLM` and keyword arguments of plain JSON, and returns plain JSON. It may raise HerdErrors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from herd.chat.base import BaseFormat
from herd.chat.render import messages_from
from herd.chat.toolspec import tools_from

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
        ids = llm.format.render(messages_from(messages), tools_from(tools), generate=generate).tokens
    else:
        base = BaseFormat(llm.tokenizer)
        ids = base.complete(text or "").tokens if special else llm.tokenizer.encode(text or "")
    out: dict[str, Any] = {"tokens": list(ids), "count": len(ids), "context": llm.max_len}
    if pieces:
        out["pieces"] = [llm.tokenizer.piece(i) for i in ids]
    return out


@ask
def detokenize(llm: LLM, tokens: Sequence[int]) -> str:
    """The text of ids, special ones left out."""
    return llm.tokenizer.decode(list(tokens))


@ask
def load_adapter(llm: LLM, name: str, path: str) -> dict[str, Any]:
    """Add a LoRA adapter."""
    loaded = llm.load_adapter(name, path)
    return {"name": name, "rank": loaded.rank, "matrices": loaded.matrices, "change": loaded.change}


@ask
def unload_adapter(llm: LLM, name: str) -> None:
    """Forget one."""
    llm.unload_adapter(name)
