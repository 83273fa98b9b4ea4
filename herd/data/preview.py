"""What a model sees of a record and what it learns of it, as pieces of text to be shown. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from herd.chat.format import ChatFormat
from herd.chat.messages import Message
from herd.data.encode import IGNORE, encode
from herd.data.records import ChatRecord, CompletionRecord, PreferenceRecord, PromptRecord, Record, TextRecord, text_of
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["Span", "preview"]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of text; `learned` is whether its tokens carry loss, `special` whether it is a token or a word of the format."""

    text: str
    learned: bool = False
    special: bool = False


def preview(record: Record, tokenizer: Tokenizer | None = None, format: ChatFormat | None = None) -> list[Span]:
    """The record as training has it: its tokens with a tokenizer, else its messages or texts.

    Raises DataError when it cannot be encoded. Preferences and prompts are shown as they are: what is learned of them is a
    matter of the method.
    """
    if tokenizer is None or isinstance(record, PreferenceRecord | PromptRecord):
        return list(_plain(record))
    example = encode(record, tokenizer, format)
    learned = [False, *(label != IGNORE for label in example.labels[:-1])]
    special = set(tokenizer.special.ids.values())
    spans: list[Span] = []
    tokens = zip(example.tokens, learned, strict=True)
    for (taught, fixed), group in groupby(tokens, key=lambda item: (item[1], item[0] in special)):
        ids = [id for id, _ in group]
        if fixed:
            spans += [Span(tokenizer.piece(id), taught, True) for id in ids]
        else:
            spans.append(Span(b"".join(map(tokenizer.bytes_of, ids)).decode("utf-8", "replace"), taught))
    return spans


def _plain(record: Record) -> Iterator[Span]:
    if isinstance(record, TextRecord):
        yield Span(record.text, True)
    elif isinstance(record, CompletionRecord):
        yield from (Span(record.prompt), Span(record.completion, True))
    elif isinstance(record, ChatRecord):
        for i, message in enumerate(record.messages):
            yield from _message(message, message.role == "assistant" and i >= record.given)
    else:
        parts: list[tuple[str, str | tuple[Message, ...]]] = [("prompt", record.prompt)]
        if isinstance(record, PreferenceRecord):
            parts += [("chosen", record.chosen), ("rejected", record.rejected)]
        for name, part in parts:
            yield Span(f"{name}: ", special=True)
            if isinstance(part, str):
                yield Span(f"{part}\n")
            else:
                yield Span("\n")
                for message in part:
                    yield from _message(message, False)


def _message(message: Message, learned: bool) -> Iterator[Span]:
    yield Span(f"{message.role}: ", special=True)
    yield Span(text_of(ChatRecord((message,))), learned)
    yield Span("\n")
