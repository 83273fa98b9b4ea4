"""Base models: text that goes on. They have no prompt format for conversations, and this one says so. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from herd.chat.format import Rendered, ToolSpec
from herd.chat.messages import Message
from herd.chat.reply import ReplyParser, Stops
from herd.chat.writer import TokenWriter
from herd.errors import PromptError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["BaseFormat"]


class BaseFormat:
    """BOS and the text, nothing else."""

    def __init__(self, tokenizer: Tokenizer, *, name: str = "base") -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.stop_ids = frozenset({tokenizer.special.eos, *tokenizer.special.stop})

    def complete(self, text: str) -> Rendered:
        """Ids of a text to go on with: BOS once, then the text."""
        writer = TokenWriter(self.tokenizer)
        writer.special(self.tokenizer.special.bos)
        writer.text(text)
        return writer.rendered()

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), *, generate: bool = True) -> Rendered:
        """Always raises PromptError: a base model was not trained on conversations."""
        raise PromptError(
            "its files name no chat format, as those of base models, so it takes text, not messages: give it a text "
            "to go on with, or name the format that it was tuned for with --format (for example --format llama3.1)"
        )

    def parser(self, tools: Sequence[ToolSpec] | None = ()) -> ReplyParser:
        """A parser that passes text on until a stop id."""
        return ReplyParser(self.tokenizer, Stops(turn=self.stop_ids), follows_text=True)
