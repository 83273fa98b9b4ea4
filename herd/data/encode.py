"""Records to examples: token ids and, for each, the token to predict after it (or IGNORE).

Labels are shifted here, once: `labels[i]` is the target of the model's output at position i. Nothing later shifts again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from herd.data.read import DataError
from herd.data.records import ChatRecord

__all__ = ["IGNORE", "Example", "Render", "encode_chat", "encode_text", "from_mask"]

IGNORE = -100
"""Label of a position that is not learned from (torch's cross_entropy default)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One document or conversation: `tokens` and `labels` of equal length."""

    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.labels):
            raise DataError(f"{len(self.tokens)} tokens but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.tokens)


class _Rendered(Protocol):
    """What a prompt format gives: `herd.chat.format.Rendered` is one."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def loss_mask(self) -> Sequence[bool | int]: ...


Render = Callable[[ChatRecord], _Rendered]
"""A conversation to ids plus mask, for example a ChatFormat's `render` bound to a tokenizer."""


def from_mask(tokens: Sequence[int], learned: Sequence[bool | int]) -> Example:
    """An example from ids and a mask of the ids to be produced: position i learns token i+1 where `learned[i+1]`."""
    if len(tokens) != len(learned):
        raise DataError(f"{len(tokens)} tokens but a loss mask of {len(learned)}")
    labels = [token if wanted else IGNORE for token, wanted in zip(tokens[1:], learned[1:], strict=True)]
    return Example(tuple(tokens), (*labels, IGNORE))


def encode_chat(record: ChatRecord, render: Render) -> Example:
    """A conversation: loss only where the format's mask says so (the assistant's words and its end-of-turn)."""
    rendered: Any = render(record)
    return from_mask(rendered.tokens, rendered.loss_mask)


def encode_text(ids: Sequence[int], *, bos: int, eos: int) -> Example:
    """A document: bos, its ids, eos; every token after bos is learned."""
    tokens = (bos, *ids, eos)
    return Example(tokens, (*tokens[1:], IGNORE))
