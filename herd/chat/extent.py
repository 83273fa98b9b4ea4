"""Where a bracketed text ends: brackets and strings followed while the text arrives. No torch."""

from __future__ import annotations

from herd.chat.pycalls import MAX_DEPTH

__all__ = ["Extent"]

_CLOSING = {"{": "}", "[": "]", "(": ")"}


class Extent:
    """Follows brackets and strings from an opening bracket to its partner, each character once."""

    def __init__(self, start: int, *, python: bool) -> None:
        self._at = start
        self._python = python
        self._open: list[str] = []
        self._quote = ""

    def run(self, text: str) -> tuple[int | None, bool]:
        """(end, True) behind the closing bracket, (end, False) where the text stops being balanced, (None, False) when
        more text is needed."""
        while self._at < len(text):
            char = text[self._at]
            if self._quote:
                if char == "\\":
                    if self._at + 1 == len(text):
                        break
                    self._at += 2
                elif text.startswith(self._quote, self._at):
                    self._at += len(self._quote)
                    self._quote = ""
                elif self._quote.startswith(text[self._at :]):
                    break  # one or two quotes so far of the three that end the string
                else:
                    self._at += 1
                continue
            if char == '"' or (self._python and char == "'"):
                if self._python and len(text) - self._at < 3 and text[self._at :] == char * (len(text) - self._at):
                    break  # two quotes are an empty string or the start of a triple quoted one
                self._quote = char * 3 if self._python and text.startswith(char * 3, self._at) else char
                self._at += len(self._quote)
                continue
            if char in _CLOSING:
                self._open.append(_CLOSING[char])
                if len(self._open) > MAX_DEPTH:
                    return self._at + 1, False
            elif char in _CLOSING.values():
                if self._open.pop() != char:
                    return self._at + 1, False
                if not self._open:
                    return self._at + 1, True
            self._at += 1
        return None, False
