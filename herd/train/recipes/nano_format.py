"""The chat format of herd-nano at training time: Llama 3 headers over the training tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as FastTokenizer

from herd.chat.format import Rendered
from herd.chat.messages import Message
from herd.data.records import ChatRecord
from herd.train.vocabulary import special_ids

__all__ = ["Headers"]


class Headers:
    """Conversations to ids and loss mask, exactly as `herd.chat.llama3` writes them (a test compares the two).

    The training vocabulary is a `tokenizers` object: it encodes a corpus in bulk.
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = special_ids(tokenizer)

    def plain(self, text: str) -> list[int]:
        """Ids of ordinary text, with nothing added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def header(self, role: str) -> list[int]:
        """Ids that open a message of `role`."""
        start, end = self.special["<|start_header_id|>"], self.special["<|end_header_id|>"]
        return [start, *self.plain(role), end, *self.plain("\n\n")]

    def prompt(self, turns: Sequence[Message]) -> list[int]:
        """Ids of a conversation with the assistant's next message opened."""
        return self(ChatRecord(tuple(turns))).tokens + self.header("assistant")

    def __call__(self, record: ChatRecord) -> Rendered:
        """Ids and loss mask of a finished conversation."""
        tokens, mask = [self.special["<|begin_of_text|>"]], [False]
        for turn in record.messages:
            opened = self.header(turn.role)
            said = [*self.plain(turn.text.strip()), self.special["<|eot_id|>"]]
            tokens += opened + said
            mask += [False] * len(opened) + [turn.role == "assistant"] * len(said)
        return Rendered(tokens, mask)
