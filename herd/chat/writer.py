"""Where a prompt format writes its ids: tokens and loss mask grow together, so they cannot disagree. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from herd.chat.format import Rendered
from herd.errors import PromptError
from herd.tokenizer.tokenizer import Tokenizer

__all__ = ["TokenWriter", "special_id"]


def special_id(tokenizer: Tokenizer, name: str, format: str) -> int:
    """Id of the special token `name`; PromptError naming the format when the vocabulary has no such token."""
    found = tokenizer.special.get(name)
    if found is None:
        raise PromptError(
            f"the {format} prompt format needs the special token {name}, which this tokenizer lacks: "
            "choose the format that belongs to the tokenizer (--format)"
        )
    return found


class TokenWriter:
    """Collects ids and their loss mask. `learn` marks what an assistant wrote."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._mask: list[bool] = []
        self._notes: list[str] = []

    def special(self, id: int, *, learn: bool = False) -> None:
        """One special token, as its id."""
        self._tokens.append(id)
        self._mask.append(learn)

    def text(self, text: str, *, learn: bool = False) -> None:
        """Text in one encode call. Special names inside it are ordinary characters."""
        self.ids(self._tokenizer.encode(text), learn=learn)

    def ids(self, ids: Iterable[int], *, learn: bool = False) -> None:
        """Ids that were encoded elsewhere."""
        before = len(self._tokens)
        self._tokens.extend(ids)
        self._mask.extend([learn] * (len(self._tokens) - before))

    def note(self, note: str) -> None:
        """Something the format decided on its own, for `Rendered.notes`."""
        if note not in self._notes:
            self._notes.append(note)

    def rendered(self) -> Rendered:
        """What was written so far."""
        return Rendered(self._tokens, self._mask, tuple(self._notes))
